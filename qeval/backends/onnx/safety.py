"""Refuse what an ONNX folder may not ask for: native libraries, others' operators, files outside of itself.

A genai_config.json may name a library of custom operators, which onnxruntime-genai loads and so runs, or have files
written; a graph may use operators that only such a library has. Both are refused by name wherever a folder is opened,
so that nothing in a folder that somebody else made is ever run.
"""

import re
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import onnx_ir as ir

from qeval import escape
from qeval.errors import UsageError

_DOMAINS = frozenset({
    "", "ai.onnx", "ai.onnx.ml", "com.microsoft", "com.microsoft.nchwc", "com.ms.internal.nhwc",
    "com.microsoft.experimental",
})  # fmt: skip
"""Where ONNX Runtime's own operators are."""
_RUN_OTHERS = frozenset({"ATen", "EPContext", "PyOp", "PythonOp", "PythonOpGrad", "TritonOp"})
"""Operators of these domains that run Python, another framework, or a compiled program that the graph holds."""
_LIBRARY_KEYS = re.compile("librar|plugin|_lib_|custom_op", re.IGNORECASE)
_LIBRARY = re.compile(r"\.(so|dll|dylib|pyd)(\.\d+)*\s*($|[;:,])", re.IGNORECASE)
_QNN = re.compile(r"(lib)?Qnn[A-Za-z]+\.(so|dll)")
"""Names of Qualcomm's own backends, which its builders write; qeval sets the options of providers itself."""
_WRITES = frozenset({"enable_profiling", "profile_file_prefix", "optimized_model_filepath", "dump_model", "log_file"})
_FILE_ENTRY = re.compile("file|path|folder|load_config", re.IGNORECASE)


def check_graph_config(config: Mapping[str, Any], file: Path) -> None:
    """Refuse a configuration that names code to run, files to write, or files outside of its folder.

    Args:
        config: What a genai_config.json or config.json holds.
        file: Where it lies.

    Raises:
        UsageError: it names such a thing, which the sentence repeats.
    """
    for key, value in _settings(config):
        name = key.rpartition(".")[2]
        if value in (None, False, "", "0", [], {}):
            continue
        if _LIBRARY_KEYS.search(name) and isinstance(value, str):
            raise _refused(file, key, value, "a native library, which would be run")
        if isinstance(value, str) and _LIBRARY.search(value) and not _is_own_backend(name, value, file.parent):
            raise _refused(file, key, value, "a native library, which would be run")
        if name in _WRITES:
            raise _refused(file, key, value, "a file to be written")
        is_path = name == "filename" or (key.startswith("session.") and _FILE_ENTRY.search(key))
        if is_path and not is_inside_folder(str(value)):
            raise _refused(file, key, value, "a file outside of its folder")


def check_graph(model: ir.Model, file: Path) -> None:
    """Refuse a graph with operators that are not ONNX Runtime's own, nor functions of the model.

    Args:
        model: The graph.
        file: Where it lies.

    Raises:
        UsageError: it names the first such operator.
    """
    functions = {(key[0], key[1]) for key in model.functions}
    nodes = chain(model.graph.all_nodes(), *(function.all_nodes() for function in model.functions.values()))
    for node in nodes:
        own = (node.domain, node.op_type) in functions
        if (node.domain not in _DOMAINS and not own) or (node.op_type in _RUN_OTHERS and not own):
            name = escape.visible(f"{node.domain or 'ai.onnx'}.{node.op_type}", 80)
            raise UsageError(
                f"{file} uses the operator {name}, which is none of ONNX Runtime's own: a library, or a program inside "
                "the graph, would have to be run, and qeval runs none; export the model with standard operators."
            )


def is_inside_folder(location: str) -> bool:
    r"""Return whether a path that a file names stays in that file's folder, on every system.

    >>> [is_inside_folder(each) for each in ("model.onnx.data", "../x", "/etc/x", "..\\x", "C:x")]
    [True, False, False, False, False]
    """
    posix, windows = PurePosixPath(location), PureWindowsPath(location)
    parts = {*posix.parts, *windows.parts}
    return not (posix.is_absolute() or windows.drive or windows.root or ".." in parts or "\0" in location)


def _settings(value: Any, key: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Yield every key, wherever it stands, with its value; the key's own dots are kept (`session.x`)."""
    if isinstance(value, Mapping) and depth < 50:
        for name, held in value.items():
            yield str(name), held
            yield from _settings(held, str(name), depth + 1)
    elif isinstance(value, list) and depth < 50:
        for held in value:
            if isinstance(held, str):
                yield key, held
            yield from _settings(held, key, depth + 1)


def _is_own_backend(name: str, value: str, folder: Path) -> bool:
    return name == "backend_path" and _QNN.fullmatch(value) is not None and not (folder / value).exists()


def _refused(file: Path, key: str, value: object, what: str) -> UsageError:
    return UsageError(f"{file} names {what} ({escape.cut(key, 60)}: {escape.cut(value)}): qeval opens no such folder.")

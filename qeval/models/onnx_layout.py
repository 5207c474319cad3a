"""ONNX models in the layouts that people have: all in one folder, or the graph in `onnx/` below its configuration.

Optimum and transformers.js keep config.json and the tokenizer in the root and graphs, often several, in `onnx/`. Such a
model is opened by a folder of links in the cache that holds what belongs to one graph, as one from the hub is.
"""

from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

from qeval.errors import UsageError
from qeval.models.checkpoint.weights import INDEX, SINGLE, shorten_list
from qeval.models.hub.files import AROUND
from qeval.models.hub.links import link_files

_GENAI, _CONFIG, _BELOW = "genai_config.json", "config.json", "onnx"
_DATA_SUFFIXES = (".data", ".bin", ".onnx_data", ".weights")


def is_onnx(path: Path) -> bool:
    """Return whether a path is a graph, a folder with one, or a folder of no other weights with one in `onnx/`."""
    if path.suffix == ".onnx" and path.is_file():
        return True
    if not path.is_dir():
        return False
    if (path / _GENAI).exists() or any(path.glob("*.onnx")):
        return True
    return not (path / SINGLE).exists() and not (path / INDEX).exists() and any((path / _BELOW).glob("*.onnx"))


def onnx_folder(path: Path) -> Path:
    """Return the folder that holds one graph with its configuration and tokenizer.

    Args:
        path: A folder, or a graph, which may lie below its configuration.

    Returns:
        `path` where it is such a folder; else a folder of links in the cache.

    Raises:
        UsageError: There are several graphs, and none is named.
        QevalError: The cache can't be written.
    """
    if path.is_dir() and ((path / _GENAI).exists() or any(path.glob("*.onnx"))):
        if (path / _GENAI).exists() or (path / _CONFIG).exists() or not (path.resolve().parent / _CONFIG).exists():
            return path
        return _link_graph(path.resolve().parent, path.resolve().name, path)
    if path.is_dir():
        return _link_graph(path.resolve(), _BELOW, path)
    folder = path.resolve().parent
    if not (folder / _GENAI).exists() and not (folder / _CONFIG).exists() and (folder.parent / _CONFIG).exists():
        return _link_graph(folder.parent, f"{folder.name}/{path.name}", path)
    return _link_graph(folder, path.name, path)


def _link_graph(root: Path, inside: str, named: Path) -> Path:
    """Link what belongs to the graph `inside` a root, or to the only one in that folder of it."""
    folder = root / inside if not inside.endswith(".onnx") else (root / inside).parent
    graphs = sorted(folder.glob("*.onnx"))
    if not inside.endswith(".onnx") and len(graphs) > 1:
        raise UsageError(
            f"{named} holds several models: give the path of one, {shorten_list([str(g) for g in graphs])}."
        )
    graph = root / inside if inside.endswith(".onnx") else graphs[0]
    around = [path for path in sorted(root.iterdir()) if any(fnmatch(path.name, pattern) for pattern in AROUND)]
    files = {path.name: path for path in (*around, *_data_files(graph, alone=len(graphs) == 1), graph)}
    if missing := sorted(str(path) for path in files.values() if not path.exists()):
        raise UsageError(f"{missing[0]} is a link that leads nowhere: download the model again.")
    return link_files(root, [path.relative_to(root).as_posix() for path in files.values()])


def _data_files(graph: Path, *, alone: bool) -> Iterator[Path]:
    """Yield the files that may hold a graph's weights: named after it, or whatever lies beside the only one."""
    for path in sorted(graph.parent.iterdir()):
        if path.is_file() and path != graph and (path.name.startswith(graph.name) or (alone and _is_data(path))):
            yield path


def _is_data(path: Path) -> bool:
    return path.suffix in _DATA_SUFFIXES or path.name.endswith("_data")

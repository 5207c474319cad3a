"""The files of an ONNX folder, none missing or cut short; numbers are read only when asked for."""

import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qeval.backends.onnx.safety import check_graph, check_graph_config, is_inside_folder
from qeval.errors import UsageError
from qeval.parsing import load_object, one_sentence

GENAI_CONFIG, CONFIG = "genai_config.json", "config.json"
logging.getLogger("onnx_ir").setLevel(logging.CRITICAL)  # it would write names of the file's to the terminal
_DATA = "qeval.data"
"""Under what a graph keeps, in memory, which files of its folder hold its external data."""
_TOKENIZERS = (("tokenizer.json",), ("tokenizer.model",), ("vocab.json", "merges.txt"), ("vocab.txt",))


@dataclass(frozen=True, eq=False)
class Files:
    """The files of a decoder's folder."""

    folder: Path
    model: Path
    config: Path
    """genai_config.json, or transformers' config.json."""
    tokenizer: tuple[Path, ...]
    settings: Mapping[str, Any]
    """What the configuration says of the model."""
    decoder: Mapping[str, Any]
    """genai_config.json's section about the decoder; empty for a config.json."""


def find_files(folder: Path, *, needs_tokenizer: bool = True) -> Files:
    """Return the files of a decoder's folder.

    Raises:
        UsageError: the folder has no graph (or several, and no genai_config.json that names one), no configuration,
            or, where `needs_tokenizer`, no tokenizer.
    """
    if not folder.is_dir():
        raise UsageError(f"There is no folder {folder}: give one that holds an ONNX model.")
    config, content = _config(folder)
    decoder = _decoder(config, content)
    model = _model_file(folder, decoder)
    tokenizer = _tokenizer(folder)
    if needs_tokenizer and not tokenizer:
        raise UsageError(f"{folder} has no tokenizer (tokenizer.json): copy the one of the model it was made from.")
    return Files(folder, model, config, tokenizer, content["model"] if decoder else content, decoder)


def load_graph(model_file: Path) -> ir.Model:
    """Return a graph whose external data is all there, none of it read; links out of its folder are followed.

    The hub's cache is made of such links (`snapshots/REVISION/model.onnx.data` to `blobs/HASH`), and for a graph given
    as bytes neither ONNX Runtime nor onnx-ir goes along. So tensors name the folder and the file where data really is.

    Raises:
        UsageError: the file isn't ONNX or holds no graph; external data is missing, cut short, or outside the folder.
    """
    try:
        model = ir.load(model_file)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # readers of protobuf raise what they like over broken bytes
        raise UsageError(f"{model_file} is no ONNX model, or is cut short: copy or export it again.") from error
    if not len(model.graph):
        raise UsageError(f"{model_file} holds no graph: copy or export it again.")
    check_graph(model, model_file)
    with one_sentence(f"{model_file} breaks the rules of ONNX", after="Export it again."):
        _check_external(model_file, model)
    model.meta[_DATA] = sorted({model_file.parent / str(tensor.location) for tensor in _external(model)})
    _follow_links(model_file, model)
    return model


def data_folder(model_file: Path, model: ir.Model) -> Path:
    """Return the folder in which a graph of `load_graph` says that its external data lies."""
    return next((Path(tensor.base_dir) for tensor in _external(model)), model_file.parent)


def content_files(files: Files, model: ir.Model) -> tuple[Path, ...]:
    """Return the files that decide what a folder's model computes: configuration, graph, the graph's external data."""
    return files.config, files.model, *model.meta[_DATA]


def _config(folder: Path) -> tuple[Path, dict[str, Any]]:
    """Return the configuration: genai_config.json, or transformers' config.json."""
    for name in (GENAI_CONFIG, CONFIG):
        file = folder / name
        if file.is_file():
            config = load_object(file)
            check_graph_config(config, file)
            return file, config
    if not any(folder.glob("*.onnx")):
        raise UsageError(_no_model(folder))
    raise UsageError(f"{folder} has neither {GENAI_CONFIG} nor config.json: copy the one that came with the model.")


def _decoder(config_file: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the section of a genai_config.json about the decoder; empty for a config.json."""
    if config_file.name != GENAI_CONFIG:
        return {}
    model = config.get("model")
    decoder = model.get("decoder") if isinstance(model, dict) else None
    if not isinstance(decoder, dict):
        raise UsageError(f"{config_file} describes no decoder (model.decoder): only language models can be scored.")
    if "pipeline" in decoder:
        raise UsageError(f"{config_file} splits the decoder into a pipeline of graphs: export it as a single one.")
    return decoder


def _model_file(folder: Path, decoder: Mapping[str, Any]) -> Path:
    if name := decoder.get("filename"):
        if not isinstance(name, str) or not (folder / name).is_file():
            raise UsageError(f"{folder} lacks {name}, the model that its {GENAI_CONFIG} names: copy it there.")
        return folder / str(name)
    files = sorted(folder.glob("*.onnx"))
    if not files:
        raise UsageError(_no_model(folder))
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise UsageError(
            f"{folder} holds several models ({names}), and no {GENAI_CONFIG} names one: keep one to a folder."
        )
    return files[0]


def _no_model(folder: Path) -> str:
    below = sorted({str(file.parent.relative_to(folder)) for file in folder.glob("*/*.onnx")})
    hint = f"there is one in {below[0]}" if len(below) == 1 else "give the folder that holds model.onnx"
    return f"{folder} holds no ONNX model: {hint}."


def _tokenizer(folder: Path) -> tuple[Path, ...]:
    for names in _TOKENIZERS:
        files = tuple(folder / name for name in names)
        if all(file.is_file() for file in files):
            return files
    return ()


def _check_external(model_file: Path, model: ir.Model) -> None:
    needed: dict[str, int] = {}
    for tensor in _external(model):
        end = (tensor.offset or 0) + (tensor.length or tensor.nbytes)
        location = str(tensor.location)
        needed[location] = max(needed.get(location, 0), end)
    for location, size_bytes in needed.items():
        path = PurePosixPath(location)
        if not is_inside_folder(location):
            raise UsageError(f"{model_file} points to data outside its folder ({location}): move it next to the model.")
        file = model_file.parent / path
        if not file.is_file():
            raise UsageError(f"{file} is missing, which holds weights of {model_file.name}: copy it next to the model.")
        if file.stat().st_size < size_bytes:
            raise UsageError(
                f"{file} is cut short: {model_file.name} needs {size_bytes:,} bytes of it and it has "
                f"{file.stat().st_size:,}: copy it again."
            )


def _follow_links(model_file: Path, model: ir.Model) -> None:
    own = model_file.parent.resolve()
    real = {str(tensor.location): (own / tensor.location).resolve() for tensor in _external(model)}
    if all(file.is_relative_to(own) for file in real.values()):
        return
    folder = os.path.commonpath([file.parent for file in real.values()])
    for value in (value for graph in model.graphs() for value in graph.initializers.values()):
        held = value.const_value
        if isinstance(held, ir.ExternalTensor):
            file = real[str(held.location)].relative_to(folder)
            value.const_value = ir.ExternalTensor(
                str(file), held.offset, held.length, held.dtype, shape=held.shape, name=held.name, base_dir=folder
            )


def _external(model: ir.Model) -> Iterator[ir.ExternalTensor]:
    for graph in (*model.graphs(), *(function.graph for function in model.functions.values())):
        held = [value.const_value for value in graph.initializers.values()]
        attributes = (each for node in graph for each in node.attributes.values() if isinstance(each, ir.Attr))
        held += [each.as_tensor() for each in attributes if each.type == ir.AttributeType.TENSOR]
        yield from (tensor for tensor in held if isinstance(tensor, ir.ExternalTensor))


def array_of(tensor: Any) -> NDArray[Any]:
    """Return a tensor's values. Those of external data are read anew: a graph would keep what it unpacked of each."""
    if isinstance(tensor, ir.ExternalTensor):
        shape, name = ir.Shape(tensor.shape), tensor.name or ""
        tensor = ir.ExternalTensor(tensor.path, tensor.offset, tensor.length, tensor.dtype, shape=shape, name=name)
    return np.asarray(tensor.numpy())

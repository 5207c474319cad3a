"""GGUF files: which of the baseline's weights lie in them as what type, and that each type can be dequantized."""

from collections.abc import Iterable
from pathlib import Path

import gguf
from gguf import ReaderTensor

from qeval.errors import UsageError
from qeval.models.gguf import read_contents
from qeval.models.gguf_reader import open_gguf

_PLAIN = ("F32", "F16", "BF16", "F64")


def forms_of(path: Path, names: Iterable[str], layers: int) -> dict[str, tuple[str, int]]:
    """For each of the baseline's weights that the file quantizes: its type there, and the bits that it takes.

    Raises:
        UsageError: the file is torn, or holds a type that the gguf package can't dequantize.
    """
    read_contents(path)
    reader = open_gguf(path)
    held = {tensor.name: tensor for tensor in reader.tensors}
    for tensor in {tensor.tensor_type: tensor for tensor in held.values()}.values():
        _check_readable(path, tensor)
    field = reader.fields["general.architecture"]
    names_in_file = _name_map(str(field.contents()), layers)
    forms = {}
    for name in names:
        inside = names_in_file.get_name(name, try_suffixes=(".weight", ".bias"))
        if inside in held and held[inside].tensor_type.name not in _PLAIN:
            forms[name] = (held[inside].tensor_type.name, 8 * int(held[inside].n_bytes))
    return forms


def _name_map(architecture: str, layers: int) -> gguf.TensorNameMap:
    known = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
    if architecture not in known:
        raise UsageError(f"The GGUF architecture '{architecture}' is not known to the gguf package.")
    return gguf.get_tensor_name_map(known[architecture], layers)


def _check_readable(path: Path, tensor: ReaderTensor) -> None:
    """Dequantize one row: the package's own answer to whether it can."""
    try:
        gguf.dequantize(tensor.data.reshape(-1, tensor.data.shape[-1])[:1], tensor.tensor_type)
    except NotImplementedError as error:
        kind = tensor.tensor_type.name
        raise UsageError(
            f"'{path}' holds {tensor.name} as {kind}, which the gguf package can't dequantize; quantize it otherwise."
        ) from error

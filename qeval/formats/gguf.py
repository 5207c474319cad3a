"""GGUF files: which of the baseline's weights lie in them as what type, and that each type can be dequantized."""

from collections.abc import Iterable
from pathlib import Path

import gguf
from gguf import ReaderTensor

from qeval.errors import UsageError
from qeval.models.gguf.convert import read_contents
from qeval.models.gguf.reader import gguf_errors, open_gguf
from qeval.models.gguf.settings import metadata_of
from qeval.models.gguf.tensors import NameMap
from qeval.models.structure.weight_views import is_expert, stack_of

_PLAIN = ("F32", "F16", "BF16", "F64")


def forms_of(path: Path, names: Iterable[str], layers: int, prefix: str) -> dict[str, tuple[str, int]]:
    """Return for each of the baseline's weights that the file quantizes: its type there, and the bits that it takes.

    Args:
        path: The file.
        names: The baseline's weights, experts one by one.
        layers: How many decoder layers the baseline has.
        prefix: What the base model's names begin with, such as `model.`.

    Raises:
        UsageError: The file is torn, or holds a type that the gguf package can't dequantize.
    """
    read_contents(path)
    with gguf_errors(path):
        reader = open_gguf(path)
        tensors = {tensor.name: tensor for tensor in reader.tensors}
        for tensor in {tensor.tensor_type: tensor for tensor in tensors.values()}.values():
            _check_readable(path, tensor)
        metadata = metadata_of(reader, path)
        names_in_file = NameMap(metadata.architecture, layers, prefix)

    # a weight is in the file's types of all the tensors that make it
    forms = {}
    for name in names:
        parts = [tensors[each] for each in names_in_file.names(stack_of(name)) if each in tensors]
        packed = [part for part in parts if part.tensor_type.name not in _PLAIN]
        if packed:
            experts = int(parts[0].shape[-1]) if is_expert(name) else 1
            kinds = dict.fromkeys(part.tensor_type.name for part in parts)
            forms[name] = (" and ".join(kinds), 8 * sum(int(part.n_bytes) for part in parts) // experts)
    return forms


def _check_readable(path: Path, tensor: ReaderTensor) -> None:
    """Dequantize one row: the package's own answer to whether it can."""
    try:
        gguf.dequantize(tensor.data.reshape(-1, tensor.data.shape[-1])[:1], tensor.tensor_type)
    except NotImplementedError as error:
        kind = tensor.tensor_type.name
        raise UsageError(
            f"'{path}' holds {tensor.name} as {kind}, which the gguf package can't dequantize; quantize it otherwise."
        ) from error

"""torchao's safetensors: the parts of its tensor subclasses, and how to put them together in the file's own header.

torchao itself puts them together and gives their values, since each of its layouts is a class of its own.
"""

from qeval.formats.base import CheckpointFormat, Config, DecodedMatrix, Module, Values
from qeval.formats.rounding import TensorRounding, no_format

HEADER = "torchao_header"
"""Where the reader puts the safetensors headers' metadata, among the settings."""
_PREFIX = "_weight_"


def _decode(module: Module, config: Config) -> DecodedMatrix:
    """Decode the values of a linear, dequantized by torchao."""
    from torchao.prototype.safetensors.safetensors_support import (  # noqa: PLC0415 - an extra
        unflatten_tensor_state_dict,
    )

    name = f"{module.name}.weight"
    header = config[HEADER]
    if name not in header:
        raise module.error("is not described by the header of its safetensors file")
    data = {f"{module.name}.{part}": tensor for part, tensor in module.parts.items() if part.startswith(_PREFIX)}
    described = {"tensor_names": f'["{name}"]', name: header[name]}
    tensors, _ = unflatten_tensor_state_dict(data, described)
    if name not in tensors:
        raise module.error("lacks parts that its header names")
    stored = sum(8 * part.numel() * part.element_size() for part in data.values())
    return Values(tensors[name].dequantize().float(), type(tensors[name]).__name__, stored)


def _inputs(name: str, config: Config) -> TensorRounding | None:
    """Return that inputs are rounded where the name of torchao's configuration says so; its settings are not read."""
    return no_format("as torchao's own configuration says") if "Activation" in str(config.get("quant_type")) else None


TORCHAO = CheckpointFormat(
    "torchao",
    ("_weight_qdata", "_weight_scale"),
    _decode,
    library=("torchao", "pip install 'qeval[torchao]'"),
    inputs=_inputs,
)

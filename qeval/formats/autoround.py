"""AutoRound's own method name over the packings of others: `packing_format` says whose.

Source: the format names of auto_round/inference/backend.py: `auto_gptq` stores zero points less one, the others do not.
"""

from qeval.errors import UsageError, unknown
from qeval.formats import awq, gptq
from qeval.formats.base import CheckpointFormat, Config, DecodedMatrix, Module
from qeval.formats.rounding import TensorRounding, no_format

_PACKINGS = {
    "auto_round:auto_gptq": "gptq",
    "auto_round:gptqmodel": "gptq_v2",
    "auto_round": "gptq_v2",
    "auto_round:auto_awq": "awq",
}
_FLOAT_BITS = 16


def _decode(module: Module, config: Config) -> DecodedMatrix:
    """Decode a linear in the packing that the configuration names."""
    packing = _packing(config)
    if packing == "awq":
        return awq.decode_gemm(module, config)
    return gptq.decode_gptq(module, config, offset=packing == "gptq")


def _notes(config: Config) -> tuple[str, ...]:
    """Return whose packing it is.

    Raises:
        UsageError: One that is not read, or weights that are no integers.
    """
    if config.get("data_type", "int") != "int":
        raise UsageError(f"AutoRound's data type '{config['data_type']}' is not read; only 'int' is.")
    return (f"packed as {_packing(config)}",)


def _inputs(name: str, config: Config) -> TensorRounding | None:
    """Return that inputs are rounded where the configuration has bits for them: AutoRound's words are not read."""
    bits = config.get("act_bits")
    if not isinstance(bits, int) or bits >= _FLOAT_BITS:
        return None
    return no_format(f"{config.get('act_data_type', 'int')} of {bits} bits in AutoRound's words (act_bits)")


def _packing(config: Config) -> str:
    named = str(config.get("packing_format", "auto_round:auto_gptq"))
    if named not in _PACKINGS:
        raise unknown("AutoRound packing", named, _PACKINGS)
    return _PACKINGS[named]


AUTO_ROUND = CheckpointFormat("AutoRound", ("qweight",), _decode, _notes, inputs=_inputs)

"""AutoRound's own method name over the packings of others: `packing_format` says whose.

Source: the format names of auto_round/inference/backend.py: `auto_gptq` stores zero points less one, the others do not.
"""

from qeval.errors import UsageError, unknown
from qeval.formats import awq, gptq
from qeval.formats.base import Config, Format, Matrix, Module

_PACKINGS = {
    "auto_round:auto_gptq": "gptq",
    "auto_round:gptqmodel": "gptq_v2",
    "auto_round": "gptq_v2",
    "auto_round:auto_awq": "awq",
}


def decode(module: Module, config: Config) -> Matrix:
    """The integers of a linear, in the packing that the configuration names."""
    packing = _packing(config)
    if packing == "awq":
        return awq.decode(module, config)
    return gptq.decode_as(module, config, offset=packing == "gptq")


def notes(config: Config) -> tuple[str, ...]:
    """Whose packing it is.

    Raises:
        UsageError: one that is not read, or weights that are no integers.
    """
    if config.get("data_type", "int") != "int":
        raise UsageError(f"AutoRound's data type '{config['data_type']}' is not read; only 'int' is.")
    return (f"packed as {_packing(config)}",)


def _packing(config: Config) -> str:
    named = str(config.get("packing_format", "auto_round:auto_gptq"))
    if named not in _PACKINGS:
        raise unknown("AutoRound packing", named, _PACKINGS)
    return _PACKINGS[named]


FORMAT = Format("AutoRound", ("qweight",), decode, notes)

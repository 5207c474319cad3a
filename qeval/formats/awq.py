"""AutoAWQ's packing (`version: gemm`).

    qweight [columns, rows / 8] int32   eight rows' codes of 4 bits a word, in the order 0 2 4 6 1 3 5 7
    qzeros  [groups, rows / 8] int32    zero points, likewise
    scales  [groups, rows]

Source: `WQLinear_GEMM.from_linear` of awq/modules/linear/gemm.py. The input scales of its search are folded into what
precedes each linear, so norms and the rows of some linears differ from the baseline's by them.
"""

import torch
from torch import Tensor

from qeval.errors import UsageError
from qeval.formats.base import CheckpointFormat, Config, DecodedMatrix, Module, group_size, on_grid, read_bits

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Nibble i of a word, the lowest first, is the code of row ORDER[i] of the word's eight."""
_BITS = 4


def decode_gemm(module: Module, config: Config) -> DecodedMatrix:
    """Decode the integers of a linear."""
    if module.rows % len(ORDER):
        raise module.error(f"has {module.rows} rows, which words of {len(ORDER)} codes do not hold")
    words = module.rows // len(ORDER)
    codes = _unshuffle(module.part("qweight", shape=(module.columns, words)))
    scales = module.part("scales", shape=(None, module.rows))
    zeros = _unshuffle(module.part("qzeros", shape=(scales.shape[0], words)))
    wanted = config.get("group_size", config.get("q_group_size"))
    return on_grid(codes.t(), scales.t(), zeros.t(), _BITS, group_size(module, scales.shape[0], wanted))


def _notes(config: Config) -> tuple[str, ...]:
    """Return that gemm's layout is read.

    Raises:
        UsageError: Another layout or width.
    """
    version = str(config.get("version", config.get("format", "gemm"))).lower()
    bits = config.get("bits", config.get("w_bit", _BITS))
    if version != "gemm" or bits != _BITS:
        raise UsageError(
            f"AWQ is read at 4 bits in the layout 'gemm', not {bits} bits in '{version}'; save it as gemm."
        )
    return ("layout gemm; input scales are folded into what precedes each linear",)


def _unshuffle(words: Tensor) -> Tensor:
    nibbles = read_bits(words, _BITS, words.shape[1] * len(ORDER)).reshape(len(words), -1, len(ORDER))
    return nibbles[..., torch.argsort(torch.tensor(ORDER))].reshape(len(words), -1)


AWQ = CheckpointFormat("AutoAWQ", ("qweight",), decode_gemm, _notes)

"""Which groups of linears get the high bit width: measured sensitivity under a size budget, or by position."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from qeval.errors import QevalError, UsageError

POSITIONAL_KINDS = ("v_proj", "down_proj")


class Option(NamedTuple):
    """One group at its two bit widths: bits on disk, and mean KL (nats) with the group alone quantized."""

    low_bits: int
    high_bits: int
    low_kl: float
    high_kl: float


def positional_layers(layers: int) -> set[int]:
    """The layers that get INT8 by their position: the first and last eighth, and every third between.

    The rule of llama.cpp's `use_more_bits` and of NVIDIA Model Optimizer's mixed precision, as published.

    >>> sorted(positional_layers(30))
    [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29]
    """
    eighth = layers // 8
    return {layer for layer in range(layers) if layer < eighth or layer >= layers - eighth or (layer - eighth) % 3 == 0}


def positional_names(names: Iterable[str], layers: int, last: Mapping[int, Sequence[str]] | None = None) -> set[str]:
    """The weights that the positional rule gives INT8: v_proj and down_proj of its layers, every expert's too.

    `last`: what each layer multiplies by last, by layer; it stands for them in a model that names neither.

    Raises:
        UsageError: none of these is among `names`, so the rule does not apply.
    """
    every, chosen = set(names), positional_layers(layers)
    pattern = re.compile(rf"\.(\d+)\..*\b({'|'.join(POSITIONAL_KINDS)})(\.weight|\[\d+\])$")
    found = {name for name in every if (match := pattern.search(name)) and int(match[1]) in chosen}
    found = found or {name for layer in chosen for name in (last or {}).get(layer, ()) if name in every}
    if not found:
        raise UsageError(
            "The positional rule gives INT8 to v_proj and down_proj, and this model has neither; "
            "take --importance measured with a --budget."
        )
    return found


def choose_high(options: Sequence[Option], budget_bits: int) -> list[bool]:
    """Which groups take the high width so that the summed KL is least within `budget_bits` on disk, all together.

    An integer programme: minimise sum of KL subject to sum of bits <= budget, one 0/1 variable a group (SciPy's HiGHS).

    Raises:
        UsageError: the budget is below the smallest or above the largest possible size.
        QevalError: the solver gave up.
    """
    smallest, largest = sum(o.low_bits for o in options), sum(o.high_bits for o in options)
    if not smallest <= budget_bits <= largest:
        side = "below the smallest" if budget_bits < smallest else "above the largest"
        raise UsageError(f"The budget of {budget_bits} bits is {side} possible size ({smallest} to {largest} bits).")
    gain = np.array([max(o.low_kl - o.high_kl, 0.0) for o in options])
    cost = np.array([float(o.high_bits - o.low_bits) for o in options])
    unit = max(cost.max(), 1.0)  # 1: no choice costs anything
    result = milp(
        -gain / max(gain.max(), 1e-300),
        integrality=np.ones(len(options), dtype=np.int64),
        bounds=Bounds(0, 1),
        constraints=LinearConstraint(cost / unit, ub=(budget_bits - smallest) / unit),
    )
    if not result.success:
        raise QevalError(
            "The solver of the integer programme found no widths for a budget that has some "
            f"({' '.join(str(result.message).split())}); mix by --importance positional, or by another --budget."
        )
    return [bool(round(value)) for value in result.x]

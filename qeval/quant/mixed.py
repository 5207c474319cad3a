"""The groups of linears that get the high bit width: by measured sensitivity under a size budget, or by position."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from qeval.errors import QevalError, UsageError
from qeval.quant.knapsack import check_budget

POSITIONAL_KINDS = ("v_proj", "down_proj")


class WidthOption(NamedTuple):
    """One group at its two bit widths: bits on disk, and mean KL (nats) with the group alone quantized."""

    low_bits: int
    high_bits: int
    low_kl: float
    high_kl: float


def positional_layers(layers: int) -> set[int]:
    """Return the layers that get INT8 by their position: the first and last eighth, and every third between.

    The rule of llama.cpp's `use_more_bits` and of NVIDIA Model Optimizer's mixed precision, as published.

    >>> sorted(positional_layers(30))
    [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29]
    """
    eighth = layers // 8
    return {layer for layer in range(layers) if layer < eighth or layer >= layers - eighth or (layer - eighth) % 3 == 0}


def positional_names(names: Iterable[str], layers: int, last: Mapping[int, Sequence[str]] | None = None) -> set[str]:
    """Return the weights that the positional rule gives INT8: v_proj and down_proj of its layers, every expert's too.

    Args:
        names: The weights that may get it.
        layers: How many layers the model has.
        last: What each layer multiplies by last, by layer; used in a model that has neither v_proj nor down_proj.

    Raises:
        UsageError: None of these is among `names`, so the rule does not apply.
    """
    candidates, chosen = set(names), positional_layers(layers)
    pattern = re.compile(rf"\.(\d+)\..*\b({'|'.join(POSITIONAL_KINDS)})(\.weight|\[\d+\])$")
    high = {name for name in candidates if (match := pattern.search(name)) and int(match[1]) in chosen}
    high = high or {name for layer in chosen for name in (last or {}).get(layer, ()) if name in candidates}
    if not high:
        raise UsageError(
            "The positional rule gives INT8 to v_proj and down_proj, and this model has neither; "
            "take --importance measured with a --budget."
        )
    return high


def choose_high(options: Sequence[WidthOption], budget_bits: int) -> list[bool]:
    """Choose the groups that take the high width, so that the summed KL is least under a budget.

    An integer programme: minimise sum of KL subject to sum of bits <= budget, one 0/1 variable a group (SciPy's HiGHS).

    Args:
        options: Every group at both widths.
        budget_bits: What all groups may take on disk together.

    Raises:
        UsageError: The budget is below the smallest or above the largest possible size.
        QevalError: The solver gave up.
    """
    smallest, largest = sum(o.low_bits for o in options), sum(o.high_bits for o in options)
    check_budget(budget_bits, smallest, largest)

    # bits and nats are scaled to about 1, as the solver's tolerances are absolute
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

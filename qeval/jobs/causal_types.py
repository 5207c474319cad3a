"""`qeval models --check --all`: every causal model type of transformers, tiny and random.

Each is scored in each way that qeval has and by full forward passes. It agrees, is refused in a sentence, or can't be
built here, with the reason. One that gives other scores, or fails in another way, is a fault. What else it can be used
for is told beside (`type_uses`), for scoring does not need that.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from qeval.backends.base import Prefix, Session
from qeval.backends.prefix import is_lent, prefix_cache
from qeval.backends.sharing import Sharing
from qeval.backends.torch import TorchSession
from qeval.errors import QevalError, first_line
from qeval.jobs.type_uses import FAULT, ON_EXPORT, USES, WORKS, try_uses
from qeval.models.silence_transformers import quiet
from qeval.models.structure.graph import describe_model
from qeval.models.structure.supported import check_supported, support_notes
from qeval.models.tiny import TINY_VOCABULARY, tiny_config, tiny_model
from qeval.progress import Progress
from qeval.types import Request, TokenIds

TypeOutcome = Literal["agrees", "refused", "not buildable", "wrong", "crash"]
OUTCOMES: tuple[TypeOutcome, ...] = ("agrees", "refused", "not buildable", "wrong", "crash")
PrefixUse = Literal["lent", "copied", "stepwise", "whole", ""]
"""The way to continue a prefix: keys and values lent, a copy of its state, that a token at a time, none."""
ALLOWED_NATS = 1e-4
"""What a token's log-probability may differ by from that of a full forward pass."""
_OUTER, _PREFIX, _RESTS, _WINDOWS = 10, 23, (11, 1, 6), (40, 24, 33)
"""Tokens of a prefix, of one that continues it, of what continues both, and of windows: most are longer than the tiny
models' windows, chunks and sparse attention's choices of 8."""
_BATCH = 12
"""Types that one process goes through: what they leave in memory ends with it."""


@dataclass(frozen=True)
class TypeRow:
    """The result of one model type.

    `line` is the largest difference in nats, or the reason; `prefix` what sequences with a common prefix share;
    `quantizing` what can't be quantized, where anything is told of it; `uses` whether each of `USES` works, or why not,
    where scores agree.
    """

    model_type: str
    outcome: TypeOutcome
    line: str
    prefix: PrefixUse = ""
    quantizing: str = ""
    uses: Mapping[str, str] = field(default_factory=dict)


def check_type(model_type: str) -> TypeRow:
    """Return how qeval's scores of a tiny model of a type compare with full forward passes."""
    try:
        with quiet():
            check_supported(CONFIG_MAPPING[model_type](), Path(model_type))
    except QevalError as error:
        return TypeRow(model_type, "refused" if _is_built(model_type) else "not buildable", str(error))
    except Exception as error:  # noqa: BLE001 - its own default configuration can't be made
        reason = f"its own configuration can't be made ({type(error).__name__}: {first_line(error)})"
        return TypeRow(model_type, "not buildable", reason)
    try:
        model = tiny_model(tiny_config(model_type))
    except QevalError as error:
        return TypeRow(model_type, "not buildable", str(error))
    try:
        with quiet():
            session = TorchSession(model)
            off = _difference(model, session)
            quantizing = _quantizing(model)
    except QevalError as error:
        return TypeRow(model_type, "refused", str(error))
    except Exception as error:  # noqa: BLE001 - whatever a model's code raises is its row's
        return TypeRow(model_type, "crash", f"{type(error).__name__}: {first_line(error)}")
    outcome: TypeOutcome = "agrees" if off <= ALLOWED_NATS else "wrong"
    uses = try_uses(model) if outcome == "agrees" else {}
    return TypeRow(model_type, outcome, f"{off:.1e} nats", _prefix_use(session.sharing, model), quantizing, uses)


def _is_built(model_type: str) -> bool:
    """Return whether transformers makes a causal model of a type's own configuration."""
    try:
        with quiet(), torch.device("meta"):
            AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type]())
    except Exception:  # noqa: BLE001 - whatever a model's code raises
        return False
    return True


def check_types(names: Sequence[str], progress: Progress) -> list[TypeRow]:
    """Go through model types, some in one process at a time.

    Args:
        names: Of `CAUSAL_TYPES`.
        progress: Is told of each type that is done.
    """
    found = []
    with progress.phase("check model types", len(names)) as advance:
        for start in range(0, len(names), _BATCH):
            for row in _in_a_process(names[start : start + _BATCH]):
                found.append(row)
                advance(1)
    return found


def lines_of(rows: Sequence[TypeRow]) -> list[str]:
    """Return the rows as the lines of a table, and a last line of how many came to what."""
    head = ("model type", "outcome", "prefix", *USES, "largest difference, or why", "quantizing")
    cells = [
        (
            row.model_type,
            row.outcome,
            row.prefix,
            *(use_mark(row.uses.get(use)) for use in USES),
            row.line,
            row.quantizing,
        )
        for row in rows
    ]
    widths = [max(map(len, column)) for column in list(zip(head, *cells, strict=True))[:-2]]
    table = [_table_line(each, widths) for each in (head, [*("-" * width for width in widths), "---", "---"], *cells)]
    counts = Counter(row.outcome for row in rows)
    totals = ", ".join(f"{counts[outcome]} {outcome}" for outcome in OUTCOMES)
    reasons = [f"{', '.join(types)}: {line}" for line, types in use_reasons(rows).items()]
    return [*table, "", *reasons, "", f"{len(rows)} causal model types: {totals}."]


def use_reasons(rows: Iterable[TypeRow]) -> dict[str, list[str]]:
    """Return the sentences on uses that don't work, each with the types and uses that it is said of."""
    found: dict[str, dict[str, list[str]]] = {}
    for row in rows:
        for use, line in row.uses.items():
            if line not in (WORKS, ON_EXPORT):
                found.setdefault(line, {}).setdefault(row.model_type, []).append(use)
    return {line: [f"{name} ({'/'.join(uses)})" for name, uses in types.items()] for line, types in found.items()}


def use_mark(line: str | None) -> str:
    """Return what a table shows of a use."""
    if line is None:
        return ""
    if line.startswith(FAULT):
        return "NO"
    return line if line in (WORKS, ON_EXPORT) else "-"


def _table_line(cells: Sequence[str], widths: Sequence[int]) -> str:
    padded = [cell.ljust(width) for cell, width in zip(cells, widths, strict=False)]
    return f"| {' | '.join([*padded, *cells[len(widths) :]])} |"


def any_fault(rows: Iterable[TypeRow]) -> bool:
    """Return whether any type gives other scores, or fails without a sentence."""
    return any(
        row.outcome in ("wrong", "crash") or any(line.startswith(FAULT) for line in row.uses.values()) for row in rows
    )


def _in_a_process(names: Sequence[str]) -> Iterator[TypeRow]:
    """Yield the rows of some types; where the process is killed, each is tried in one of its own."""
    try:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            yield from [*pool.map(check_type, names)]
    except BrokenProcessPool:
        if len(names) == 1:
            yield TypeRow(names[0], "crash", "its process was killed")
        else:
            for name in names:
                yield from _in_a_process([name])


def _prefix_use(sharing: Sharing, model: Any) -> PrefixUse:
    if not sharing.prefixes:
        return "whole"
    if sharing.stepwise:
        return "stepwise"
    return "lent" if is_lent(prefix_cache(model)) else "copied"


def _quantizing(model: Any) -> str:
    """Return why a model can't be quantized, or what of it stays in float; nothing where all is quantized."""
    try:
        return " ".join(support_notes(model, describe_model(model)))
    except QevalError as error:
        return str(error)
    except Exception as error:  # noqa: BLE001 - scoring does not need it
        return f"It can't be described ({type(error).__name__}: {first_line(error)})."


@torch.inference_mode()
def _difference(model: Any, session: Session) -> float:
    """Return the largest difference of a token's log-probability between qeval's scores and full forward passes."""
    return max(_of_windows(model, session), _of_prefix(model, session))


def _of_windows(model: Any, session: Session) -> float:
    """Score windows of unequal length in one batch."""
    windows = [_tokens(count, seed=count) for count in _WINDOWS]
    states = session.states([Request(window, tuple(range(len(window)))) for window in windows])
    return max(_off(session, s, _full(model, window)) for s, window in zip(states, windows, strict=True))


def _of_prefix(model: Any, session: Session) -> float:
    """Score continuations of a prefix that ran once, itself after another, and of that other one after them."""
    outer, inner = _tokens(_OUTER, seed=2), _tokens(_PREFIX, seed=1)
    kept = session.prefill(outer)
    return max(
        _of_rests(model, session, outer + inner, session.prefill(inner, kept)), _of_rests(model, session, outer, kept)
    )


def _of_rests(model: Any, session: Session, before: TokenIds, prefix: Prefix) -> float:
    rests = [_tokens(count, seed=10 + count) for count in _RESTS]
    states = session.states([Request(rest, tuple(range(len(rest)))) for rest in rests], prefix)
    full = [_full(model, before + rest)[len(before) :] for rest in rests]
    return max(_off(session, s, expected) for s, expected in zip(states, full, strict=True))


def _off(session: Session, states: Tensor, expected: Tensor) -> float:
    found = torch.log_softmax(session.logits(states).double(), -1)
    return float((found - torch.log_softmax(expected.double(), -1)).abs().max())


def _full(model: Any, tokens: tuple[int, ...]) -> Tensor:
    logits: Tensor = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]
    return logits


def _tokens(count: int, seed: int) -> tuple[int, ...]:
    drawn = torch.randint(3, TINY_VOCABULARY - 16, (count,), generator=torch.Generator().manual_seed(seed))
    return tuple(drawn.tolist())

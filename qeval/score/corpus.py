"""One pass a corpus: every token metric from the same forward pass, against the baseline's cached states."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray
from torch import Tensor

from qeval.backends.base import Session
from qeval.backends.memory import with_fitting_blocks
from qeval.metrics.tokens import Logits, distance, model_numbers
from qeval.progress import Advance
from qeval.score.schedule import windows_schedule
from qeval.store.schema import TOKENS_SCHEMA, constant_column
from qeval.tasks.windows import Window
from qeval.types import Call, Request, Sampler

METRICS_VERSION = 4
"""Part of every key: raise it when a metric's definition changes."""


_SHARD_TOKENS = 4096


@dataclass(frozen=True)
class Shard:
    """Consecutive windows of a corpus, the first of them number `first`: what one job scores."""

    first: int
    windows: tuple[Window, ...]

    @property
    def tokens(self) -> int:
        """Tokens to run."""
        return sum(window.run_length for window in self.windows)

    def key(self) -> dict[str, Any]:
        """Return what of it changes numbers: the token ids and the positions that are scored."""
        return {
            "first": self.first,
            "windows": [[w.tokens, w.kl_positions, w.nll_positions] for w in self.windows],
        }


def shards_of(windows: Sequence[Window]) -> tuple[Shard, ...]:
    """Return windows in runs of about 4,096 tokens, whatever the batch size, so that finished rows are found again."""
    per_shard = max(1, _SHARD_TOKENS // max(len(window.tokens) for window in windows))
    return tuple(Shard(i, tuple(windows[i : i + per_shard])) for i in range(0, len(windows), per_shard))


def state_positions(window: Window) -> list[int]:
    """Return the positions whose states a window's rows need: those compared, and those that predict a scored token."""
    return sorted({*window.kl_positions, *(position - 1 for position in window.nll_positions)})


def window_calls(windows: Sequence[Window], batch_tokens: int) -> list[Call]:
    """Return what `window_states` will ask its session for, in order."""
    requests = [Request(tuple(w.tokens[: w.run_length]), tuple(state_positions(w))) for w in windows]
    return windows_schedule(requests, batch_tokens)


def window_states(session: Session, windows: Sequence[Window], batch_tokens: int, advance: Advance) -> Tensor:
    """Return the final states [positions of all windows, width], where the session makes them.

    A batch holds at most `batch_tokens`; `advance` is told the tokens of each batch.
    """
    parts: list[Tensor] = []
    for call in window_calls(windows, batch_tokens):
        parts += session.states(call.requests)
        advance(sum(len(request.tokens) for request in call.requests))
    return parts[0] if len(parts) == 1 else torch.cat(parts)  # rows of logits may take gigabytes


def baseline_columns(session: Session, shard: Shard, states: Tensor, names: dict[str, str]) -> dict[str, Any]:
    """Return the baseline's own token rows; `names` holds `variant`, `backend` and `corpus`."""
    own = with_fitting_blocks(session, partial(model_numbers, session.logits, states, state_targets(shard.windows)))
    return token_columns(shard, names, {"log_p": own.log_p, "entropy_nats": own.entropy_nats})


def variant_columns(
    base_logits: Logits,
    base_states: Tensor,
    session: Session,
    states: Tensor,
    shard: Shard,
    names: dict[str, str],
    twin: tuple[Logits, Tensor] | None = None,
    sampling: Sampler | None = None,
) -> dict[str, Any]:
    """Return a variant's token rows, compared with the baseline's distributions at the same positions.

    The states of both sides are [positions of all windows, width]; so are those of `twin`, the same weights on
    another backend, whose distance goes to `kernel_kl_nats`. `sampling`: a sampler to compare under.
    """
    sides = (base_logits, base_states, session.logits, states)
    compared = with_fitting_blocks(
        session, partial(distance, *sides, state_targets(shard.windows), twin=twin, sampling=sampling)
    )
    values = {
        "log_p": compared.numbers.log_p,
        "entropy_nats": compared.numbers.entropy_nats,
        "delta_p": compared.numbers.log_p.exp() - compared.base_log_p.exp(),
        "kl_nats": compared.kl_nats,
        "reverse_kl_nats": compared.reverse_kl_nats,
        "kl_abs_modelopt": compared.kl_abs_modelopt,
        "top1_agreement": compared.top1_agreement,
        "overlap": compared.overlap,
        **{f"top{k}_agreement": share for k, share in compared.topk_agreement.items()},
    }
    if compared.twin_kl_nats is not None:
        values["kernel_kl_nats"] = compared.twin_kl_nats
    if compared.sampling_kl_nats is not None and compared.outside_nucleus is not None:
        values |= {"sampling_kl_nats": compared.sampling_kl_nats, "outside_nucleus": compared.outside_nucleus}
    return token_columns(shard, names, values)


def state_targets(windows: Sequence[Window]) -> Tensor:
    """Return for every state the token it predicts, or -1 where that token is not scored."""
    targets: list[int] = []
    for window in windows:
        scored = set(window.nll_positions)
        targets += [window.tokens[p + 1] if p + 1 in scored else -1 for p in state_positions(window)]
    return torch.tensor(targets)


def token_columns(shard: Shard, names: dict[str, str], values: dict[str, Tensor]) -> dict[str, Any]:
    """Make rows from states: what a state predicts goes to the next token's row, what it is compared in to its own.

    Args:
        shard: The windows whose rows they are.
        names: `variant`, `backend` and `corpus`.
        values: Columns by state, `log_p` of the predicted token among them; those of the schema that lack are null.
    """
    rows = _Layout(shard)
    arrays = {name: value.cpu().numpy() for name, value in values.items()}
    columns: dict[str, Any] = {name: constant_column(value, len(rows.position)) for name, value in names.items()}
    columns |= {"window": rows.window, "position": rows.position, "token": rows.token}
    columns["nll"] = rows.predicted(-arrays.pop("log_p"))
    if "delta_p" in arrays:
        columns["delta_p"] = rows.predicted(arrays.pop("delta_p"))
    columns |= {name: rows.compared(value) for name, value in arrays.items()}
    if "top1_agreement" in arrays and arrays["top1_agreement"].dtype.kind == "f":
        # NaN where an endpoint's likeliest token is not known
        agrees = columns["top1_agreement"]
        columns["top1_agreement"] = pc.if_else(pc.is_nan(agrees), None, agrees).cast(pa.bool_())
    empty = {
        field.name: pa.nulls(len(rows.position), field.type) for field in TOKENS_SCHEMA if field.name not in columns
    }
    return columns | empty


class _Layout:
    """The places of a shard's rows in its states, as indices into all states; -1 for none."""

    def __init__(self, shard: Shard) -> None:
        window, position, token, own, previous = [], [], [], [], []
        start = 0
        for number, w in enumerate(shard.windows, shard.first):
            index = {p: start + i for i, p in enumerate(state_positions(w))}
            start += len(index)
            compared, scored = set(w.kl_positions), set(w.nll_positions)
            for p in sorted(compared | scored):
                window.append(number)
                position.append(p)
                token.append(w.tokens[p])
                own.append(index[p] if p in compared else -1)
                previous.append(index[p - 1] if p in scored else -1)
        self.window, self.position, self.token = (np.array(x, dtype=np.int32) for x in (window, position, token))
        self._own, self._previous = np.array(own), np.array(previous)

    def compared(self, values: NDArray[Any]) -> pa.Array:
        """Return `values` by state, at the rows whose own distribution is compared; null elsewhere."""
        return pa.array(values[self._own], mask=self._own < 0)

    def predicted(self, values: NDArray[Any]) -> pa.Array:
        """Return `values` by state, at the rows whose token the state predicts; null elsewhere."""
        return pa.array(values[self._previous], mask=self._previous < 0)

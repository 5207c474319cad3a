"""Split a variant's loss on the baseline's answers: by kind of prompt, language, part of the answer, and place in it.

Intervals resample conversations, those of the mean over languages the languages.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from qeval.report.align import Mask, TokenRows
from qeval.report.measure_tokens import KL_LEVELS
from qeval.report.model import AnswerGroup, GroupedBy, Metric, Metrics
from qeval.stats import estimates
from qeval.stats.bootstrap import Clusters, Floats, Ints
from qeval.store.run import ChatRecord, RunRecord
from qeval.types import Better

PREFIX = "chat_"
"""Before the names of metrics of the answers alone."""
OVER_LANGUAGES = "all, each as one"
_BUCKETS = (16, 64, 256)
"""Tokens at which the buckets of places in an answer end; the last has no end."""
_MEANS: dict[str, tuple[str, Better]] = {"kl_nats": ("nats", "lower"), "top1_agreement": ("fraction", "higher")}


class _Group(NamedTuple):
    """Some of the answers' tokens: by what, its name, and which rows' KL and NLL are of it, [rows] each."""

    by: GroupedBy
    name: str
    kl: Mask
    nll: Mask


def in_answers(rows: TokenRows, chat: ChatRecord) -> Mask:
    """Return which token rows are of answers, [rows]."""
    return np.isin(rows.windows, [answer.window for answer in chat.answers])


def chat_metrics(rows: TokenRows, baseline: TokenRows, chat: ChatRecord, run: RunRecord) -> Metrics:
    """Return the metrics of the answers alone, whatever else was scored; none where rows are not finite."""
    mask = in_answers(rows, chat)
    metrics = _metrics(rows, baseline, _Group("part", "", mask, mask), run)
    scored = mask & rows.scored["kl_nats"]
    if "kl_nats" in metrics:
        level, clusters = KL_LEVELS["kl_nats_p99"], Clusters.of(rows.clusters_of_rows[scored])
        (tail,) = estimates.quantiles(
            rows.values["kl_nats"][scored], [level], clusters, unit="nats", better="lower", seed=run.seed
        )
        metrics["kl_nats_p99"] = Metric.of(tail)
    return {f"{PREFIX}{name}": metric for name, metric in metrics.items()}


def answer_groups(rows: TokenRows, baseline: TokenRows, chat: ChatRecord, run: RunRecord) -> list[AnswerGroup]:
    """Return the loss in each group of answers and of their tokens; none where rows are not finite or in one group."""
    found = [AnswerGroup(by=g.by, name=g.name, metrics=_metrics(rows, baseline, g, run)) for g in _groups(rows, chat)]
    by_what = {by: [group for group in found if group.by == by] for by in dict.fromkeys(group.by for group in found)}
    groups = [group for of in by_what.values() if len(of) > 1 for group in of]
    if len(by_what.get("language", [])) > 1 and (macro := _over_languages(rows, chat, run)):
        at = max(place for place, group in enumerate(groups) if group.by == "language")
        groups.insert(at + 1, AnswerGroup(by="language", name=OVER_LANGUAGES, metrics=macro))
    return [group for group in groups if group.metrics]


def _groups(rows: TokenRows, chat: ChatRecord) -> Iterator[_Group]:
    """Yield the groups that hold any token, those of one kind together."""
    place = _places(rows, chat)
    mask = place >= 0
    kinds: dict[GroupedBy, list[str]] = {
        "kind": [answer.kind for answer in chat.answers],
        "language": [answer.language for answer in chat.answers],
    }
    for by, names in kinds.items():
        of_row = np.asarray(names, np.object_)[place]
        for name in dict.fromkeys(names):
            inside = mask & (of_row == name)
            yield from _unless_empty(rows, _Group(by, name, inside, inside))

    # a row's NLL is of its own token, its KL of the next one
    first, final = (np.asarray([getattr(a, end) for a in chat.answers])[place] for end in ("first", "final"))
    for name, says in (("thinking", True), ("final", False)):
        kl, nll = (mask & ((rows.positions + ahead < final) == says) for ahead in (1, 0))
        yield from _unless_empty(rows, _Group("part", name, kl, nll))
    for low, high in zip((0, *_BUCKETS), (*_BUCKETS, None), strict=True):
        token_of_kl, token_of_nll = rows.positions + 1 - first, rows.positions - first
        kl, nll = (mask & (token >= low) & (token < (high or np.inf)) for token in (token_of_kl, token_of_nll))
        yield from _unless_empty(rows, _Group("token", f"{low + 1} to {high}" if high else f"from {low + 1}", kl, nll))


def _unless_empty(rows: TokenRows, group: _Group) -> Iterator[_Group]:
    if (group.kl & rows.scored["kl_nats"]).any() or (group.nll & rows.scored["nll"]).any():
        yield group


def _places(rows: TokenRows, chat: ChatRecord) -> Ints:
    """Return the index of each row's answer, -1 where it is of none, [rows]."""
    of_window = {answer.window: place for place, answer in enumerate(chat.answers)}
    windows, inverse = np.unique(rows.windows, return_inverse=True)
    return np.asarray([of_window.get(int(window), -1) for window in windows], np.int64)[inverse.ravel()]


def _metrics(rows: TokenRows, baseline: TokenRows, group: _Group, run: RunRecord) -> Metrics:
    """Return the means over a group's tokens."""
    metrics: Metrics = {}
    if "kl" in run.metrics:
        for name, (unit, better) in _means(rows).items():
            values, clusters = _of(rows, rows.values[name], group.kl & rows.scored[name])
            if not np.isfinite(values).all():
                return {}
            metrics[name] = Metric.of(estimates.mean(values, clusters, unit=unit, better=better, seed=run.seed))
    if "ppl" in run.metrics:
        scored = group.nll & rows.scored["nll"]
        (nll, clusters), (base, _) = _of(rows, rows.values["nll"], scored), _of(rows, baseline.values["nll"], scored)
        if not np.isfinite(nll).all():
            return {}
        metrics["ppl_ratio"] = Metric.of(estimates.perplexity_ratio(nll, base, clusters, seed=run.seed))
    return metrics


def _means(rows: TokenRows) -> dict[str, tuple[str, Better]]:
    """Return the metrics that are means of columns; of an endpoint's rows KL is none of them."""
    return {name: kind for name, kind in _MEANS.items() if not (rows.is_bounded and name == "kl_nats")}


def _of(rows: TokenRows, values: Floats, mask: Mask) -> tuple[Floats, Clusters]:
    return values[mask], Clusters.of(rows.clusters_of_rows[mask])


def _over_languages(rows: TokenRows, chat: ChatRecord, run: RunRecord) -> Metrics:
    """Return the mean of the languages' own means, each language a cluster."""
    if "kl" not in run.metrics:
        return {}
    metrics: Metrics = {}
    place = _places(rows, chat)
    languages = np.unique([answer.language for answer in chat.answers], return_inverse=True)[1].ravel()
    for name, (unit, better) in _means(rows).items():
        scored = (place >= 0) & rows.scored[name]
        values, clusters = rows.values[name][scored], Clusters.of(languages[place[scored]])
        if not np.isfinite(values).all():
            return {}
        metrics[name] = Metric.of(estimates.macro_mean(values, clusters, unit=unit, better=better, seed=run.seed))
    return metrics

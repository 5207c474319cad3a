"""Check that a run's baseline can be a model at all, and a variant one of it: what no comparison may hide.

A baseline whose numbers are not finite, or that answers the same whatever it is asked, agrees with anything.
"""

import hashlib
from math import log

import numpy as np

from qeval.report.align import DriftRows, ItemRows, TokenRows
from qeval.report.independent import is_first_question
from qeval.report.run_rows import PairedRun
from qeval.stats.bootstrap import Floats
from qeval.store.run import TaskRecord, VariantRecord

NO_BASELINE = "Nothing can be compared with this baseline."
_SAME_NATS = 1e-6
"""Entropies and log-likelihoods that differ by no more over a whole run are one number: contexts differ by far more."""


def impossible_baseline(run: PairedRun) -> str | None:
    """Return why a run's baseline can be no model, in a sentence; None where nothing speaks against it."""
    reasons = []
    if run.protocol:
        reasons.append(impossible_tokens(run.baseline_tokens, run.record.model.vocab_size))
    reasons += [impossible_answers(task, run.baseline_items(task)) for task in run.record.tasks if task.items]
    if run.record.drift:
        reasons.append(impossible_continuations(run.baseline_drift))
    if run.record.needle and (bad := _not_finite(run.baseline_needles.log_p)):
        reasons.append(f"Answers to needles that are not finite: {bad} of {run.baseline_needles.log_p.size}.")
    return next((f"{NO_BASELINE} {reason}" for reason in reasons if reason), None)


def impossible_tokens(rows: TokenRows, vocabulary: int | None) -> str | None:
    """Return what of a baseline's token rows no model gives."""
    for column, what in (("nll", "ppl"), ("entropy_nats", "entropy_nats")):
        if column in rows.values and (bad := _not_finite(rows.of(column))):
            return f"Values that are not finite: {what} ({bad} of {rows.of(column).size})."
    if "entropy_nats" not in rows.values or rows.of("entropy_nats").size < 2:
        return None
    entropy = rows.of("entropy_nats")
    if float(np.abs(entropy).max()) <= _SAME_NATS:
        return f"It is certain of one token at each of {entropy.size:,} positions (its entropy is 0 everywhere)."
    if float(np.ptp(entropy)) > _SAME_NATS:
        return None
    everywhere = f"at each of {entropy.size:,} positions"
    if vocabulary is not None and abs(float(entropy[0]) - log(vocabulary)) < 1e-3:
        return f"It gives every token the same probability {everywhere} (its entropy is that of {vocabulary:,} tokens)."
    return f"It gives the same distribution {everywhere} (its entropy is {entropy[0]:.6f} nats everywhere)."


def impossible_answers(task: TaskRecord, rows: ItemRows) -> str | None:
    """Return what of a baseline's answers to a task no model gives."""
    if bad := int(rows.non_finite().sum()):
        return f"Values that are not finite: {task.name}_acc ({bad} of {len(rows.items)})."
    distinct = rows.select(is_first_question(rows.prompts))
    counts = distinct.counts()
    if len(counts) < 2 or (counts != counts[0]).any():
        return None
    if float(np.ptp(distinct.choices.reshape(len(counts), -1), axis=0).max()) > _SAME_NATS:
        return None
    return (
        f"It gives the same log-likelihoods to the choices of all {len(counts):,} distinct questions of {task.title}."
    )


def impossible_continuations(rows: DriftRows) -> str | None:
    """Return what of a baseline's greedy continuations no model gives."""
    if len(rows.tokens) < 2 or (rows.tokens != rows.tokens[0]).any():
        return None
    return f"It continues all {len(rows.tokens):,} prompts with the same tokens."


def remarks(run: PairedRun) -> list[str]:
    """Return sentences on variants in which nothing is quantized, that are the baseline, or that are another one."""
    reasons = (not_quantized(run, variant) for variant in run.done if variant.role == "variant")
    return [*filter(None, reasons), *_equal_variants(run)]


def not_quantized(run: PairedRun, variant: VariantRecord) -> str | None:
    """Return why a variant is none that quantization made: nothing in it is quantized, or it is the baseline itself."""
    if variant.quantized_weights == 0:
        return f"Nothing in '{variant.name}' is quantized: all its weights are kept in float."
    if _is_baseline(run, variant):
        return (
            f"'{variant.name}' answers exactly as the baseline does, to the last bit of every row: it holds the "
            "baseline's own weights."
        )
    return None


def _is_baseline(run: PairedRun, variant: VariantRecord) -> bool:
    """Return whether no row of a variant differs from the baseline's; not if there are none or some are not finite."""
    same: list[bool] = []
    if run.protocol:
        rows, base = run.tokens(variant), run.baseline_tokens
        if "kl" in run.record.metrics:
            kl = rows.of("kl_lower_bound_nats" if rows.is_bounded else "kl_nats")
            same.append(bool((kl == 0).all()))
        same.append(bool((rows.of("nll") == base.of("nll")).all()))
    same += [
        bool(np.array_equal(run.items(task, variant).choices, run.baseline_items(task).choices))
        for task in run.record.tasks
        if task.items
    ]
    if run.record.drift:
        same.append(bool((run.drift(variant).kl_nats == 0).all()))
    if run.record.needle:
        same.append(bool(np.array_equal(run.needles(variant).log_p, run.baseline_needles.log_p)))
    same += [bool((run.traces(task, variant).values["kl_nats"] == 0).all()) for task in run.traced]
    if not same:
        return _scores_alike(run, variant)
    return all(same)


def _scores_alike(run: PairedRun, variant: VariantRecord) -> bool:
    """Return whether no imported score differs; those of right and wrong alone may be alike by chance: not counted."""
    pairs = [(run.scores(score, variant), run.baseline_scores(score)) for score in run.record.scores]
    telling = [pair for pair in pairs if not pair[1].is_right_or_wrong]
    return bool(telling) and all(np.array_equal(rows.values, base.values) for rows, base in telling)


def _equal_variants(run: PairedRun) -> list[str]:
    """Return sentences on variants that are the same under several names, by their keys or by all of their rows."""
    names: dict[str, list[str]] = {}
    for variant in run.done:
        if variant.role == "variant" and (rows := _rows_sha256(run, variant)):
            names.setdefault(rows, []).append(variant.name)
    return [
        f"{' and '.join(repr(name) for name in group)} give the same rows to the last bit: they are the same weights "
        "under several names, or rows were copied."
        for group in names.values()
        if len(group) > 1
    ]


def _rows_sha256(run: PairedRun, variant: VariantRecord) -> str | None:
    """Return the sha256 of all numbers that a variant gave; None where it gave none, or none but the baseline's."""
    if _is_baseline(run, variant):
        return None
    sha = hashlib.sha256()
    if run.protocol:
        sha.update(run.tokens(variant).of("nll").tobytes())
    for task in run.record.tasks:
        if task.items:
            sha.update(run.items(task, variant).choices.tobytes())
    if run.record.drift:
        sha.update(run.drift(variant).kl_nats.tobytes())
    if run.record.needle:
        sha.update(run.needles(variant).log_p.tobytes())
    for traced in run.traced:
        sha.update(run.traces(traced, variant).values["kl_nats"].tobytes())
    record = run.record
    has_rows = run.protocol or record.tasks or record.drift or record.needle or run.traced
    return sha.hexdigest() if has_rows else None


def _not_finite(values: Floats) -> int:
    return int(np.count_nonzero(~np.isfinite(values)))

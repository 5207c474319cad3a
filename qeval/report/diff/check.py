"""Check that two runs can be paired: the same baseline, on the same tokens, asked the same questions."""

import numpy as np

from qeval.errors import BrokenRecordError, UsageError
from qeval.report.align import QUESTION_PARTS, ItemRows, TokenRows, first_difference
from qeval.report.run_rows import PairedRun
from qeval.report.score_rows import pair_scores
from qeval.stats.bootstrap import Floats
from qeval.store.run import ScoreRecord, TaskRecord

TOLERANCE_NATS = 1e-3
"""By how much one log-likelihood of the two baselines may differ: machines and versions round differently."""


def same_weights(a: PairedRun, b: PairedRun) -> None:
    """Refuse runs of different models.

    Raises:
        UsageError: the baselines are other weights.
    """
    mine, other = a.record.model, b.record.model
    if (a.record.imported or b.record.imported) and mine.name != other.name:
        raise UsageError(
            f"The baselines differ: '{a.folder}' compares with {mine.name} and '{b.folder}' with {other.name}, and no "
            "weights of an imported run are known; a diff needs one model."
        )
    if a.record.imported or b.record.imported:
        return
    if mine.weights_sha256 != other.weights_sha256:
        raise UsageError(
            f"The baselines differ: '{a.folder}' was made from {mine.name} (weights {mine.weights_sha256[:12]}) and "
            f"'{b.folder}' from {other.name} (weights {other.weights_sha256[:12]}); a diff needs one model."
        )


def same_tokens(a: PairedRun, b: PairedRun) -> float:
    """Refuse runs whose baselines were not scored alike on the same tokens; returns the largest difference in nats.

    Raises:
        UsageError: it says whether windows, positions, tokens or log-likelihoods differ, and how many.
    """
    mine, other = a.baseline_tokens, b.baseline_tokens
    p, q = a.record.protocol, b.record.protocol
    names = f"'{a.folder}' ({p.name if p else '-'}) and '{b.folder}' ({q.name if q else '-'})"
    if len(mine.windows) != len(other.windows):
        counts = [len(np.unique(side.windows)) for side in (mine, other)]
        raise UsageError(
            f"The runs were not scored on the same tokens: {names} have {len(mine.windows)} and {len(other.windows)} "
            f"rows in {counts[0]} and {counts[1]} windows; run both on the same corpus, protocol and --max-windows."
        )
    for what in ("windows", "positions", "tokens"):
        differ = int((getattr(mine, what) != getattr(other, what)).sum())
        if differ:
            raise UsageError(
                f"The runs were not scored on the same tokens: {differ} of {len(mine.windows)} {what} of {names} "
                "differ; run both on the same corpus and protocol."
            )
    return _alike(a, b, "log-likelihoods of tokens", *(_nll(side) for side in (mine, other)))


def same_questions(a: PairedRun, b: PairedRun, task: TaskRecord, other: TaskRecord) -> float:
    """Refuse runs whose baselines did not answer the same questions alike; returns the largest difference in nats.

    Raises:
        UsageError: it says whether subjects, questions, prompts or log-likelihoods differ, and how many.
    """
    mine, others = a.baseline_items(task), b.baseline_items(other)
    if len(mine.items) != len(others.items):
        raise UsageError(
            f"The runs were not asked the same {task.name}: '{a.folder}' has {len(mine.items)} questions and "
            f"'{b.folder}' {len(others.items)}; give both the same --limit, --subjects and --mmlu-dir."
        )
    if differs := first_difference(mine, others, QUESTION_PARTS):
        what, count, at = differs
        raise UsageError(
            f"The runs were not asked the same {task.name}: {count} {what} differ, the first at "
            f"question {mine.items[at]} of '{mine.subjects[at]}'; run both on the same questions and --shots."
        )
    return _alike(a, b, f"log-likelihoods of {task.name}", mine.choices, others.choices)


def same_scored(a: PairedRun, b: PairedRun, score: ScoreRecord, other: ScoreRecord) -> None:
    """Refuse runs whose scores of one name are not of the same items, asked alike.

    Raises:
        UsageError: it says what differs.
    """
    if score.better != other.better:
        raise UsageError(f"'{a.folder}' and '{b.folder}' say differently whether more of '{score.name}' is better.")
    mine, others = a.baseline_scores(score), b.baseline_scores(other)
    if len(mine.items) != len(others.items):
        raise UsageError(
            f"'{a.folder}' has {len(mine.items)} items of {score.name} and '{b.folder}' {len(others.items)}; import "
            "the same items into both."
        )
    try:
        pair_scores(others, mine, score.name, str(b.folder))
    except BrokenRecordError as error:
        raise UsageError(str(error)) from error


def finite_tokens(rows: TokenRows, column: str, who: str) -> None:
    """Raise a BrokenRecordError where a column holds NaN or infinite values; it counts them."""
    bad = int((~np.isfinite(rows.of(column))).sum())
    if bad:
        raise BrokenRecordError(f"'{who}' has {bad} of {rows.of(column).size} {column} that are not finite.")


def finite_items(rows: ItemRows, task: str, who: str) -> None:
    """Raise a BrokenRecordError where log-likelihoods are NaN or infinite; it counts them."""
    bad = int(rows.non_finite().sum())
    if bad:
        raise BrokenRecordError(f"'{who}' has {bad} of {len(rows.items)} answers of '{task}' that are not finite.")


def _nll(rows: TokenRows) -> Floats:
    """Return the log-likelihoods by row, 0 where there is none."""
    return rows.values["nll"]


def _alike(a: PairedRun, b: PairedRun, what: str, mine: Floats, other: Floats) -> float:
    apart = np.abs(mine - other)
    largest = float(apart.max()) if apart.size else 0.0
    if np.isfinite(largest) and largest <= TOLERANCE_NATS:
        return largest
    far = int((~(apart <= TOLERANCE_NATS)).sum())
    raise UsageError(
        f"The baselines differ: {far} of {apart.size} {what} are more than {TOLERANCE_NATS:g} nats apart, by up to "
        f"{largest:.3g} ({_how(a)} in '{a.folder}', {_how(b)} in '{b.folder}'); a diff needs one baseline."
    )


def _how(run: PairedRun) -> str:
    return f"{run.record.baseline_label} on {run.backend or '-'}"

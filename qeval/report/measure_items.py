"""From paired answers to metrics. Where a log-likelihood is not finite, nothing of its task is averaged.

Intervals resample subjects. Where there is but one (a task without subjects, one subject's own row), they
resample its questions.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from qeval.report.align import ItemRows, Mask
from qeval.report.independent import is_first_question, question_clusters
from qeval.report.measure_tokens import as_metrics
from qeval.report.model import Flips, GroupScore, Metric, Metrics, TaskResult
from qeval.stats import estimates
from qeval.stats.bootstrap import Clusters, Floats, Ints
from qeval.stats.calibration import expected_calibration_error
from qeval.stats.flips import holm, mcnemar
from qeval.store.run import TaskRecord
from qeval.types import Better, Estimate

_UNCATEGORIZED = "uncategorized"
_TRUST = ("brier", "ece")
"""Measures of the trust that probabilities over the choices deserve: both are lower for the better."""


def accuracies(task: str, rows: ItemRows, seed: int) -> Metrics:
    """Return one model's accuracy (by questions, by subject, length-normalized if the task has it), Brier and ECE."""
    bad = int(rows.non_finite().sum())
    names = [f"{task}_acc", f"{task}_acc_macro", *([f"{task}_acc_norm"] if rows.acc_norm is not None else [])]
    if bad:
        broken = {name: Metric.broken("fraction", "higher", len(rows.items), bad) for name in names}
        return broken | {f"{task}_{name}": Metric.broken("fraction", "lower", len(rows.items), bad) for name in _TRUST}
    clusters = question_clusters(rows.subjects, rows.prompts)
    metrics = {
        f"{task}_acc": _share(rows.acc, clusters, "higher", seed),
        f"{task}_acc_macro": _macro(rows, seed),
    }
    if rows.acc_norm is not None:
        metrics[f"{task}_acc_norm"] = _share(rows.acc_norm, clusters, "higher", seed)
    metrics[f"{task}_brier"] = _share(brier_scores(rows), clusters, "lower", seed)
    confidence = np.exp(np.maximum.reduceat(log_softmax_rows(rows), rows.starts))
    metrics[f"{task}_ece"] = expected_calibration_error(confidence, rows.pred == rows.gold, clusters, seed=seed)
    return as_metrics(metrics)


def changes(task: str, rows: ItemRows, baseline: ItemRows, seed: int) -> Metrics:
    """Return what changed from the baseline, question by question."""
    went = transitions(rows, baseline)
    kinds: dict[str, Better] = {
        "acc_diff": "higher", "flips": "lower", "right_to_wrong": "lower", "wrong_to_right": "higher",
        "wrong_to_other": "lower", "choice_kl_nats": "lower", "brier_diff": "lower",
    }  # fmt: skip

    # nothing is averaged where a row is not finite
    bad = int(rows.non_finite().sum())
    if bad:
        units = {name: "nats" if name.endswith("nats") else "fraction" for name in kinds}
        return {
            f"{task}_{name}": Metric.broken(units[name], better, len(rows.items), bad) for name, better in kinds.items()
        }

    clusters = question_clusters(rows.subjects, rows.prompts)
    shares = {
        "flips": went["right_to_wrong"] | went["wrong_to_right"],
        **{name: went[name] for name in ("right_to_wrong", "wrong_to_right", "wrong_to_other")},
    }
    metrics = {name: _share(share, clusters, kinds[name], seed) for name, share in shares.items()}
    metrics["acc_diff"] = _share(rows.acc - baseline.acc, clusters, "higher", seed)
    metrics["choice_kl_nats"] = estimates.mean(
        choice_kl_nats(rows, baseline), clusters, unit="nats", better="lower", seed=seed
    )
    metrics["brier_diff"] = _share(brier_scores(rows) - brier_scores(baseline), clusters, "lower", seed)
    return as_metrics({f"{task}_{name}": metrics[name] for name in kinds})


def results(record: TaskRecord, models: Mapping[str, ItemRows], first: str, seed: int) -> dict[str, TaskResult]:
    """Take a task apart for every model of `models`; differences are from the model named `first`."""
    finite = {name: rows for name, rows in models.items() if not rows.non_finite().any()}
    tables: dict[str, dict[str, dict[str, GroupScore]]] = {name: {} for name in finite}
    for what, masks in group_masks(record, models[first]).items():
        for name in finite:
            tables[name][what] = {}
        for label, chosen in masks.items():
            for name, score in _scores(finite, chosen, first, seed).items():
                tables[name][what][label] = score

    # what became of the answers
    counts = {name: count_flips(rows, models[first]) for name, rows in finite.items() if name != first}
    p_values = {name: flips_p(rows, models[first]) for name, rows in finite.items() if name != first}
    return {
        name: TaskResult(
            by_category=tables.get(name, {}).get("by_category", {}),
            by_subject=tables.get(name, {}).get("by_subject", {}),
            flips=counts.get(name),
            flips_p=p_values.get(name),
        )
        for name in models
    }


def flips_p(rows: ItemRows, baseline: ItemRows) -> float:
    """Return the p-value of McNemar's exact test on the flips of distinct questions."""
    went, counted = transitions(rows, baseline), is_first_question(rows.prompts)
    return mcnemar(*(int((went[way] & counted).sum()) for way in ("right_to_wrong", "wrong_to_right")))


def adjusted(task_results: Mapping[str, TaskResult], family: Sequence[str]) -> dict[str, TaskResult]:
    """Return the results with the tests of those named in `family` corrected together, after Holm."""
    tested = {name: p for name in family if (p := task_results[name].flips_p) is not None}
    corrected = dict(zip(tested, holm(list(tested.values())), strict=True))
    return {
        name: result.model_copy(update={"flips_p_adjusted": corrected.get(name)})
        for name, result in task_results.items()
    }


def group_masks(record: TaskRecord, rows: ItemRows) -> dict[str, dict[str, Mask]]:
    """Return which questions belong to each category and subject, [questions] each; categories first."""
    subjects = rows.subjects.astype(str)
    categories = np.asarray([record.categories.get(subject, _UNCATEGORIZED) for subject in subjects])
    return {
        what: {str(label): labels == label for label in dict.fromkeys(labels.tolist())}
        for what, labels in (("by_category", categories), ("by_subject", subjects))
    }


def at_chance(accuracy: Metric, guess: float) -> bool:
    """Return whether an accuracy's interval includes what guessing gives."""
    return accuracy.low is not None and accuracy.high is not None and accuracy.low <= guess <= accuracy.high


def count_flips(rows: ItemRows, baseline: ItemRows) -> Flips:
    """Return what became of the answers, in numbers of questions."""
    return Flips(**{name: int(went.sum()) for name, went in transitions(rows, baseline).items()})


def choice_kl_nats(rows: ItemRows, baseline: ItemRows) -> Floats:
    """Return KL(baseline || variant) over the softmax of each question's log-likelihoods, [questions]."""
    log_p, log_q = log_softmax_rows(baseline), log_softmax_rows(rows)
    return np.asarray(np.add.reduceat(np.exp(log_p) * (log_p - log_q), rows.starts), np.float64)


def brier_scores(rows: ItemRows) -> Floats:
    """Return the squared distance of each question's probabilities from its answer, [questions], 0 to 2.

    The probabilities are the softmax of the choices' log-likelihoods (Brier, 1950, of many classes).
    """
    probabilities = np.exp(log_softmax_rows(rows))
    probabilities[rows.starts + rows.gold] -= 1
    return np.asarray(np.add.reduceat(probabilities**2, rows.starts), np.float64)


def chance(rows: ItemRows) -> float:
    """Return the expected accuracy of guessing: the mean of 1 / (number of choices)."""
    return float(np.mean(1 / rows.counts()))


def _scores(models: Mapping[str, ItemRows], chosen: Mask, first: str, seed: int) -> dict[str, GroupScore]:
    clusters = question_clusters(models[first].subjects[chosen], models[first].prompts[chosen])
    accs = {name: rows.acc[chosen] for name, rows in models.items()}
    others = [name for name in models if name != first]
    columns = [*accs.values(), *(accs[name] - accs[first] for name in others)]
    means = estimates.means(columns, clusters, unit="fraction", better="higher", seed=seed)
    by_metric = dict(zip(accs, means[: len(accs)], strict=True))
    differences = dict(zip(others, means[len(accs) :], strict=True))
    return {
        name: GroupScore(
            acc=Metric.of(by_metric[name]), difference=Metric.of(differences[name]) if name in differences else None
        )
        for name in models
    }


def transitions(rows: ItemRows, baseline: ItemRows) -> dict[str, Mask]:
    """Return which questions went which way, [questions] each; every question went one of them."""
    was, now = baseline.pred == baseline.gold, rows.pred == rows.gold
    same = rows.pred == baseline.pred
    return {
        "right_to_right": was & now,
        "right_to_wrong": was & ~now,
        "wrong_to_right": ~was & now,
        "wrong_to_same": ~was & ~now & same,
        "wrong_to_other": ~was & ~now & ~same,
    }


def log_softmax_rows(rows: ItemRows) -> Floats:
    """Return the log-likelihoods (nats), normalized over each question's choices; [choices of all questions]."""
    question = np.repeat(np.arange(len(rows.starts)), rows.counts())
    shifted = rows.choices - np.maximum.reduceat(rows.choices, rows.starts)[question]
    return np.asarray(shifted - np.log(np.add.reduceat(np.exp(shifted), rows.starts))[question], np.float64)


def _share(values: Floats | Mask | Ints, clusters: Clusters, better: Better, seed: int) -> Estimate:
    return estimates.mean(values, clusters, unit="fraction", better=better, seed=seed)


def _macro(rows: ItemRows, seed: int) -> Estimate:
    """Return accuracy by subject; of one subject the plain accuracy, resampled by questions as that is."""
    clusters = Clusters.of(rows.subjects.astype(str))
    if clusters.count < 2:
        return _share(rows.acc, question_clusters(rows.subjects, rows.prompts), "higher", seed)
    return estimates.macro_mean(rows.acc, clusters, unit="fraction", better="higher", seed=seed)

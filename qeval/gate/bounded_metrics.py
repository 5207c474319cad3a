"""A variant's figures with their bounds, from a finished run's paired rows; no torch."""

from functools import cached_property

import numpy as np

from qeval.errors import QevalError
from qeval.gate.figure import Figure, both_ways
from qeval.gate.metrics import ANSWERS, QUANTILES, kind_of, split
from qeval.gate.score_figures import score_figure
from qeval.gate.trace_figures import trace_figure
from qeval.report import measure_drift, measure_items
from qeval.report.align import ItemRows, TokenRows
from qeval.report.independent import is_first_question, question_clusters
from qeval.report.measure_chat import in_answers
from qeval.report.notes import chance_sentence
from qeval.report.run_rows import PairedRun
from qeval.stats import bounds
from qeval.stats.bootstrap import NonFiniteError
from qeval.stats.bounds import Bounded
from qeval.store.run import ChatRecord, TaskRecord, VariantRecord


class Figures:
    """One variant of a run; rows are read when the first rule asks for them."""

    def __init__(self, run: PairedRun, variant: VariantRecord) -> None:
        """Nothing is read yet."""
        self._run, self._variant = run, variant
        self._items: dict[str, ItemRows] = {}

    def of(self, metric: str) -> Figure:
        """Return a metric's figure.

        Raises:
            QevalError: the run lacks what it takes, its rows are broken, or some are not finite.
        """
        try:
            self._require_finite()
            return self._of(metric)
        except NonFiniteError as error:
            raise QevalError(f"{metric} cannot be told: {error}") from error

    def _of(self, metric: str) -> Figure:
        task, name = split(metric)
        if task is not None:
            return self._of_task(task, name)
        if kind_of(metric).source == "size":
            return Figure(self._size(name))
        if self._run.reference is not None and name not in ("ppl_increase", "nll_diff_nats"):
            raise QevalError(
                f"{metric} is a distance from a run's own baseline, so it says nothing against another run; limit "
                "accuracy, scores or perplexity."
            )
        self._require(kind_of(metric).source)
        if kind_of(metric).source == "drift":
            return self._of_continuations(name)
        if kind_of(metric).source == "needle":
            return self._of_needles(name)
        if (source := kind_of(metric).source) in self._run.traced:
            return trace_figure(name, self._run.traces(source, self._variant), self._run.baseline_traces(source))
        bound = self._of_tokens(name)
        if bound is None and self._tokens.is_bounded:
            raise QevalError(
                f"'{self._variant.name}' is a model behind an endpoint, of whose KL there is a lower bound alone, so "
                f"no limit on {metric} can be met; limit top1_agreement, perplexity or accuracy."
            )
        if bound is None:
            raise QevalError(f"The run scored no row for {metric}.")
        clusters = "windows" if self._run.windows_are_apart else "stretches of text"
        clusters = "conversations" if name.startswith(ANSWERS) else clusters
        return Figure(bound.value, bound, "tokens", clusters, unchanged=float(name.endswith(("_agreement", "overlap"))))

    def _require_finite(self) -> None:
        """Refuse every metric of a variant whose KL is not finite: what is compared with numbers that are none is none.

        Raises:
            NonFiniteError: it counts them.
        """
        if self._run.protocol and "kl" in self._run.record.metrics:
            kl = self._tokens.of("kl_nats")
            if bad := int(np.count_nonzero(~np.isfinite(kl))):
                raise NonFiniteError(bad, kl.size)

    def _size(self, name: str) -> float:
        record, whole = self._variant, self._run.record.baseline_size_bytes
        if not record.size_bytes or whole is None or record.bits_per_weight is None:
            raise QevalError(f"The run's record gives '{record.name}' no size.")
        sizes = {
            "size_ratio": whole / record.size_bytes,
            "size_bytes": float(record.size_bytes),
            "bits_per_weight": record.bits_per_weight,
        }
        return sizes[name]

    def _of_tokens(self, name: str) -> Bounded | None:
        rows, of_answers = self._tokens, name.startswith(ANSWERS)
        name = name.removeprefix(ANSWERS)
        column = column_of(name)
        counted = self._run.distinct_rows[rows.scored[column]]
        if of_answers:
            counted = counted & in_answers(rows, self._chat)[rows.scored[column]]
        values, windows = rows.of(column)[counted], rows.clusters(column).select(counted)
        if not values.size:
            return None
        if name in QUANTILES:
            return bounds.quantile_of(values, QUANTILES[name], windows)
        if name == "top1_agreement":
            return bounds.share_of(values, windows)
        if column != "nll":
            return bounds.mean_of(values, windows)
        change = values - self._run.baseline_tokens.of("nll")[counted]
        return (bounds.increase_of if name == "ppl_increase" else bounds.mean_of)(change, windows)

    def _of_continuations(self, name: str) -> Figure:
        rows = self._run.drift(self._variant)
        if bad := measure_drift.non_finite(rows):
            raise NonFiniteError(bad, rows.kl_nats.size)
        generated = rows.pred.shape[1]
        values, clusters = measure_drift.columns(rows)[name]
        if name == "drift_first_tokens":
            part: Bounded = bounds.part_of(values / generated, clusters, generated)
            return Figure(part.value, part, "prompts", "prompts", unchanged=generated)
        share = bounds.share_of(values, clusters)
        rested = "tokens" if name == "drift_equal" else "prompts"
        return Figure(share.value, share, rested, "prompts", unchanged=float(name == "drift_equal"))

    def _of_needles(self, name: str) -> Figure:
        rows, baseline = self._run.needles(self._variant), self._run.baseline_needles
        if bad := int(np.count_nonzero(~np.isfinite(rows.log_p))):
            raise NonFiniteError(bad, rows.log_p.size)
        if name == "needle_recall_drop":
            drop = bounds.drop_of(baseline.recall, rows.recall, rows.clusters)
            return Figure(drop.value, drop, "needles", "haystacks", both_ways(baseline.recall, rows.recall))
        loss = bounds.mean_of(baseline.log_p - rows.log_p, rows.clusters)
        return Figure(loss.value, loss, "needles", "haystacks")

    def _of_task(self, task: str, name: str) -> Figure:
        for score in self._run.record.scores:
            if score.name == task:
                own = self._run.scores(score, self._variant)
                return score_figure(score, name, own, self._run.baseline_scores(score))
        if name == "score_loss":
            raise QevalError(f"'{task}' is no score of this run; limit {task}_acc_drop.")
        record = self._task(task)
        every, base = self._answers(record), self._run.baseline_items(record)
        distinct = is_first_question(base.prompts)
        rows, baseline = every.select(distinct), base.select(distinct)
        subjects = question_clusters(rows.subjects, rows.prompts)

        remark = detail = None
        if name == "acc_drop":
            bound: Bounded = bounds.drop_of(baseline.acc, rows.acc, subjects)
            remark, detail = self._at_chance(record, baseline), both_ways(baseline.acc, rows.acc)
        elif name == "choice_kl_nats":
            bound = bounds.mean_of(measure_items.choice_kl_nats(rows, baseline), subjects)
        else:
            went = measure_items.transitions(rows, baseline)
            kinds = ("right_to_wrong",) if name == "right_to_wrong" else ("right_to_wrong", "wrong_to_right")
            bound = bounds.share_of(sum(went[kind].astype(float) for kind in kinds), subjects)

        clusters = "subjects" if subjects.count < len(rows.items) else "questions"
        return Figure(bound.value, bound, "questions", clusters, detail, remark)

    def _at_chance(self, record: TaskRecord, baseline: ItemRows) -> str | None:
        accuracy = measure_items.accuracies(record.name, baseline, self._run.record.seed)[f"{record.name}_acc"]
        guess = measure_items.chance(baseline)
        return chance_sentence(record.title, guess) if measure_items.at_chance(accuracy, guess) else None

    @property
    def _chat(self) -> ChatRecord:
        chat = self._run.protocol and self._run.protocol.chat
        if not chat:
            raise QevalError("The run scored no answers of the baseline; run it again with --corpus chat.")
        return chat

    @cached_property
    def _tokens(self) -> TokenRows:
        return self._run.tokens(self._variant)

    def _answers(self, record: TaskRecord) -> ItemRows:
        if record.name not in self._items:
            if not record.items:
                raise QevalError(f"The run scored no question of '{record.name}'.")
            rows = self._run.items(record, self._variant)
            bad = int((rows.non_finite() | self._run.baseline_items(record).non_finite()).sum())
            if bad:
                raise NonFiniteError(bad, len(rows.items))
            self._items[record.name] = rows
        return self._items[record.name]

    def _task(self, name: str) -> TaskRecord:
        self._require(name)
        for task in self._run.record.tasks:
            if task.name == name:
                return task
        scores = [score.name for score in self._run.record.scores if score.task and score.task.name == name]
        if scores:
            raise QevalError(f"'{name}' has a score by each metric and filter; limit one of {', '.join(scores)}.")
        raise QevalError(f"The run's record does not say what '{name}' is.")

    def _require(self, task: str) -> None:
        measured = self._run.record.metrics
        if task not in measured and self._run.record.imported:
            raise QevalError(f"The run was imported and holds no '{task}'; it has {', '.join(measured)}.")
        if task not in measured:
            raise QevalError(
                f"The run did not measure '{task}'; run it again with --tasks {','.join([*measured, task])} "
                "added to it."
            )


def column_of(metric: str) -> str:
    """Return the column of token rows that a metric is made from."""
    if metric in ("ppl_increase", "nll_diff_nats"):
        return "nll"
    return "kl_nats" if metric in QUANTILES else metric

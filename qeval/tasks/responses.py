"""Tasks of lm-evaluation-harness that have no choices: answers that are generated, log-likelihoods, whole texts.

The harness renders every prompt, filters every answer and judges it by its own metrics. A score is one metric under one
filter; only metrics with a value for each item are scores, since those of a whole corpus (BLEU) can't be paired.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from importlib.metadata import version
from numbers import Real
from typing import Any, NamedTuple

import numpy as np
from jinja2.exceptions import TemplateError
from lm_eval.api.instance import Instance
from lm_eval.defaults import DEFAULT_OTHER_SEED

from qeval.errors import UsageError, first_line
from qeval.identity import digest
from qeval.tasks.directions import DIRECTIONS, NATS, Direction
from qeval.tasks.harness import TaskData
from qeval.tasks.harness_tasks import quiet_harness
from qeval.tasks.harness_text import Ending, HarnessText, ending_of, form_options
from qeval.tasks.prompt_form import PLAIN, PromptForm
from qeval.tasks.score_names import score_name, score_title
from qeval.types import TokenIds

_PART_ITEMS = 256
GENERATED, ROLLING = "generate_until", "loglikelihood_rolling"
Response = str | tuple[float, bool] | float
"""A model's response to the harness: a text, a log-likelihood and whether it is greedy, or a log-likelihood."""


_EMPTY: Mapping[str, Response] = {GENERATED: "", ROLLING: 0.0, "loglikelihood": (0.0, False)}
"""A response of each type that says nothing: which metrics the harness makes of it, and of which kind they are."""


@dataclass(frozen=True)
class ResponseItem:
    """An item in token ids.

    Attributes:
        subject: The harness's task that it is of.
        item: Its index there.
        pairs: Contexts and continuations that are scored; of a generated answer its prompt and nothing.
        ending: Of a generated answer what ends it; else None.
        cut: Tokens that were cut off its context.
        doc_sha256: The sha256 of all that the data say of it, the right answer included.
    """

    subject: str
    item: int
    pairs: tuple[tuple[TokenIds, TokenIds], ...]
    ending: Ending | None
    cut: int
    doc_sha256: str

    @property
    def prompt(self) -> TokenIds:
        """The tokens that an answer follows."""
        return self.pairs[0][0]

    @property
    def sha256(self) -> str:
        """The sha256 of all that is asked: token ids, and what ends the answer."""
        return sha256(repr((self.pairs, self.ending and tuple(self.ending))).encode()).hexdigest()


@dataclass(frozen=True)
class ScoreInfo:
    """One metric under one filter; `lengths` is the mean words or bytes of an item where it is a mean over them."""

    name: str
    title: str
    metric: str
    filter: str
    better: Direction
    lengths: Mapping[str, float]
    """By subject, those that have the score."""


@dataclass(frozen=True)
class ResponseInfo:
    """The facts of a task that a record states."""

    name: str
    source: str
    output: str
    shots: int
    items: int
    cut_prompts: int
    longest_answer: int | None
    chat_template: str | None
    multiturn: bool
    system: str | None
    harness: str


class ItemScore(NamedTuple):
    """A score of one item, NaN where the metric gave none, and what the filter left of the answer."""

    score: ScoreInfo
    value: float
    answer: str | None


@dataclass(frozen=True, eq=False)
class ResponseSuite:
    """One task: its items by subject, its scores, and the harness's judgement."""

    info: ResponseInfo
    items: tuple[ResponseItem, ...]
    scores: tuple[ScoreInfo, ...]
    skipped: tuple[str, ...]
    """Metrics that have no value for an item."""
    tasks: Mapping[str, Any]
    judged_by: str
    """The digest of how the harness's tasks filter and judge."""

    def parts(self) -> list[tuple[ResponseItem, ...]]:
        """Return the items in runs of one subject and at most 256: what one job asks."""
        by_subject = [tuple(item for item in self.items if item.subject == subject) for subject in self.tasks]
        return [
            items[start : start + _PART_ITEMS] for items in by_subject for start in range(0, len(items), _PART_ITEMS)
        ]

    def judge(self, item: ResponseItem, response: Response) -> list[ItemScore]:
        """Return the scores of an item's response."""
        judged = _judged(self.tasks[item.subject], item.item, response)
        found = []
        for score in self.scores:
            if item.subject in score.lengths:
                metrics, answer = judged[score.filter]
                value = _value(score.metric, metrics.get(score.metric), score.lengths[item.subject])
                found.append(ItemScore(score, float("nan") if value is None else value, answer))
        return found

    def question(self, item: ResponseItem) -> str:
        """Return the text that is asked of an item, examples left out."""
        task = self.tasks[item.subject]
        doc = _docs(task)[item.item]
        return str(task.doc_to_target(doc) if self.info.output == ROLLING else task.doc_to_text(doc))


def encode_responses(
    data: TaskData, text: HarnessText, *, limit: int | None, form: PromptForm = PLAIN
) -> ResponseSuite:
    """Render and encode the prompts of a task.

    Args:
        data: The task's texts.
        text: The model's tokenizer and context.
        limit: Take the first items of every subject.
        form: The form of prompts: plain text, or under the chat template.

    Raises:
        UsageError: A prompt does not fit, the task asks for what qeval does not do, or no metric has a value an item.
    """
    with quiet_harness():
        items = tuple(item for subject, task in data.tasks.items() for item in _items(subject, task, text, limit, form))
        scores, skipped = _scores(data, items)
    endings = [item.ending.tokens for item in items if item.ending]
    info = ResponseInfo(
        name=data.name,
        source=data.source,
        output="/".join(dict.fromkeys(task.OUTPUT_TYPE for task in data.tasks.values())),
        shots=max(_shots(task) for task in data.tasks.values()),
        items=len(items),
        cut_prompts=sum(item.cut > 0 for item in items),
        longest_answer=max(endings) if endings else None,
        chat_template=sha256(str(text.tokenizer.chat_template).encode()).hexdigest() if form.chat else None,
        multiturn=form.chat and form.multiturn,
        system=form.system,
        harness=f"lm-eval {version('lm_eval')}",
    )
    return ResponseSuite(info, items, scores, skipped, data.tasks, _judged_by(data.tasks))


def _items(subject: str, task: Any, text: HarnessText, limit: int | None, form: PromptForm) -> Iterator[ResponseItem]:
    task.set_fewshot_seed(DEFAULT_OTHER_SEED)  # else another tokenizer's prompts would have other examples
    options = form_options(form, text)
    for place, doc in task.doc_iterator(limit=limit, rank=0, world_size=1):
        try:
            context = _context(task, doc, options)
            requests = task.construct_requests(doc=doc, ctx=context, metadata=(task.config.task, place, 1))
            each = requests if isinstance(requests, list) else [requests]
            if len(each) != 1:
                raise UsageError(f"{len(each)} requests an item; score it with lm-eval and use `qeval import`.")
            yield _item(subject, place, each[0], text, _doc_sha256(doc))
        except (UsageError, TemplateError) as error:
            raise UsageError(f"Item {place} of {subject}: {first_line(error)}.") from error


def _context(task: Any, doc: Any, options: Mapping[str, Any]) -> Any:
    """Return the text before an answer; a whole text has none."""
    if task.OUTPUT_TYPE == ROLLING:
        return ""
    return task.fewshot_context(doc, num_fewshot=_shots(task), gen_prefix=task.doc_to_prefix(doc), **options)


def _item(subject: str, place: int, request: Any, text: HarnessText, doc: str) -> ResponseItem:
    if request.request_type == GENERATED:
        context, settings = request.args
        ending = ending_of(settings, subject)
        prompt = text.prompt(context, ending.tokens)
        return ResponseItem(subject, place, ((prompt.context, ()),), ending, prompt.cut, doc)
    if request.request_type == ROLLING:
        return ResponseItem(subject, place, tuple(text.windows(request.args[0])), None, 0, doc)
    pair = text.pair(*request.args)
    return ResponseItem(subject, place, ((pair.context, pair.rest),), None, pair.cut, doc)


def _scores(data: TaskData, items: Sequence[ResponseItem]) -> tuple[tuple[ScoreInfo, ...], tuple[str, ...]]:
    """Return the scores that the harness gives an empty response, those with a value for each item, and the others."""
    found: dict[tuple[str, str], dict[str, float]] = {}
    better: dict[str, Direction] = {}
    skipped: dict[str, None] = {}
    for subject, task in data.tasks.items():
        own = [item for item in items if item.subject == subject]
        empty = _EMPTY[task.OUTPUT_TYPE]
        judged = [_judged(task, item.item, empty) for item in (own if task.OUTPUT_TYPE == ROLLING else own[:1])]
        for filter_name, (metrics, _) in (judged[0] if judged else {}).items():
            for metric, value in metrics.items():
                side = _better(task, metric)
                if side is None or _value(metric, value, 1.0) is None:
                    skipped[metric] = None
                    continue
                lengths = [_length(each[filter_name][0][metric]) for each in judged]
                found.setdefault((metric, filter_name), {})[subject] = sum(lengths) / len(lengths)
                better[metric] = side
    if not found:
        raise UsageError(
            f"Task '{data.name}' has no metric with a value and a direction for each item "
            f"({', '.join(skipped) or 'none at all'}), so nothing of it can be paired."
        )
    scores = tuple(
        ScoreInfo(
            name=score_name(data.name, metric, filter_name),
            title=score_title(data.name, metric, filter_name),
            metric=metric,
            filter=filter_name,
            better=better[metric],
            lengths=lengths,
        )
        for (metric, filter_name), lengths in found.items()
    )
    return scores, tuple(skipped)


def _judged(task: Any, place: int, response: Response) -> dict[str, tuple[dict[str, Any], str | None]]:
    """Return the harness's metrics of a response under each filter, and what the filter left of a generated answer.

    Raises:
        UsageError: The task's own scoring fails.
    """
    doc = _docs(task)[place]
    instance = Instance(task.OUTPUT_TYPE, doc=doc, arguments=(), idx=0, metadata=(task.config.task, place, 1))
    instance.resps = [response] * int(task.config.repeats or 1)  # greedy answers repeat themselves
    judged = {}
    with quiet_harness():
        try:
            for each in task._filters:
                each.apply([instance])
            for name, left in instance.filtered_resps.items():
                answer = left if isinstance(left, str) else None
                judged[name] = (dict(task.process_results(doc, [left])), answer)
        except Exception as error:  # a task's own functions raise whatever they do
            raise UsageError(
                f"lm-eval's task '{task.config.task}' can't score item {place}: {first_line(error)} "
                f"({type(error).__name__})."
            ) from error
    return judged


def _value(metric: str, value: Any, length: float) -> float | None:
    """Return a metric's value for an item; negative log-likelihoods are of a mean length, so that items weigh alike."""
    if metric in NATS:
        loglikelihood = value[0] if isinstance(value, tuple | list) else value
        return -float(loglikelihood) / length
    return float(value) if isinstance(value, Real | np.bool_) else None


def _length(value: Any) -> float:
    return float(value[1]) if isinstance(value, tuple | list) and len(value) == 2 else 1.0


def _better(task: Any, metric: str) -> Direction | None:
    says = None if metric in NATS else task.higher_is_better().get(metric)
    return DIRECTIONS.get(metric) if says is None else "higher" if says else "lower"


def _docs(task: Any) -> Any:
    return task.eval_docs


def _shots(task: Any) -> int:
    return int(task.config.num_fewshot or 0)


def _doc_sha256(doc: Any) -> str:
    return sha256(json.dumps(doc, sort_keys=True, default=str).encode()).hexdigest()


def _judged_by(tasks: Mapping[str, Any]) -> str:
    """Return the digest of what tasks do with a response: functions count by their source, as the harness writes it."""
    named = ("process_docs", "doc_to_target", "process_results", "metric_list", "filter_list", "repeats")
    configs = {subject: task.dump_config() for subject, task in tasks.items()}
    parts = {subject: {name: str(config.get(name)) for name in named} for subject, config in configs.items()}
    return digest({"harness": version("lm_eval"), "tasks": parts})

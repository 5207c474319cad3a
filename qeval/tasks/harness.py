"""Tasks of questions: lm-evaluation-harness's tasks and prompts, turned into token ids that a session can score.

The harness renders every prompt and judges every answer; only its data loading is replaced where csv files are used.
A continuation's ids are what follows the context's in the encoding of both together, as the harness does it.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import yaml
from lm_eval.api.samplers import FirstNSampler
from lm_eval.api.task import ConfigurableTask
from lm_eval.defaults import DEFAULT_OTHER_SEED

from qeval.errors import UsageError
from qeval.paths import shipped
from qeval.tasks.corpus import BosPolicy
from qeval.tasks.harness_tasks import (
    CHOICES,
    hub_reason,
    is_task_file,
    load_harness_tasks,
    quiet_harness,
    title_of_task,
)
from qeval.tasks.harness_text import Encoder, HarnessText, form_options
from qeval.tasks.hub_data import check_subjects, mmlu_folder, mmlu_subjects
from qeval.tasks.mmlu_csv import Subject, read_subjects
from qeval.tasks.names import HUB, MMLU
from qeval.tasks.prompt_form import PLAIN, PromptForm
from qeval.types import TokenIds

SAMPLE = "tasks/mmlu_sample"
_PART_QUESTIONS = 256
_MMLU_SUBJECTS = 57


@dataclass(frozen=True)
class Question:
    """A question as token ids: for every choice its context and its continuation.

    `item` is its index in its file; `shots` the examples left in its prompt.
    """

    subject: str
    item: int
    gold: int
    pairs: tuple[tuple[TokenIds, TokenIds], ...]
    choices: int
    shots: int

    @property
    def prompt(self) -> TokenIds:
        """The first choice's context; in most tasks that of all."""
        return self.pairs[0][0]


@dataclass(frozen=True)
class TaskInfo:
    """The facts of a task that a record states."""

    name: str
    source: str
    title: str
    shots: int
    subjects: list[str]
    categories: dict[str, str]
    items: int
    items_with_fewer_shots: int
    choices: int
    harness: str


@dataclass(frozen=True, eq=False)
class Suite:
    """One task: its questions by subject, and the harness's own judgement of their scores."""

    info: TaskInfo
    questions: tuple[Question, ...]
    tasks: Mapping[str, Any]

    def parts(self) -> list[tuple[Question, ...]]:
        """Return the questions in runs of one subject and at most 256: what one job scores."""
        by_subject = [tuple(q for q in self.questions if q.subject == subject) for subject in self.info.subjects]
        return [
            questions[start : start + _PART_QUESTIONS]
            for questions in by_subject
            for start in range(0, len(questions), _PART_QUESTIONS)
        ]

    def judge(self, question: Question, scores: Sequence[tuple[float, bool]]) -> dict[str, float]:
        """Return the harness's metrics of one question, from (log-likelihood, is greedy) of every pair."""
        task = self.tasks[question.subject]
        with quiet_harness():
            return dict(task.process_results(task.eval_docs[question.item], list(scores)))


@dataclass(frozen=True, eq=False)
class TaskData:
    """A task's questions and examples as texts, loaded once and encoded by every tokenizer."""

    name: str
    source: str
    tasks: Mapping[str, Any]
    """The harness's own tasks by subject."""
    categories: dict[str, str]


def load_task(name: str, *, shots: int, folder: Path | None, subjects: Sequence[str]) -> TaskData:
    """Load the data of the task called `name`.

    Args:
        name: `mmlu`, or any multiple-choice task of the harness, which has its own number of examples.
        shots: Examples in a prompt of MMLU.
        folder: MMLU's csv files, `hub`, or None for the offline sample.
        subjects: MMLU's; none means all.

    Raises:
        UsageError: An unknown task, or data that is missing or broken.
    """
    with quiet_harness():
        if name == MMLU:
            tasks, source = _mmlu_tasks(folder, subjects, shots)
            tags = {subject: str(_mmlu_config(subject)["tag"]) for subject in tasks}
            categories = {subject: tag.removeprefix("mmlu_").removesuffix("_tasks") for subject, tag in tags.items()}
            return TaskData(name, source, tasks, categories)
        tasks = load_harness_tasks(name)
        return TaskData(title_of_task(name), "file" if is_task_file(name) else HUB, tasks, {})


def load_suite(
    name: str,
    tokenizer: Any,
    *,
    max_length: int,
    bos: BosPolicy,
    shots: int,
    limit: int | None,
    folder: Path | None,
    subjects: Sequence[str],
) -> Suite:
    """Load the task called `name` and encode its prompts, as `load_task` and `encode_task`."""
    data = load_task(name, shots=shots, folder=folder, subjects=subjects)
    return encode_task(data, tokenizer, max_length=max_length, bos=bos, limit=limit)


def encode_task(
    data: TaskData,
    tokenizer: Any,
    *,
    max_length: int,
    bos: BosPolicy,
    limit: int | None,
    form: PromptForm = PLAIN,
) -> Suite:
    """Render and encode the prompts of a task.

    Args:
        data: The task's texts.
        tokenizer: The model's.
        max_length: Tokens of a prompt at most; examples are dropped from the front until it fits.
        bos: Whether BOS goes in front.
        limit: Take the first questions of every subject.
        form: The form of prompts: plain text, or under the chat template.

    Raises:
        UsageError: A prompt does not fit without any example, or the task has no choices.
    """
    for leaf, task in data.tasks.items():
        if task.OUTPUT_TYPE != CHOICES:
            raise UsageError(f"Task '{leaf}' asks for {task.OUTPUT_TYPE}, and has no choices.")
    text = HarnessText(tokenizer, bos, max_length)
    for task in data.tasks.values():
        task.set_fewshot_seed(DEFAULT_OTHER_SEED)  # else another tokenizer's prompts would have other examples
    shots = {subject: _shots(task) for subject, task in data.tasks.items()}
    with quiet_harness():
        questions = tuple(
            question
            for subject, task in data.tasks.items()
            for question in _questions(subject, task, text, limit, form)
        )

    # 0 where questions have different numbers of choices
    counts = {question.choices for question in questions}
    info = TaskInfo(
        name=data.name,
        source=data.source,
        title=_title(data.name, data.source, max(shots.values()), len(data.tasks)) + form.title,
        shots=max(shots.values()),
        subjects=list(data.tasks),
        categories=data.categories,
        items=len(questions),
        items_with_fewer_shots=sum(question.shots < shots[question.subject] for question in questions),
        choices=counts.pop() if len(counts) == 1 else 0,
        harness=f"lm-eval {version('lm_eval')}",
    )
    return Suite(info, questions, data.tasks)


def _mmlu_tasks(folder: Path | None, subjects: Sequence[str], shots: int) -> tuple[dict[str, Any], str]:
    if str(folder) == HUB:
        check_subjects(subjects)
        return {name: _mmlu_task(name, shots, None) for name in subjects or mmlu_subjects()}, HUB
    tables = read_subjects(shipped(SAMPLE) if folder is None else folder, subjects, shots)
    source = "mmlu_sample" if folder is None else folder.resolve().name
    return {subject.name: _mmlu_task(subject.name, shots, subject) for subject in tables}, source


def _mmlu_task(name: str, shots: int, data: Subject | None) -> Any:
    config = _mmlu_config(name) | {"num_fewshot": shots}
    if data is not None:
        config |= {"dataset_path": None, "dataset_name": None, "custom_dataset": lambda **_: _dataset(data)}
    try:
        return ConfigurableTask(config=config)
    except (OSError, RuntimeError, ValueError) as error:
        raise UsageError(
            f"MMLU's subject '{name}' can't be loaded from the hub: {hub_reason(error)} "
            "Pass --mmlu-dir with the csv files, or --offline for the sample that is shipped."
        ) from error


def _dataset(data: Subject) -> Any:
    def split(rows: Sequence[Any]) -> Any:
        return datasets.Dataset.from_dict(
            {
                "question": [row.question for row in rows],
                "choices": [list(row.choices) for row in rows],
                "answer": [row.answer for row in rows],
            }
        )

    return datasets.DatasetDict({"dev": split(data.dev), "test": split(data.test)})


def _mmlu_config(subject: str) -> dict[str, Any]:
    """Return the harness's definition of a subject's task, its template included."""
    check_subjects([subject])
    path = mmlu_folder() / f"mmlu_{subject}.yaml"
    config: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    template = path.parent / config.pop("include")
    merged: dict[str, Any] = yaml.safe_load(template.read_text(encoding="utf-8")) | config
    return merged


def _questions(subject: str, task: Any, text: HarnessText, limit: int | None, form: PromptForm) -> Iterator[Question]:
    shots, max_length = _shots(task), text.max_length
    encoder = Encoder(text.tokenizer, text.bos)
    examples = list(task.sampler.df) if shots else []
    for item, doc in task.doc_iterator(limit=limit, rank=0, world_size=1):
        for left in range(shots, -1, -1):
            pairs = encoder.pairs(_arguments(task, doc, left, examples, shots, form_options(form, text)))
            if max(len(context) + len(rest) for context, rest in pairs) - 1 <= max_length:
                break
            if left == 0 or not isinstance(task.sampler, FirstNSampler):
                raise UsageError(
                    f"Question {item} of {subject} takes more tokens than the model's context of {max_length}."
                )
        _check_pairs(subject, item, pairs)
        yield Question(subject, item, _gold(task, doc), tuple(pairs), len(_choices(task, doc)), left)


def _arguments(
    task: Any, doc: Any, left: int, examples: list[Any], shots: int, form: Mapping[str, Any]
) -> list[tuple[str, str]]:
    """Return context and continuation of every choice, with the last `left` of the `shots` examples."""
    if left < shots:
        task.sampler.replace_df(examples[shots - left : shots] if left else examples)
    try:
        context = task.fewshot_context(doc, num_fewshot=left, gen_prefix=task.doc_to_prefix(doc), **form)
    finally:
        if left < shots:
            task.sampler.replace_df(examples)
    chat = {name: form[name] for name in ("apply_chat_template", "chat_template") if name in form}
    requests = task.construct_requests(doc=doc, ctx=context, metadata=(task.config.task, 0, 1), **chat)
    return [request.args for request in requests]


def _check_pairs(subject: str, item: int, pairs: Sequence[tuple[TokenIds, TokenIds]]) -> None:
    if any(not context or not rest for context, rest in pairs):
        raise UsageError(f"Question {item} of {subject} has an empty prompt or choice after tokenization.")
    if len(set(pairs)) < 2 <= len(pairs):
        raise UsageError(f"The choices of question {item} of {subject} are one and the same to the tokenizer.")


def _choices(task: Any, doc: Any) -> list[str]:
    return list(task.doc_to_choice(doc))


def _gold(task: Any, doc: Any) -> int:
    gold = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
    gold = gold[0] if isinstance(gold, list) else gold
    return int(gold) if isinstance(gold, int) else _choices(task, doc).index(gold)


def _shots(task: Any) -> int:
    return int(task.config.num_fewshot or 0)


def _title(name: str, source: str, shots: int, subjects: int) -> str:
    if name != MMLU:
        return f"{name} {shots}-shot"
    if source == "mmlu_sample":
        return f"MMLU-style sample {shots}-shot"
    some = "" if subjects == _MMLU_SUBJECTS else f" ({subjects} of {_MMLU_SUBJECTS} subjects)"
    return f"MMLU {shots}-shot{some}"

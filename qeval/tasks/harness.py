"""Tasks of questions: lm-evaluation-harness's own tasks and prompts, turned into token ids that a session can score.

The harness renders every prompt and judges every answer; only its data loading is replaced where csv files are given.
A continuation's ids are what follows the context's in the encoding of both together, as the harness does it.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from logging import ERROR, getLogger
from pathlib import Path
from typing import Any

import datasets
import lm_eval
import yaml
from lm_eval.api.samplers import FirstNSampler
from lm_eval.api.task import ConfigurableTask
from lm_eval.defaults import DEFAULT_OTHER_SEED
from lm_eval.tasks import TaskManager

from qeval.errors import UsageError, unknown
from qeval.paths import shipped
from qeval.tasks.corpus import BosPolicy, bos_token
from qeval.tasks.mmlu_csv import Subject, read_subjects

MMLU = "mmlu"
SAMPLE = "tasks/mmlu_sample"
_HUB = "hub"
_PART_QUESTIONS = 256
_MMLU_SUBJECTS = 57

Ids = tuple[int, ...]


@dataclass(frozen=True)
class Question:
    """A question as token ids: for every choice its context and its continuation.

    `item` is its index in its file; `shots` the examples left in its prompt.
    """

    subject: str
    item: int
    gold: int
    pairs: tuple[tuple[Ids, Ids], ...]
    choices: int
    shots: int

    @property
    def prompt(self) -> Ids:
        """The first choice's context; in most tasks that of all."""
        return self.pairs[0][0]


@dataclass(frozen=True)
class TaskInfo:
    """What a record says of a task."""

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
        """The questions in runs of one subject and at most 256: what one job scores."""
        by_subject = [tuple(q for q in self.questions if q.subject == subject) for subject in self.info.subjects]
        return [
            questions[start : start + _PART_QUESTIONS]
            for questions in by_subject
            for start in range(0, len(questions), _PART_QUESTIONS)
        ]

    def judge(self, question: Question, scores: Sequence[tuple[float, bool]]) -> dict[str, float]:
        """The harness's metrics of one question, from (log-likelihood, is greedy) of every pair."""
        task = self.tasks[question.subject]
        with _quiet():
            return dict(task.process_results(task.eval_docs[question.item], list(scores)))


@dataclass(frozen=True)
class Encoder:
    """A tokenizer under a BOS policy."""

    tokenizer: Any
    bos: BosPolicy

    def encode(self, texts: Sequence[str]) -> list[Ids]:
        """The token ids of some texts, BOS in front where the policy says so, exactly once."""
        first = bos_token(self.tokenizer, self.bos)
        ids = self.tokenizer(list(texts), add_special_tokens=self.bos == "auto", verbose=False)["input_ids"]
        if self.bos == "always" and first is not None:
            return [(first, *sequence) for sequence in ids]
        return [tuple(sequence) for sequence in ids]

    def pairs(self, arguments: Sequence[tuple[str, str]]) -> list[tuple[Ids, Ids]]:
        """Contexts and continuations as ids; spaces that end a context go to its continuation."""
        moved = [(c.rstrip(), c[len(c.rstrip()) :] + rest) if c.strip() else (c, rest) for c, rest in arguments]
        texts = list(dict.fromkeys(text for context, rest in moved for text in (context, context + rest)))
        ids = dict(zip(texts, self.encode(texts), strict=True))  # choices share their context: it is encoded once
        return [(ids[context], ids[context + rest][len(ids[context]) :]) for context, rest in moved]


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
    """The task called `name`, its prompts rendered and encoded.

    `shots`, `folder` (csv files, or `hub`) and `subjects` are MMLU's; other tasks have their own number of examples.
    `limit` takes the first questions of every subject.

    Raises:
        UsageError: an unknown task, data that is missing or broken, a prompt that no dropping of examples makes fit.
    """
    with _quiet():
        if name == MMLU:
            tasks, source = _mmlu_tasks(folder, subjects, shots)
            categories = {subject: _category(subject) for subject in tasks}
        else:
            tasks, source, categories = _harness_tasks(name), _HUB, {}
        encoder = Encoder(tokenizer, bos)
        asked = {subject: _shots(task) for subject, task in tasks.items()}
        questions = tuple(
            question
            for subject, task in tasks.items()
            for question in _questions(subject, task, encoder, max_length, limit)
        )
    counts = {question.choices for question in questions}
    info = TaskInfo(
        name=name,
        source=source,
        title=_title(name, source, max(asked.values()), len(tasks)),
        shots=max(asked.values()),
        subjects=list(tasks),
        categories=categories,
        items=len(questions),
        items_with_fewer_shots=sum(question.shots < asked[question.subject] for question in questions),
        choices=counts.pop() if len(counts) == 1 else 0,
        harness=f"lm-eval {version('lm_eval')}",
    )
    return Suite(info, questions, tasks)


def _mmlu_tasks(folder: Path | None, subjects: Sequence[str], shots: int) -> tuple[dict[str, Any], str]:
    if str(folder) == _HUB:
        known = sorted(p.stem.removeprefix("mmlu_") for p in _mmlu_folder().glob("mmlu_*.yaml"))
        for name in subjects:
            if name not in known:
                raise unknown("MMLU subject", name, known)
        return {name: _mmlu_task(name, shots, None) for name in subjects or known}, _HUB
    read = read_subjects(shipped(SAMPLE) if folder is None else folder, subjects, shots)
    source = "mmlu_sample" if folder is None else folder.resolve().name
    return {subject.name: _mmlu_task(subject.name, shots, subject) for subject in read}, source


def _mmlu_task(name: str, shots: int, data: Subject | None) -> Any:
    config = _mmlu_config(name) | {"num_fewshot": shots}
    if data is not None:
        config |= {"dataset_path": None, "dataset_name": None, "custom_dataset": lambda **_: _dataset(data)}
    try:
        return ConfigurableTask(config=config)
    except (OSError, RuntimeError, ValueError) as error:
        raise UsageError(
            f"MMLU's subject '{name}' can't be loaded from the hub: {_first_line(error)} "
            "Pass --mmlu-dir with the csv files, or leave it out for the offline sample."
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


def _mmlu_folder() -> Path:
    return Path(lm_eval.__file__).parent / "tasks" / "mmlu" / "default"


def _mmlu_config(subject: str) -> dict[str, Any]:
    """The harness's own definition of a subject's task, its template included."""
    path = _mmlu_folder() / f"mmlu_{subject}.yaml"
    if not path.exists():
        known = [p.stem.removeprefix("mmlu_") for p in _mmlu_folder().glob("mmlu_*.yaml")]
        raise unknown("MMLU subject", subject, known)
    config: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    template = _mmlu_folder() / config.pop("include")
    merged: dict[str, Any] = yaml.safe_load(template.read_text(encoding="utf-8")) | config
    return merged


def _category(subject: str) -> str:
    return str(_mmlu_config(subject)["tag"]).removeprefix("mmlu_").removesuffix("_tasks")


def _harness_tasks(name: str) -> dict[str, Any]:
    manager = TaskManager()
    if name not in manager.all_tasks:
        raise unknown("task", name, [*manager.all_tasks, "kl", "ppl"])
    try:
        tasks = dict(manager.load([name])["tasks"])
    except (OSError, RuntimeError, ValueError) as error:
        raise UsageError(f"The data of task '{name}' can't be loaded: {_first_line(error)}") from error
    for leaf, task in tasks.items():
        task.set_fewshot_seed(DEFAULT_OTHER_SEED)  # as the harness does: else examples are drawn anew every time
        if task.OUTPUT_TYPE != "multiple_choice":
            raise UsageError(
                f"Task '{leaf}' asks for {task.OUTPUT_TYPE}; qeval scores multiple-choice tasks, such as hellaswag."
            )
    return tasks


def _questions(subject: str, task: Any, encoder: Encoder, max_length: int, limit: int | None) -> Iterator[Question]:
    shots = _shots(task)
    examples = list(task.sampler.df) if shots else []
    for item, doc in task.doc_iterator(limit=limit, rank=0, world_size=1):
        for left in range(shots, -1, -1):
            pairs = encoder.pairs(_arguments(task, doc, left, examples, shots))
            if max(len(context) + len(rest) for context, rest in pairs) - 1 <= max_length:
                break
            if left == 0 or not isinstance(task.sampler, FirstNSampler):
                raise UsageError(
                    f"Question {item} of {subject} takes more tokens than the model's context of {max_length}."
                )
        _check_pairs(subject, item, pairs)
        yield Question(subject, item, _gold(task, doc), tuple(pairs), len(_choices(task, doc)), left)


def _arguments(task: Any, doc: Any, left: int, examples: list[Any], shots: int) -> list[tuple[str, str]]:
    """Context and continuation of every choice, with the last `left` of the `shots` examples."""
    if left < shots:
        task.sampler.replace_df(examples[shots - left : shots] if left else examples)
    try:
        context = task.fewshot_context(doc, num_fewshot=left, gen_prefix=task.doc_to_prefix(doc))
    finally:
        if left < shots:
            task.sampler.replace_df(examples)
    requests = task.construct_requests(doc=doc, ctx=context, metadata=(task.config.task, 0, 1))
    return [request.args for request in requests]


def _check_pairs(subject: str, item: int, pairs: Sequence[tuple[Ids, Ids]]) -> None:
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


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{(lines[0] if lines else type(error).__name__).rstrip('.')}."


@contextmanager
def _quiet() -> Iterator[None]:
    """The harness without its remarks; errors still show."""
    loggers = [getLogger(name) for name in ("lm_eval", "lm_eval.api.task", "datasets")]
    levels = [logger.level for logger in loggers]
    datasets.disable_progress_bars()
    try:
        for logger in loggers:
            logger.setLevel(ERROR)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)

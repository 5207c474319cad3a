"""Sentences on what limits the numbers."""

from qeval.report.chat import chat_notes
from qeval.report.model import Metrics, Task
from qeval.report.traces import trace_notes, weak_baseline_notes
from qeval.stats.bootstrap import FEW_CLUSTERS
from qeval.store.run import RunRecord


def notes(run: RunRecord, tasks: list[Task], baseline: Metrics) -> list[str]:
    """Return the model's own notes, then what follows from how much was scored, and how."""
    sentences = list(run.model.notes)
    if run.protocol and run.protocol.windows < FEW_CLUSTERS:
        sentences.append(_few("Token metrics", run.protocol.windows, "windows"))
    if run.protocol and run.protocol.chat:
        sentences += chat_notes(run.protocol.chat)
    sentences += trace_notes(run) + weak_baseline_notes(baseline)
    for task in tasks:
        sentences += _task_notes(task, baseline)
    return sentences


def at_chance_note(task: Task) -> str:
    """Return the sentence about a baseline that does no better than guessing."""
    return chance_sentence(task.record.title, task.chance)


def chance_sentence(title: str, chance: float) -> str:
    """Return that sentence from the task's title and the accuracy of guessing."""
    return (
        f"The baseline's interval on {title} includes chance ({chance:.0%}): its accuracy "
        "cannot be told from guessing, so neither can a loss of accuracy. Flips and the KL over the choices "
        "still say what changed."
    )


def _task_notes(task: Task, baseline: Metrics) -> list[str]:
    record = task.record
    sentences = [at_chance_note(task)] if task.baseline_at_chance else []
    clusters = baseline[f"{record.name}_acc"].clusters
    if clusters < FEW_CLUSTERS:
        what = "subjects" if len(record.subjects) > 1 else "questions"
        sentences.append(_few(record.title, clusters, what))
    if record.items_with_fewer_shots:
        sentences.append(
            f"{record.title}: {record.items_with_fewer_shots} of {record.items} prompts did not fit the "
            f"context with {record.shots} examples and were given fewer, dropped from the front."
        )
    return sentences


def _few(what: str, clusters: int, unit: str) -> str:
    if clusters < 2:
        return f"{what} rest on one of the {unit} alone, so they have no interval."
    return f"{what} rest on {clusters} {unit}: intervals from fewer than {FEW_CLUSTERS} are a rough guide."

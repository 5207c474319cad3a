"""`--tasks reasoning` and `--tasks grammar`: chains of thought and calls that the baseline writes."""

from dataclasses import dataclass
from typing import Any

from qeval.backends.base import BaselineBackend
from qeval.compare.call_traces import call_traces
from qeval.compare.chains import chain_traces
from qeval.compare.settings import Settings
from qeval.compare.trace_set import TraceSet
from qeval.models.info import LoadedModel
from qeval.models.vocabulary import check_ids
from qeval.progress import Progress
from qeval.score.traces import TracePart, trace_parts
from qeval.store.trace_records import GrammarRecord, ReasoningRecord
from qeval.tasks.names import REASONING


@dataclass(frozen=True, eq=False)
class TraceWork:
    """The traces of a run, and their records."""

    sets: tuple[TraceSet, ...] = ()

    @property
    def parts(self) -> tuple[TracePart, ...]:
        """The traces as jobs score them."""
        return tuple(part for each in self.sets for part in trace_parts(each.task, each.traces, each.masses, each.word))

    @property
    def reasoning(self) -> ReasoningRecord | None:
        """The record of the chains of thought."""
        return next((each.record for each in self.sets if isinstance(each.record, ReasoningRecord)), None)

    @property
    def grammar(self) -> GrammarRecord | None:
        """The record of the calls."""
        return next((each.record for each in self.sets if isinstance(each.record, GrammarRecord)), None)

    @property
    def texts(self) -> list[str]:
        """The prompts' texts."""
        return [text for each in self.sets for text in each.texts]

    def token_hashes(self, tokenizer: Any = None) -> list[str]:
        """Return the hash of what each task forces; with another tokenizer, behind what that makes of the prompts."""
        return [each.token_hash(tokenizer) for each in self.sets]


def trace_work(settings: Settings, loaded: LoadedModel, backend: BaselineBackend[Any], progress: Progress) -> TraceWork:
    """Have the baseline write what a run's tasks force on every model.

    Args:
        settings: The run's.
        loaded: The model.
        backend: What runs the baseline.
        progress: Hears how many prompts were answered.

    Raises:
        UsageError: There is no template, question or prompt that fits, or an extra is not installed.
    """
    sets = []
    for task in settings.traced:
        write = chain_traces if task == REASONING else call_traces
        sets.append(write(settings, loaded, backend, progress))
        used = (token for trace in sets[-1].traces for token in trace.window.tokens)
        check_ids(used, loaded.info.vocab_size, loaded.tokenizer, f"A prompt of {task} under the chat template")
    return TraceWork(tuple(sets))

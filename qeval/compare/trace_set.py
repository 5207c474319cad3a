"""The traces of one task, and the record of them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from qeval.identity import digest
from qeval.store.trace_records import GrammarRecord, ReasoningRecord
from qeval.tasks.corpus import encode
from qeval.tasks.traces import Trace
from qeval.tasks.windows import tokens_sha256
from qeval.types import TokenIds


@dataclass(frozen=True, eq=False)
class TraceSet:
    """The traces of one task.

    Attributes:
        task: Its name.
        traces: The traces, in order.
        texts: The text before each trace, of which its first tokens are made.
        record: The run's record of them.
        masses: Ids by the name of a set whose probability is looked for.
        word: Ids that go on with a word or a number.
    """

    task: str
    traces: tuple[Trace, ...]
    texts: tuple[str, ...]
    record: ReasoningRecord | GrammarRecord
    masses: Mapping[str, TokenIds] = field(default_factory=dict)
    word: TokenIds = ()

    def token_hash(self, tokenizer: Any = None) -> str:
        """Return the hash of all forced tokens; with another tokenizer, of them behind what it makes of the texts."""
        tokens = [list(trace.window.tokens) for trace in self.traces]
        if tokenizer is not None:
            tokens = [
                [*encode(tokenizer, text), *trace.forced] for text, trace in zip(self.texts, self.traces, strict=True)
            ]
        return digest({"task": self.task, "template": self.record.template_sha256, "tokens": tokens})


def traces_sha256(traces: tuple[Trace, ...]) -> str:
    """Return the sha256 of the token ids of traces, one after another."""
    return tokens_sha256([token for trace in traces for token in trace.window.tokens])

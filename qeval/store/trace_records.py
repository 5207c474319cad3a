"""The records of tasks along traces: chains of thought and calls of functions that the baseline wrote."""

from pydantic import BaseModel, ConfigDict


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TraceRecord(_Part):
    """One trace: the baseline's chain of thought on a question, or its call of a function."""

    item: int
    draw: int
    tokens: int
    ended: bool  # False: it reached the limit, and is cut there


class ReasoningRecord(_Part):
    """The questions that the baseline reasoned about, and its chains of thought, one a question."""

    source: str  # "shipped", a file's name, a hub id
    sha256: str  # of the questions' text
    tokens_sha256: str  # of the traces' token ids
    template_sha256: str
    questions: int
    longest_chain: int  # tokens
    thinks: bool  # whether the template names markers of thinking; else the chain is the answer itself
    cue: str  # the words before the answer, where the baseline does not give it
    in_own_words: int  # questions whose answer it gives: it stands behind its own words
    doubt: list[str]  # markers of doubt that are one token each
    traces: list[TraceRecord]


class GrammarRecord(_Part):
    """The prompts with functions that the baseline called, and its calls, several a prompt."""

    source: str  # "calls", a file's name, a hub id
    sha256: str  # of the prompts' text
    tokens_sha256: str  # of the traces' token ids
    template_sha256: str
    prompts: int
    prompts_left_out: int  # since they have no tools, or no message of the user last
    calls: int  # a prompt
    longest_call: int  # tokens
    opening: str  # the text that opens a call, which is forced
    engine: str  # "llguidance 1.9.1": what the masks are from
    traces: list[TraceRecord]

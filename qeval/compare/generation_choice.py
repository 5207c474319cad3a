"""The text that the baseline generates for tasks: greedy continuations, chains of thought, calls of functions."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from qeval.compare import arguments as read
from qeval.compare.options import Checked, Option
from qeval.errors import UsageError
from qeval.tasks.names import GRAMMAR, REASONING


@dataclass(frozen=True)
class DriftChoice(Checked):
    """The number of prompts that are continued, their length, and the tokens of a continuation."""

    prompts: Annotated[int, Option("With drift: prompts to continue.", keyword="drift_prompts", least=1)] = 32
    prompt_tokens: Annotated[
        int, Option("With drift: tokens of each prompt.", keyword="drift_prompt_tokens", least=1)
    ] = 64
    tokens: Annotated[int, Option("With drift: tokens that each is continued by.", keyword="drift_tokens", least=1)] = (
        64
    )


@dataclass(frozen=True)
class TraceChoice(Checked):
    """The questions to reason about, the length of a chain of thought, and the calls of each prompt with functions."""

    questions: Annotated[
        str | None,
        Option(
            "With reasoning: a file of JSON lines, each with question and answer, or a data set of the hub, "
            "ORG/NAME[[:CONFIG]:SPLIT]; default: 24 shipped questions.",
            keyword="reasoning_questions",
            parse=read.text_or_none,
        ),
    ] = None
    tokens: Annotated[
        int, Option("With reasoning: the most tokens of a chain of thought.", keyword="reasoning_tokens", least=1)
    ] = 1024
    calls: Annotated[
        int, Option("With grammar: calls that are sampled for each prompt.", keyword="grammar_calls", least=1)
    ] = 4

    def check_tasks(self, tasks: Sequence[str]) -> None:
        """Refuse settings of tasks that are not run.

        Raises:
            UsageError: It names them.
        """
        default = TraceChoice()
        if (self.questions, self.tokens) != (default.questions, default.tokens) and REASONING not in tasks:
            raise UsageError("--reasoning-questions and --reasoning-tokens are for --tasks reasoning; add it.")
        if self.calls != default.calls and GRAMMAR not in tasks:
            raise UsageError("--grammar-calls is for --tasks grammar; add it.")

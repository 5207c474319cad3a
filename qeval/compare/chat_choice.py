"""The prompts that a model answers for `--corpus chat`, and how it answers."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from qeval.compare import arguments as read
from qeval.compare.options import Checked, Option


@dataclass(frozen=True)
class ChatChoice(Checked):
    """The prompts, the template, and the answers' length and temperature."""

    prompts: Annotated[
        str | None,
        Option(
            "With --corpus chat: a file of JSON lines, each with messages (and tools) in OpenAI's form, a data set of "
            "the hub, ORG/NAME[:SPLIT], or parallel (six prompts in ten languages); default: 75 shipped prompts.",
            parse=read.text_or_none,
        ),
    ] = None
    template: Annotated[
        Path | None,
        Option("With --corpus chat: a chat template (Jinja) in place of the model's own.", parse=read.path_or_none),
    ] = None
    tokens: Annotated[
        int, Option("With --corpus chat: the most tokens of an answer.", keyword="chat_tokens", least=1)
    ] = 256
    temperature: Annotated[
        float,
        Option("With --corpus chat: 0, greedy answers; above, sampled by --seed.", keyword="chat_temperature", least=0),
    ] = 0.0

"""The tasks of questions and answers: MMLU's data, how many items, and the form of prompts."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from qeval.compare import arguments as read
from qeval.compare.options import Checked, Option
from qeval.errors import UsageError
from qeval.tasks.prompt_form import PromptForm

Switch = Literal["true", "false"]


@dataclass(frozen=True)
class TaskChoice(Checked):
    """The tasks of questions."""

    mmlu_dir: Annotated[
        Path | None,
        Option("Folder with dev/ and test/ in MMLU's csv layout; default: from the hub.", parse=read.path_or_none),
    ] = None
    subjects: Annotated[
        tuple[str, ...], Option("Comma-separated MMLU subjects.", type=str | None, parse=read.subject_names)
    ] = ()
    limit: Annotated[int | None, Option("Questions a subject; prompts of grammar.", least=1, range_shown=False)] = None
    shots: Annotated[int, Option("Examples in a prompt.", least=0)] = 5
    apply_chat_template: Annotated[
        bool, Option("Ask tasks under the model's chat template, as lm-eval's flag of that name does.")
    ] = False
    fewshot_as_multiturn: Annotated[
        Switch,
        Option("With --apply-chat-template: true, each example is a turn of its own; false: all stand in one."),
    ] = "true"
    system_instruction: Annotated[
        str | None, Option("What stands before every prompt of a task.", parse=read.text_or_none)
    ] = None

    @property
    def form(self) -> PromptForm:
        """The form of a task's prompts."""
        return PromptForm(self.apply_chat_template, self.fewshot_as_multiturn == "true", self.system_instruction)

    def __post_init__(self) -> None:
        """Refuse turns without a chat.

        Raises:
            UsageError: Turns of examples without a chat template.
        """
        super().__post_init__()
        if self.fewshot_as_multiturn == "false" and not self.apply_chat_template:
            raise UsageError("--fewshot-as-multiturn is for --apply-chat-template; add it, or leave this out.")

"""The form of a task's prompts; light, since settings name it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class PromptForm:
    """The form of a task's prompts, by the harness's own flags.

    Attributes:
        chat: Whether they stand under the tokenizer's chat template.
        multiturn: Whether each example is a turn of its own there.
        system: What is said before everything else.
    """

    chat: bool = False
    multiturn: bool = True
    system: str | None = None

    @property
    def title(self) -> str:
        """The end of a task's title."""
        return ", chat template" if self.chat else ""


PLAIN = PromptForm()

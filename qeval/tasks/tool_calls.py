"""The form in which a chat template writes calls of functions: the text that opens one, and the JSON object in it."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qeval.errors import UsageError
from qeval.escape import cut
from qeval.tasks.chat_prompts import ToolSchema
from qeval.tasks.chat_template import ChatTemplate

_NAME, _ARGUMENTS = "qeval_function", {"qeval_argument": 7}
_TOOL = {
    "type": "function",
    "function": {
        "name": _NAME,
        "description": "A function.",
        "parameters": {"type": "object", "properties": {"qeval_argument": {"type": "integer"}}},
    },
}
_CALL = {"id": "qeval0001", "type": "function", "function": {"name": _NAME, "arguments": _ARGUMENTS}}
_USER = {"role": "user", "content": "Hello"}


@dataclass(frozen=True)
class CallForm:
    """A template's calls.

    Attributes:
        opening: The text between the prompt and the object.
        keys: What the object's keys hold, in their order: `name`, `arguments`, or another text.
    """

    opening: str
    keys: Mapping[str, str]

    def schemas(self, tools: Sequence[ToolSchema]) -> list[dict[str, Any]]:
        """Return the JSON Schema of a call of each tool."""
        return [self._schema(tool["function"]) for tool in tools]

    def _schema(self, function: Mapping[str, Any]) -> dict[str, Any]:
        kinds = {
            "name": {"const": function["name"]},
            "arguments": function.get("parameters", {"type": "object"}),
            "text": {"type": "string"},
        }
        properties = {key: kinds[kind] for key, kind in self.keys.items()}
        return {
            "type": "object", "properties": properties, "required": list(properties), "additionalProperties": False,
        }  # fmt: skip


def call_form(template: ChatTemplate, tokenizer: Any) -> CallForm:
    """Return the form of a template's calls, from how it writes one of a function that no model has.

    Raises:
        UsageError: It takes no tools, or writes calls otherwise than as an object with a name and arguments.
    """
    if not template.takes_tools:
        raise UsageError("The chat template takes no tools, and --tasks grammar has functions called; leave it out.")
    where = "a call of a function"
    asked = template.render(tokenizer, [_USER], [_TOOL], where)
    answered: list[Mapping[str, Any]] = [_USER, {"role": "assistant", "content": "", "tool_calls": [_CALL]}]
    whole = template.render_whole(tokenizer, answered, [_TOOL], where)

    # a prompt that begins to think is closed before the call
    begun, closing = asked, ""
    if template.markers and asked.rstrip().endswith(template.markers.begin):
        begun = asked.rstrip().removesuffix(template.markers.begin)
        closing = f"\n{template.markers.end}\n\n"
    answer = whole.removeprefix(begun)
    found = next(_objects(answer), None)
    if found is None or len(answer) == len(whole):
        raise UsageError(
            "The chat template writes calls of functions otherwise than as a JSON object with a name and arguments "
            f"({cut(answer[-200:])}), which --tasks grammar can't check; leave it out."
        )
    start, keys = found
    return CallForm(closing + (answer[:start].lstrip() if closing else answer[:start]), keys)


def _objects(text: str) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield the start and the keys of each object in a text that holds the name and the arguments of the call."""
    for start in (place for place, letter in enumerate(text) if letter == "{"):
        try:
            found, _ = json.JSONDecoder().raw_decode(text, start)
        except ValueError:
            continue
        keys = {key: _kind(value) for key, value in found.items()}
        if {"name", "arguments"} <= set(keys.values()):
            yield start, keys


def _kind(value: object) -> str:
    if value == _NAME:
        return "name"
    return "arguments" if value == _ARGUMENTS else "text"

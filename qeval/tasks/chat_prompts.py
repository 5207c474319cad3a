"""Conversations for a model to answer: the shipped ones, a user's JSON lines, or rows of a data set on the hub.

A row is an object with `messages` and, where the model may call functions, `tools`, both as OpenAI's chat API has them;
`kind` and `language` name the groups that it is counted in, and other keys are not looked at. The model answers where a
message of the user or of a tool is the last, or is followed by another of the user; answers that a row holds already
stay as they are, but for one at the very end, in whose place the model answers.
"""

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from qeval.errors import UsageError
from qeval.escape import cut
from qeval.parsing import distinct, parse_json
from qeval.paths import shipped
from qeval.tasks.corpus import fetch_lines, read_text
from qeval.tasks.hub_data import HubText

Message = Mapping[str, Any]
"""One message of a conversation: `role`, `content`, and what else OpenAI's form has."""
ToolSchema = Mapping[str, Any]

SHIPPED = {
    "shipped": "tasks/chat/prompts.jsonl",
    "parallel": "tasks/chat/parallel.jsonl",
    "calls": "tasks/chat/calls.jsonl",
}
"""The prompts of the project's own: of many kinds; the same six in ten languages; with functions to call."""
CALLS = "calls"
_HUB_ID = re.compile(r"([\w.-]+/[\w.-]+?)(?::([\w.-]+))?")
_HUB_ROWS = 256
"""The number of rows of a data set that are taken, the first."""
_ROLES = ("system", "developer", "user", "assistant", "tool")
_COLUMNS = ("messages", "tools", "kind", "language")
_ASKING = ("user", "tool")
_UNNAMED = "other"


@dataclass(frozen=True)
class ChatPrompt:
    """A conversation to answer.

    `where` is what errors call it. `kind` and `language` name the groups that its answers are counted in.
    """

    where: str
    kind: str
    language: str
    messages: tuple[Message, ...]
    tools: tuple[ToolSchema, ...] = ()

    @property
    def pieces(self) -> tuple[tuple[Message, ...], ...]:
        """The messages before each answer, those after the answer before."""
        ends = [at + 1 for at in range(len(self.messages)) if self._is_answered(at)]
        return tuple(self.messages[start:end] for start, end in zip([0, *ends], ends, strict=False))

    def _is_answered(self, at: int) -> bool:
        following = self.messages[at + 1]["role"] if at + 1 < len(self.messages) else "user"
        return self.messages[at]["role"] in _ASKING and following == "user"


class PromptSet(NamedTuple):
    """Conversations, the name of where they come from, and the sha256 of their text."""

    source: str
    prompts: tuple[ChatPrompt, ...]
    sha256: str


def load_prompts(source: str | None) -> PromptSet:
    """Return the conversations of a source.

    Args:
        source: A file of JSON lines, a hub id `ORG/NAME[:SPLIT]`, or a key of `SHIPPED`; None for its first.

    Raises:
        UsageError: There is no such source, or a row is none; it says which and why.
    """
    where = hub_prompts(source)
    if where is not None:
        text, name = fetch_prompts(where), where.hub_id
    elif source is None or (source in SHIPPED and not Path(source).is_file()):
        name = source or "shipped"
        text = read_text(shipped(SHIPPED[name]))
    else:
        path = Path(source).expanduser()
        if not path.is_file():
            raise UsageError(
                f"--prompts {source}: no such file; give a file of JSON lines, a data set of the hub as ORG/NAME, or "
                f"one of {', '.join(SHIPPED)}."
            )
        text, name = read_text(path), path.name
    lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    prompts = tuple(_prompt(line, f"{name}, line {number}") for number, line in lines)
    return PromptSet(name, prompts, hashlib.sha256(text.encode()).hexdigest())


def hub_prompts(source: str | None) -> HubText | None:
    """Return the data set that a source names; None where it is a file, or the shipped prompts."""
    if source is None or Path(source).expanduser().exists():
        return None
    match = _HUB_ID.fullmatch(source)
    if match is None or Path(match[1]).suffix in (".jsonl", ".json", ".txt"):
        return None
    return HubText(match[1], None, match[2] or "train", "messages", "\n", documents=_HUB_ROWS)


def fetch_prompts(where: HubText) -> str:
    """Return the rows of a data set as JSON lines: as they were stored here, else from the hub or its cache.

    Raises:
        UsageError: It can't be loaded.
    """
    return fetch_lines(where, _COLUMNS, "Give a file of JSON lines as --prompts instead.")


def _prompt(line: str, where: str) -> ChatPrompt:
    row = parse_json(line, where, distinct)
    if not isinstance(row, dict) or not isinstance(row.get("messages"), list) or not row["messages"]:
        raise UsageError(f"{where} holds no prompt: it must be an object with a list of messages.")
    messages = [_message(each, f"{where}, message {place}") for place, each in enumerate(row["messages"], 1)]
    while messages and messages[-1]["role"] == "assistant" and not messages[-1].get("tool_calls"):
        messages.pop()
    if not messages or messages[-1]["role"] not in _ASKING:
        raise UsageError(f"{where} leaves nothing to answer: no message of the user or of a tool is the last.")
    return ChatPrompt(
        where=where,
        kind=_name(row, "kind", where),
        language=_name(row, "language", where),
        messages=tuple(messages),
        tools=tuple(_tools(row.get("tools"), where)),
    )


def _name(row: Mapping[str, Any], key: str, where: str) -> str:
    name = row.get(key) or _UNNAMED
    if not isinstance(name, str):
        raise UsageError(f"{where}: its {key} must be a text, not {cut(name)}.")
    return name


def _message(message: object, where: str) -> Message:
    """Return a message in the form that templates take: text as one string, arguments of calls as objects."""
    if not isinstance(message, dict) or message.get("role") not in _ROLES:
        role = message.get("role") if isinstance(message, dict) else message
        raise UsageError(f"{where} has no role among {', '.join(_ROLES)}, but {cut(role)}.")
    calls = message.get("tool_calls") or []
    if not isinstance(calls, list):
        raise UsageError(f"{where}: its tool_calls must be a list, not {cut(calls)}.")
    clean = {name: value for name, value in message.items() if value is not None and name != "tool_calls"}
    clean["content"] = _content(message.get("content"), where, may_lack=bool(calls))
    return clean | ({"tool_calls": [_call(each, where) for each in calls]} if calls else {})


def _content(content: object, where: str, *, may_lack: bool) -> str:
    if isinstance(content, list):
        parts = [
            part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in content
        ]
        if not all(isinstance(part, str) for part in parts):
            raise UsageError(f"{where} has a part that is no text, and the prompts of --corpus chat are text alone.")
        return "".join(str(part) for part in parts)
    if content is None and may_lack:
        return ""
    if not isinstance(content, str):
        raise UsageError(f"{where} has no text as its content, but {cut(content)}.")
    return content


def _call(call: object, where: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(call, dict) or not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise UsageError(f"{where} calls no function: a call is an object with a function that has a name.")
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        arguments = parse_json(arguments, f"{where}: the arguments of {function['name']}", distinct)
    return {**call, "function": {**function, "arguments": arguments}}


def _tools(tools: object, where: str) -> Iterable[ToolSchema]:
    if tools is None:
        return
    if isinstance(tools, str):  # some data sets hold them as text
        tools = parse_json(tools, f"{where}: its tools", distinct)
    if not isinstance(tools, list):
        raise UsageError(f"{where}: its tools must be a list, not {cut(tools)}.")
    for place, tool in enumerate(tools, 1):
        if reason := _wrong_tool(tool):
            raise UsageError(f"{where}: tool {place} is none: {reason}.")
        yield tool


def _wrong_tool(tool: object) -> str | None:
    """Return what keeps an object from being a function's description with a JSON Schema of its arguments, or None."""
    function = tool.get("function") if isinstance(tool, dict) else None
    if not isinstance(tool, dict) or tool.get("type") != "function" or not isinstance(function, dict):
        return 'it must be {"type": "function", "function": {...}}'
    if not isinstance(function.get("name"), str) or not function["name"]:
        return "its function has no name"
    schema = function.get("parameters", {"type": "object"})
    if not isinstance(schema, dict) or schema.get("type") != "object":
        return f"the parameters of {function['name']} must be a JSON Schema of type object"
    properties, required = schema.get("properties", {}), schema.get("required", [])
    if not isinstance(properties, dict) or not all(isinstance(each, dict) for each in properties.values()):
        return f"the properties of {function['name']} must be JSON Schemas by name"
    if not isinstance(required, list) or not _within(required, properties):
        return f"{function['name']} requires parameters that its properties do not have"
    return None


def _within(names: Sequence[object], properties: Mapping[str, Any]) -> bool:
    return all(isinstance(name, str) and name in properties for name in names)

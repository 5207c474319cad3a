"""The forms in which chat templates write calls of functions, and those that can't be checked."""

import pytest

from qeval.errors import UsageError
from qeval.tasks.chat_template import ChatTemplate
from qeval.tasks.tool_calls import call_form
from tests.fixtures.tiny import tiny_tokenizer
from tests.fixtures.traces import TEMPLATE, TOOL

CALLS = "{% for c in m.tool_calls or [] %}"
TOOLS = "{{ tools | tojson }}"
START = TOOLS + "{% for m in messages %}<{{ m.role }}>{{ m.content }}" + CALLS
ASK = "{% endfor %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
OBJECT = '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}'
HERMES = f"<tool_call>\n{OBJECT}\n</tool_call>"
LLAMA = OBJECT.replace('"arguments"', '"parameters"')
MISTRAL = "[TOOL_CALLS][" + OBJECT[:-1] + ', "id": "{{ c.id }}"}]'
TAGS = "<function={{ c.function.name }}>{{ c.function.arguments | tojson }}</function>"


def form_of(call, before="", text=None):
    template = text or (START + before + call + ASK)
    return call_form(ChatTemplate(template, None), tiny_tokenizer())


@pytest.mark.parametrize(
    ("call", "opening", "keys"),
    [
        (HERMES, "<tool_call>\n", ["name", "arguments"]),
        (LLAMA, "", ["name", "parameters"]),
        (MISTRAL, "[TOOL_CALLS][", ["name", "arguments", "id"]),
    ],
)
def test_the_opening_and_the_schema_are_the_templates(call, opening, keys):
    form = form_of(call)
    assert form.opening == opening
    (schema,) = form.schemas([TOOL])
    assert list(schema["properties"]) == schema["required"] == keys
    assert schema["properties"]["name"] == {"const": "add"}
    assert schema["properties"][keys[1]] == TOOL["function"]["parameters"]
    assert schema["additionalProperties"] is False
    assert schema["properties"].get("id", {"type": "string"}) == {"type": "string"}


def test_a_prompt_that_begins_to_think_is_closed_before_the_call():
    text = (START + HERMES + ASK).replace("<assistant>{% endif %}", "<assistant><think>\n{% endif %}{# </think> #}")
    assert form_of("", text=text).opening == "\n</think>\n\n<tool_call>\n"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (START + TAGS + ASK, "otherwise than as a JSON object with a name and arguments"),
        (TOOLS + "{% for m in messages %}{{ m.content }}{% endfor %}", "otherwise than as a JSON object"),
        (TEMPLATE.replace("tools", "other"), "takes no tools, and --tasks grammar"),
    ],
)
def test_a_template_whose_calls_are_other_or_none_is_refused(text, reason):
    with pytest.raises(UsageError, match=reason):
        form_of("", text=text)

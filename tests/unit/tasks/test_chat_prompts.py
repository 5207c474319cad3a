"""Prompts of `--corpus chat`: the shipped ones, a user's file, a data set of the hub; and templates."""

import json
from collections import Counter

import datasets
import pytest
from transformers import PreTrainedTokenizerFast

from qeval.errors import UsageError
from qeval.tasks.chat_prompts import hub_prompts, load_prompts
from qeval.tasks.chat_template import ChatTemplate, Markers, template_of, thinking_tokens
from tests.fixtures.chat import TEMPLATE, THINKING
from tests.fixtures.tiny import tiny_tokenizer

USER = {"role": "user", "content": "Hi"}
CALL = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}


def loaded(tmp_path, *rows):
    path = tmp_path / "p.jsonl"
    path.write_text("\n\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return load_prompts(str(path)).prompts


def test_the_shipped_prompts_are_of_every_kind_and_distinct():
    source, prompts, sha256 = load_prompts(None)
    assert (source, len(prompts), len(sha256)) == ("shipped", 75, 64)
    assert Counter(prompt.kind for prompt in prompts) == {
        "general": 20, "languages": 18, "code": 14, "maths": 14, "tools": 9,
    }  # fmt: skip
    assert len({json.dumps([*prompt.messages]) for prompt in prompts}) == 75
    assert len({prompt.language for prompt in prompts}) == 17
    assert {prompt.kind for prompt in prompts[:5]} == {"general", "code", "maths", "languages", "tools"}
    assert all(prompt.tools for prompt in prompts if prompt.kind == "tools")
    assert max(len(prompt.pieces) for prompt in prompts) == 2


def test_the_parallel_prompts_are_the_same_in_ten_languages():
    source, prompts, _ = load_prompts("parallel")
    assert source == "parallel"
    assert len({str(prompt.messages) for prompt in prompts}) == 60
    assert set(Counter(prompt.language for prompt in prompts).values()) == {6}
    kinds = [prompt.kind for prompt in prompts]
    assert all(len(set(kinds[start : start + 10])) == 1 for start in range(0, 60, 10))


def test_an_answer_stands_after_the_last_message_and_between_two_of_the_user(tmp_path):
    old, tool = {"role": "assistant", "content": "Old"}, {"role": "tool", "content": "3"}
    asked = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    two, kept, dropped, called = loaded(
        tmp_path,
        {"messages": [{"role": "system", "content": "S"}, USER, USER]},
        {"messages": [USER, old, USER]},
        {"messages": [USER, old, USER, old]},
        {"messages": [USER, asked, tool]},
    )
    assert [len(piece) for piece in two.pieces] == [2, 1]
    assert [[m["role"] for m in piece] for piece in kept.pieces] == [["user", "assistant", "user"]]
    assert dropped.pieces == kept.pieces
    (piece,) = called.pieces
    assert piece[1]["tool_calls"][0]["function"]["arguments"] == {"a": 1}
    assert piece[1]["content"] == ""


def test_parts_of_text_are_one_text_and_groups_have_names(tmp_path):
    content = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    (prompt,) = loaded(tmp_path, {"messages": [{"role": "user", "content": content}], "kind": "x", "score": 3})
    assert prompt.messages[0]["content"] == "ab"
    assert (prompt.kind, prompt.language) == ("x", "other")


def function(**parts):
    return [{"type": "function", "function": parts}]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (["no object"], "line 1 holds no prompt"),
        ({"messages": []}, "line 1 holds no prompt"),
        ({"messages": [{"role": "human", "content": "x"}]}, "message 1 has no role among"),
        ({"messages": [{"role": "user", "content": 3}]}, "message 1 has no text as its content, but 3"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "has a part that is no text"),
        ({"messages": [{"role": "system", "content": "x"}]}, "leaves nothing to answer"),
        ({"messages": [USER], "kind": 4}, "its kind must be a text, not 4"),
        ({"messages": [USER], "tools": {"name": "f"}}, "its tools must be a list"),
        ({"messages": [USER], "tools": [{"name": "f"}]}, "tool 1 is none: it must be"),
        ({"messages": [USER], "tools": function(parameters={"type": "object"})}, "its function has no name"),
        ({"messages": [USER], "tools": function(name="f", parameters=["a"])}, "must be a JSON Schema of type object"),
        (
            {
                "messages": [USER],
                "tools": function(name="f", parameters={"type": "object", "properties": {"a": "int"}}),
            },
            "the properties of f must be JSON Schemas",
        ),
        (
            {"messages": [USER], "tools": function(name="f", parameters={"type": "object", "required": ["a"]})},
            "f requires parameters that its properties do not have",
        ),
        (
            {
                "messages": [
                    USER,
                    {"role": "assistant", "tool_calls": [{"function": {}}]},
                    {"role": "tool", "content": ""},
                ]
            },
            "message 2 calls no function",
        ),
    ],
)
def test_a_line_that_is_no_prompt_is_named(tmp_path, row, message):
    with pytest.raises(UsageError, match=r"p\.jsonl, line 1") as caught:
        loaded(tmp_path, row)
    assert message in str(caught.value)
    with pytest.raises(UsageError, match=r"p\.jsonl, line 3"):
        loaded(tmp_path, {"messages": [USER]}, row)


def test_a_data_set_of_the_hub_is_read_once(tmp_path, monkeypatch):
    monkeypatch.setenv("QEVAL_HOME", str(tmp_path))
    asked = []

    def load_dataset(hub_id, config, *, split, streaming):
        asked.append((hub_id, split))
        return [{"messages": [USER, {"role": "assistant", "content": "x"}], "prompt_id": 3} for _ in range(300)]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    first, again = (load_prompts("someone/chats:train_sft") for _ in range(2))
    assert first == again
    assert asked == [("someone/chats", "train_sft")]
    assert (first.source, len(first.prompts)) == ("someone/chats", 256)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: [{"text": "x"}])
    with pytest.raises(UsageError, match="has no column messages"):
        load_prompts("someone/other")


def test_files_are_no_data_sets(tmp_path):
    assert hub_prompts("folder/mine.jsonl") is None
    assert hub_prompts(str(tmp_path)) is None
    assert hub_prompts("org/name").split == "train"


def test_a_template_renders_the_same_tomorrow():
    template = ChatTemplate(" {{ strftime_now('%d %B %Y') }} {{ date_string }}\n", None)
    assert template.render(tiny_tokenizer(), [USER], [], "a prompt") == " 01 January 2025 01 Jan 2025"
    day = ChatTemplate("{% set day = strftime_now('%Y-%m-%d, %a') %}{{ day }}", None)
    assert day.render(tiny_tokenizer(), [USER], [], "a prompt") == "2025-01-01, Wed"


def test_a_template_that_refuses_a_message_says_so():
    template = ChatTemplate("{{ raise_exception('System role not supported') }}", "g.jinja")
    with pytest.raises(UsageError, match=r"--template g\.jinja can't be used for line 4: System role not supported"):
        template.render(tiny_tokenizer(), [USER], [], "line 4")


def test_the_end_of_a_turn_is_the_special_token_behind_an_answer():
    tokenizer: PreTrainedTokenizerFast = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    ends = ChatTemplate(TEMPLATE.replace(";", "<|end|>\n"), None)
    assert ends.end_of_turn(tokenizer) == tokenizer.convert_tokens_to_ids("<|end|>")
    assert ChatTemplate(TEMPLATE, None).end_of_turn(tokenizer) is None


def test_tools_and_markers_are_those_that_the_template_names():
    assert ChatTemplate(TEMPLATE, None).takes_tools
    assert not ChatTemplate("{{ messages }}", None).takes_tools
    assert ChatTemplate(TEMPLATE, None).markers is None
    assert ChatTemplate(THINKING, None).markers == Markers("<think>", "</think>")


@pytest.mark.parametrize(
    ("prompt", "texts", "count"),
    [
        ("<assistant>", ["<th", "ink>", "hm", "</", "think>", "\n", "4"], 5),
        ("<assistant><think>\n", ["hm", "</think>", "4"], 2),
        ("<assistant><think>", ["hm", "hm"], 2),
        ("<assistant>", ["4", "</think>"], 0),
        ("<assistant><think></think>", ["4"], 0),
    ],
)
def test_thinking_ends_with_its_marker(prompt, texts, count):
    assert thinking_tokens(prompt, texts, Markers("<think>", "</think>")) == count
    assert thinking_tokens(prompt, texts, None) == 0


def test_of_several_templates_the_default_is_taken():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = {"default": "A", "tool_use": "B"}
    assert template_of(tokenizer, None) == ChatTemplate("A", None)
    tokenizer.chat_template = {"rag": "C"}
    with pytest.raises(UsageError, match="has no chat template"):
        template_of(tokenizer, None)

"""Masks of a call's grammar against texts spelled out, and every schema that is none."""

import sys

import pytest

from qeval.errors import UsageError
from tests.fixtures.tiny import tiny_tokenizer
from tests.fixtures.traces import END, HEAD, SCHEMA, TOKENS

CALL = {
    "type": "object",
    "properties": {"name": {"const": "add"}, "arguments": SCHEMA | {"additionalProperties": False}},
    "required": ["name", "arguments"],
    "additionalProperties": False,
}


def test_without_llguidance_the_extra_is_named(monkeypatch):
    from qeval.tasks.grammar import GrammarVocabulary

    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(UsageError, match=r"--tasks grammar takes llguidance; pip install 'qeval\[grammar\]'"):
        GrammarVocabulary.of(tiny_tokenizer(), 256)


@pytest.fixture(scope="module")
def tokenizer():
    pytest.importorskip("llguidance", reason="masks of grammars take llguidance")
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(list(TOKENS))
    tokenizer.add_special_tokens({"eos_token": END})
    return tokenizer


@pytest.fixture(scope="module")
def grammar(tokenizer):
    from qeval.tasks.grammar import GrammarVocabulary, call_grammar

    return call_grammar([CALL], GrammarVocabulary.of(tokenizer, 288), "p.jsonl, line 1")


def allowed_after(grammar, tokenizer, text):
    """The texts of the tokens that may follow a text of single bytes."""
    matcher = grammar.matcher()
    for letter in text:
        matcher.take(tokenizer.encode(letter, add_special_tokens=False)[0])
    ids = matcher.allowed().nonzero().flatten().tolist()
    return {tokenizer.decode([token]) for token in ids if token < len(tokenizer)}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", {"{", HEAD, " ", "\n", "\t", "\r"}),
        ('{"', {"n", "name"}),  # one byte too, though the tokenizer would say it in one token
        ('{"name": "add", "arguments": {"n"', {":", " ", "\n", "\t", "\r"}),
        ('{"name": "add", "arguments": {"n": 1', {*"0123456789", "}", "}}", " ", "\n", "\t", "\r"}),
    ],
)
def test_every_spelling_of_a_valid_call_is_allowed_and_nothing_else(grammar, tokenizer, text, expected):
    found = allowed_after(grammar, tokenizer, text)
    if text.endswith("1"):
        found -= {".", "e", "E"}  # 1.0 and 1e2 are integers to JSON Schema
    assert found == expected


def test_a_call_is_complete_at_its_last_brace_and_any_text_may_follow(grammar, tokenizer):
    ids = tuple(tokenizer.encode(HEAD + "12}}", add_special_tokens=False))
    path = grammar.path(ids)
    assert path.is_complete
    assert len(path.masks) % len(ids) == 0
    assert not grammar.path(ids[:-1]).is_complete
    assert {"x", "}}", "{"} <= allowed_after(grammar, tokenizer, HEAD + "12}}")


@pytest.mark.parametrize(
    ("schema", "reason"),
    [({"type": "frog"}, "Invalid type: frog"), ({"$ref": "#/nowhere"}, "nowhere"), ({"not": {}}, "not")],
)
def test_parameters_that_are_no_schema_are_refused_with_the_prompts_place(grammar, schema, reason):
    from qeval.tasks.grammar import call_grammar

    with pytest.raises(
        UsageError, match=rf"p.jsonl, line 7: the parameters of its tools are no JSON Schema .*{reason}"
    ):
        call_grammar([schema], grammar.vocabulary, "p.jsonl, line 7")


def test_a_tokenizer_without_an_end_is_refused(tokenizer):
    from qeval.tasks.grammar import GrammarVocabulary

    with pytest.raises(UsageError, match="has no EOS token"):
        GrammarVocabulary.of(tiny_tokenizer(), 256)

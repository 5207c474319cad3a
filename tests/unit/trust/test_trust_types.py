"""No causal model type of transformers is scored wrong or crashes: it agrees with full passes, or says why not."""

import json

import pytest

from qeval.cli.app import run_program
from qeval.jobs import causal_types
from qeval.jobs.causal_types import TypeRow, any_fault, check_type, lines_of
from qeval.models.tiny import CAUSAL_TYPES


@pytest.mark.slow
def test_every_causal_type_agrees_or_says_why_not(capsys):
    assert run_program(["models", "--check", "--all", "--json", "--quiet"]) == 0
    rows = [TypeRow(**row) for row in json.loads(capsys.readouterr().out)]
    assert [row.model_type for row in rows] == [*CAUSAL_TYPES]
    assert sum(row.outcome == "agrees" for row in rows) > len(rows) / 2
    assert all(len(row.line) > 3 for row in rows)


@pytest.mark.parametrize("model_type", ["llama", "doge", "falcon", "openai-gpt", "gpt_oss", "deepseek_v3", "gemma2"])
def test_types_that_share_prefixes_in_different_ways(model_type):
    row = check_type(model_type)
    assert row.outcome in ("agrees", "refused"), row.line


@pytest.mark.parametrize(
    ("model_type", "says"),
    [
        ("bloom", "names no context length"),
        ("gemma4_text", "layers are not of one size (they differ in head_dim)"),
        ("musicgen", "of several language models"),
        ("mamba", "keep a running state"),
    ],
)
def test_types_that_are_refused_in_a_sentence(model_type, says):
    row = check_type(model_type)
    assert row.outcome == "refused"
    assert says in row.line


def test_wrong_scores_and_failures_are_told_apart(monkeypatch):
    monkeypatch.setattr(causal_types, "_difference", lambda model: 0.5)
    assert check_type("llama") == TypeRow("llama", "wrong", "5.0e-01 nats")

    def fail(_):
        raise RuntimeError("shapes")

    monkeypatch.setattr(causal_types, "_difference", fail)
    assert check_type("llama") == TypeRow("llama", "crash", "RuntimeError: shapes")
    rows = [check_type("llama"), TypeRow("mistral", "agrees", "1e-07 nats")]
    assert any_fault(rows) and not any_fault(rows[1:])
    assert lines_of(rows)[-1] == ("2 causal model types: 1 agrees, 0 refused, 0 not buildable, 0 wrong, 1 crash.")


def test_the_flag_goes_with_check_alone(capsys):
    assert run_program(["models", "--all"]) == 2
    assert run_program(["models", "--check", "--all", "--family", "Llama"]) == 2
    assert "--all belongs to --check" in capsys.readouterr().err

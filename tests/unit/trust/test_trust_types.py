"""No causal model type of transformers is scored wrong or crashes: it agrees with full passes, or says why not."""

import json

import pytest

from qeval.cli.app import run_program
from qeval.jobs import causal_types, type_uses
from qeval.jobs.causal_types import TypeRow, any_fault, check_type, lines_of, use_reasons
from qeval.jobs.type_uses import TRIED_METHODS, USES, WORKS
from qeval.models.tiny import CAUSAL_TYPES


@pytest.mark.slow
def test_every_causal_type_agrees_or_says_why_not(capsys):
    assert run_program(["models", "--check", "--all", "--json", "--quiet"]) == 0
    rows = [TypeRow(**row) for row in json.loads(capsys.readouterr().out)]
    assert [row.model_type for row in rows] == [*CAUSAL_TYPES]
    assert sum(row.outcome == "agrees" for row in rows) > 0.9 * len(rows)
    assert sum(row.outcome == "refused" for row in rows) < 5
    assert all(len(row.line) > 3 for row in rows)
    agreeing = [row for row in rows if row.outcome == "agrees"]
    assert all([*row.uses] == [*USES] for row in agreeing)
    assert sum(row.uses[use] == WORKS for row in agreeing for use in TRIED_METHODS) > 0.95 * len(agreeing) * len(
        TRIED_METHODS
    )


PREFIX_USES = {
    "llama": "lent", "doge": "lent", "falcon": "lent", "deepseek_v3": "lent", "gemma2": "lent", "mamba": "stepwise",
    "qwen3_next": "copied", "openai-gpt": "whole",
}  # fmt: skip


@pytest.fixture
def scores_alone(monkeypatch):
    monkeypatch.setattr(causal_types, "try_uses", lambda _: {})


@pytest.mark.usefixtures("scores_alone")
@pytest.mark.parametrize(("model_type", "use"), PREFIX_USES.items())
def test_types_that_share_prefixes_in_different_ways(model_type, use):
    row = check_type(model_type)
    assert (row.outcome, row.prefix) == ("agrees", use), row.line


@pytest.mark.parametrize(
    ("model_type", "says"),
    [
        ("prophetnet", "a text's length changes its states"),
        ("cpmant", "attends to what stands behind a token too"),
        ("gemma4_unified_assistant", "drafts for another model"),
    ],
)
def test_types_that_are_refused_in_a_sentence(model_type, says):
    row = check_type(model_type)
    assert row.outcome == "refused"
    assert says in row.line


def test_a_type_of_which_transformers_makes_no_causal_model_is_no_refusal_of_ours():
    row = check_type("musicgen")
    assert row.outcome == "not buildable"
    assert "codes of sound" in row.line


def test_the_uses_of_a_type_are_tried_or_have_a_sentence(monkeypatch):
    uses = check_type("dory").uses
    assert [*uses] == [*USES]
    assert {uses[method] for method in TRIED_METHODS} == {WORKS}
    assert uses["stream"].startswith("This model runs its decoder layers in an order of its own")
    assert "not of this model" in uses["gguf"]

    def fail(*_):
        raise KeyError("a matrix")

    monkeypatch.setattr(type_uses, "build_meta_model", fail)
    monkeypatch.setattr(type_uses, "TRIED_METHODS", {"rtn": "rtn:g512"})
    row = check_type("llama")
    assert row.uses["rtn"].startswith("Blocks of 512 are larger than a row of")
    assert row.uses["stream"] == "fault: KeyError: 'a matrix'"
    assert row.uses["gguf"] == WORKS
    assert any_fault([row])
    assert [*use_reasons([row]).values()][:2] == [["llama (rtn)"], ["llama (stream)"]]
    marks = [cell.strip() for cell in lines_of([row])[2].split("|")[4:11]]
    assert (marks[0], marks[4], marks[6]) == ("-", "NO", "yes")


@pytest.mark.usefixtures("scores_alone")
def test_wrong_scores_and_failures_are_told_apart(monkeypatch):
    monkeypatch.setattr(causal_types, "_difference", lambda model, session: 0.5)
    assert check_type("llama") == TypeRow("llama", "wrong", "5.0e-01 nats", "lent")

    def fail(*_):
        raise RuntimeError("shapes")

    monkeypatch.setattr(causal_types, "_difference", fail)
    rows = [check_type("llama"), TypeRow("mistral", "agrees", "1e-07 nats")]
    assert rows[0] == TypeRow("llama", "crash", "RuntimeError: shapes")
    assert any_fault(rows) and not any_fault(rows[1:])
    assert lines_of(rows)[-1] == ("2 causal model types: 1 agrees, 0 refused, 0 not buildable, 0 wrong, 1 crash.")


@pytest.mark.usefixtures("scores_alone")
def test_what_keeps_a_model_from_being_quantized_is_told_beside_its_scores(monkeypatch):
    def fail(_):
        raise KeyError("a matrix")

    monkeypatch.setattr(causal_types, "describe_model", fail)
    row = check_type("llama")
    assert row.outcome == "agrees"
    assert row.quantizing == "It can't be described (KeyError: 'a matrix')."
    head, _, line, *_ = lines_of([row])
    assert [cell.strip() for cell in head.split("|")[1:4]] == ["model type", "outcome", "prefix"]
    assert line.endswith(f"nats | {row.quantizing} |")


def test_the_flag_goes_with_check_alone(capsys):
    assert run_program(["models", "--all"]) == 2
    assert run_program(["models", "--check", "--all", "--family", "Llama"]) == 2
    assert "--all belongs to --check" in capsys.readouterr().err

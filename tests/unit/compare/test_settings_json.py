"""What a run was asked for, to plain values and back; what of it two commands on one run may differ in."""

import json
from dataclasses import fields, replace
from pathlib import Path

import pytest

from qeval.compare.chat_choice import ChatChoice
from qeval.compare.endpoint_choice import EndpointChoice
from qeval.compare.generation_choice import DriftChoice, TraceChoice
from qeval.compare.needle_choice import NeedleChoice
from qeval.compare.settings import (
    BackendChoice,
    CalibrationChoice,
    CorpusChoice,
    ModelChoice,
    Settings,
)
from qeval.compare.settings_json import identity_of, settings_json, settings_of
from qeval.compare.task_choice import TaskChoice
from qeval.compare.vllm_choice import VllmChoice
from qeval.config import GridRule, Recipe
from qeval.store.run import read_run
from qeval.types import Sampler
from tests.fixtures.runs import make_run

SETTINGS = Settings(
    model=ModelChoice("org/m", "main", "cuda:1", "bfloat16"),
    recipes=(
        Recipe("a", "mixed", "int3-g64", "int8-channel", None, 4.8, "positional", True, (GridRule("*q*", "float"),)),
        Recipe("b", "mixed", budget=4.8, formats=("int4-g64", "bf16")),
        Recipe("c", "rtn", keys="int8-token"),
    ),
    variants=(("v", Path("some/folder")),),
    tasks=("kl", "mmlu", "needle", "reasoning"),
    corpus=CorpusChoice("chat,file.txt", None, 64, 32, 3, "always"),
    questions=TaskChoice(Path("mmlu"), ("anatomy",), 5, 2, True, "false", "Be brief."),
    drift=DriftChoice(4, 5, 6),
    chat=ChatChoice("prompts.jsonl", Path("a.jinja"), 7, 0.5),
    traces=TraceChoice("questions.jsonl", 99),
    calibration=CalibrationChoice("text.txt", 3, 77),
    out=Path("out"),
    backends=BackendChoice(("torch", "ort"), (1, 4), "cpu", "dynamo", "qdq", "fp32"),
    batch_tokens=100,
    threads=3,
    seed=9,
    workers=2,
    executor="ray",
    command="qeval compare",
)
ENGINES = replace(
    SETTINGS,
    backends=BackendChoice(("torch", "vllm", "http://localhost:8000")),
    tasks=("kl", "mmlu"),
    traces=TraceChoice(),
    workers=1,
    executor="local",
)
"""Settings that the options of engines are for."""
FREE = {"command": "other", "out": Path("x"), "threads": 1, "batch_tokens": None, "workers": 1,
        "executor": "local", "worker_gpus": 0.5}  # fmt: skip
BOUND = {
    "model": ModelChoice("org/m"), "recipes": (Recipe("a", "rtn"),), "variants": (), "tasks": ("kl", "reasoning"),
    "corpus": CorpusChoice("chat"), "questions": TaskChoice(), "calibration": CalibrationChoice(),
    "backends": BackendChoice(), "seed": 0, "drift": DriftChoice(), "external_parts": "weights",
    "kv_types": ("q8_0",), "split": True, "chat": ChatChoice(tokens=7),
    "traces": TraceChoice(tokens=8), "sampling": Sampler(0.9, 0.7), "endpoint": EndpointChoice(top=7),
    "needle": NeedleChoice((512,), 3, 2), "vllm": VllmChoice(kv_cache="fp8"),
}  # fmt: skip


def test_settings_come_back_from_a_record_as_they_were(tmp_path):
    record = read_run(make_run(tmp_path)).model_copy(
        update={"settings": json.loads(json.dumps(settings_json(SETTINGS)))}
    )
    assert settings_of(record) == (Path.cwd(), SETTINGS)


def test_every_setting_either_may_differ_or_may_not():
    assert {field.name for field in fields(Settings)} == FREE.keys() | BOUND.keys()


@pytest.mark.parametrize("name", FREE)
def test_what_changes_no_row_keeps_a_runs_identity(name):
    assert identity_of(replace(SETTINGS, **{name: FREE[name]})) == identity_of(SETTINGS)


@pytest.mark.parametrize("name", BOUND)
def test_what_changes_rows_makes_another_run(name):
    settings = ENGINES if name in ("endpoint", "vllm") else SETTINGS
    assert identity_of(replace(settings, **{name: BOUND[name]})) != identity_of(settings)


def test_workers_of_a_streamed_run_differ_in_their_limit_on_memory():
    model, texts = replace(SETTINGS.model, stream=True), CorpusChoice()
    streamed = replace(
        SETTINGS,
        model=model,
        backends=BackendChoice(),
        corpus=texts,
        chat=ChatChoice(),
        tasks=("kl",),
        traces=TraceChoice(),
    )
    limited = replace(streamed, model=replace(streamed.model, max_memory=1 << 30))
    assert identity_of(limited) == identity_of(streamed) != identity_of(SETTINGS)

"""`qeval sweep`: several models with the same flags, one page for all, and a model that fails doesn't end it."""

import json
import re

import pytest

from qeval.cli.app import run_program
from tests.fixtures.bench import CONTEXT, Bench, row_differences
from tests.fixtures.tiny import save_tiny

METHODS = "rtn:g32,rtn:int8-channel,gptq:g32"
"""Two of them have the same bits per weight."""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    bench = Bench(tmp_path_factory.mktemp("sweep"))
    save_tiny(bench.folder / "other", max_position_embeddings=CONTEXT, hidden_size=96)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QEVAL_HOME", str(bench.folder / "home"))
        yield bench


def swept(place, models, out, *more):
    flags = place.arguments(methods=METHODS, model=None, out=None)
    return run_program(
        ["sweep", "--models", ",".join(str(model) for model in models), "--out", str(out), *flags, *more]
    )


def test_every_variant_of_every_model_is_on_one_page(place, tmp_path, capfd):
    models = [place.model, place.folder / "other"]
    assert swept(place, models, tmp_path) == 0
    told = capfd.readouterr()
    assert "model 2 of 2" in told.err
    found = json.loads((tmp_path / "sweep.json").read_text())
    assert [each["model"] for each in found["models"]] == [model.name for model in models]
    text = (tmp_path / "sweep.md").read_text()
    for each in found["models"]:
        own = json.loads((tmp_path / each["folder"].rpartition("/")[2] / "report.json").read_text())
        assert each["report"] == own
        rows = [line for line in text.splitlines() if line.startswith(f"| {own['model']['name']} |")]
        assert [row.split(" | ")[1] for row in rows] == METHODS.split(",")
        for row, variant in zip(rows, own["variants"], strict=True):
            assert f"{variant['bits_per_weight']:.2f}" in row
            assert variant["name"] in told.out
    assert (tmp_path / "plots" / "kl-bits.png").stat().st_size > 1000
    page = (tmp_path / "sweep.html").read_text()
    assert "2 models: what quantization lost" in page
    assert "<svg" in page


def test_a_model_that_fails_is_told_and_the_others_are_done(place, tmp_path, capfd):
    assert swept(place, [place.folder / "nowhere", place.model], tmp_path) == 3
    assert "nowhere" in capfd.readouterr().err
    found = json.loads((tmp_path / "sweep.json").read_text())
    assert [each["error"] is None for each in found["models"]] == [False, True]
    assert "nowhere failed" in (tmp_path / "sweep.md").read_text()


def test_models_compared_at_once_end_on_the_same_page(place, tmp_path, capfd):
    models = [place.model, place.folder / "nowhere", place.folder / "other"]
    assert swept(place, models, tmp_path / "abreast", "--models-at-once", "2") == 3
    told = capfd.readouterr().err
    assert "3, 2 at a time on this machine" in told
    assert f"{place.folder / 'nowhere'}: failed: " in told
    assert re.search(rf"{place.folder / 'other'}: done after \d+ s", told)
    found = json.loads((tmp_path / "abreast" / "sweep.json").read_text())
    assert [each["error"] is None for each in found["models"]] == [True, False, True]
    assert swept(place, [models[0], models[2]], tmp_path / "alone", "--quiet") == 0
    for name in ("model", "other"):
        assert row_differences(tmp_path / "abreast" / name, tmp_path / "alone" / name) == []


@pytest.mark.parametrize(
    ("models", "more", "sentence"),
    [
        ([""], [], "Nothing to sweep over"),
        (["a/x", "b/../a/x"], ["--wrong"], "No such option"),
        (["x"], ["--json"], "sweep.json"),
        (["org/x", "org--x"], [], "would share a folder"),
    ],
)
def test_wrong_use_is_told_before_any_work(place, tmp_path, models, more, sentence, capfd):
    assert swept(place, models, tmp_path / "out", *more) == 2
    assert sentence in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


def test_no_model_at_all_is_wrong_use(place, tmp_path, capfd):
    assert swept(place, [tmp_path / "nowhere"], tmp_path / "out") == 2
    assert "No model could be compared" in capfd.readouterr().err

"""`qeval sensitivity` from end to end on a tiny model: what it leaves, what it keeps when stopped, what it refuses."""

import json

import pytest

from qeval.cli.app import run_program
from qeval.jobs.sensitivity import _effects
from qeval.models.structure.graph import describe_model
from qeval.models.structure.head import head_of
from qeval.quantize.ablation import Attribution
from qeval.quantize.build import source_of
from qeval.quantize.sensitivity import SENSITIVITY_SAMPLES, Passed
from qeval.report.sensitivity import (
    GroupEffect,
    Pick,
    Sensitivities,
    groups_table,
    picks_table,
    verdict,
    write_sensitivity,
)
from qeval.store.seal import seal
from qeval.types import Estimate
from tests.fixtures.bench import Bench, records
from tests.fixtures.families import tiny_family


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return Bench(tmp_path_factory.mktemp("sensitivity"))


@pytest.fixture(autouse=True)
def home(bench, monkeypatch):
    monkeypatch.setenv("QEVAL_HOME", str(bench.folder / "home"))


def asked(bench, *more, method="rtn:int3-g32"):
    seen = ["--calibration", str(bench.seen), "--calibration-samples", "4", "--calibration-length", "32"]
    own = [
        "--model",
        str(bench.model),
        "--method",
        method,
        "--out",
        str(bench.folder / "out"),
        "--threads",
        "1",
        "--device",
        "cpu",
    ]
    return run_program(["sensitivity", *own, *seen, "--measured-samples", "3", "--quiet", *more])


def test_a_run_leaves_a_page_maps_and_json_and_goes_on_where_it_stopped(bench, monkeypatch, capfd):
    assert asked(bench, "--json") == 0
    found = json.loads(capfd.readouterr().out)
    out = bench.folder / "out"
    assert json.loads((out / "sensitivity.json").read_text()) == found
    assert [(g["layer"], g["kind"]) for g in found["groups"]] == [
        (layer, kind) for layer in (0, 1) for kind in ("q/k/v", "o", "gate/up", "down")
    ]
    assert found["additivity"]["value"] == pytest.approx(
        sum(g["alone"]["value"] for g in found["groups"]) / found["joint"]["value"]
    )
    for group in found["groups"]:
        assert group["alone"]["low"] < group["alone"]["value"] < group["alone"]["high"]
        assert group["saved"]["value"] == pytest.approx(found["joint"]["value"] - group["without"]["value"], abs=1e-9)
    assert (found["sequences"], found["positions"]) == (3, 3 * 8)
    sizes = [pick["bits_per_weight"] for pick in found["picks"]]
    assert len(sizes) == 5
    assert sizes == sorted(sizes)
    assert all(pick["bits_per_weight"] <= pick["budget"] for pick in found["picks"])
    kls = [pick["predicted_kl_nats"] for pick in found["picks"]]
    assert kls == sorted(kls, reverse=True)
    assert {path.name for path in (out / "plots").iterdir()} >= {"sensitivity-alone.png", "sensitivity-gain.svg"}
    for name in ("sensitivity.md", "sensitivity.html"):
        assert "Every group of linears" in (out / name).read_text()

    kept = json.loads((out / "measured.json").read_text())
    kept["kl_nats"] = dict(list(kept["kl_nats"].items())[:5])
    (out / "measured.json").write_text(json.dumps(seal(kept)))
    measured = []
    original = Passed.states_with
    monkeypatch.setattr(Passed, "states_with", lambda *a: measured.append(a) or original(*a))
    assert asked(bench, "--json") == 0
    assert json.loads(capfd.readouterr().out) == found
    assert len(measured) == 16 - 5


def test_what_can_not_be_measured_is_refused_before_any_work(bench, capfd):
    assert asked(bench, method="gptq:g32") == 2
    assert "rtn and awq alone" in capfd.readouterr().err
    assert asked(bench, "--budgets", "2.0bpw") == 2
    assert "below the smallest possible size" in capfd.readouterr().err


def test_sequences_that_the_calibration_has_not_are_refused(bench, capfd):
    assert asked(bench, "--measured-samples", "5") == 2
    assert "the calibration has 4 sequences; raise --calibration-samples" in capfd.readouterr().err


def test_a_mix_picks_the_same_whatever_it_is_shown_with(bench, capfd):
    picks = []
    for count in (SENSITIVITY_SAMPLES, SENSITIVITY_SAMPLES + 2):
        assert asked(bench, "--measured-samples", str(count), "--json", "--out", str(bench.folder / f"on{count}")) == 0
        picks.append(json.loads(capfd.readouterr().out)["picks"])
    for few, more in zip(*picks, strict=True):
        assert few["high"] == more["high"]
        assert few["predicted_kl_nats"] == pytest.approx(more["predicted_kl_nats"], rel=1e-5)


def test_a_width_that_is_the_high_one_has_no_mix_and_is_mapped_all_the_same(bench, capfd, tmp_path):
    own = ("--out", str(tmp_path))
    assert asked(bench, "--budgets", "8.5bpw", *own, method="rtn:int8-g32") == 2
    assert "has nothing to mix" in capfd.readouterr().err
    assert asked(bench, "--json", *own, method="rtn:int8-g32") == 0
    assert json.loads(capfd.readouterr().out)["picks"] == []


def test_floats_are_mapped_and_have_no_mix(bench, capfd, tmp_path):
    own = ("--out", str(tmp_path))
    assert asked(bench, "--budgets", "5bpw", *own, method="rtn:nvfp4") == 2
    assert "--budgets chooses between widths of integers, and rtn:nvfp4 is on nvfp4; name --formats" in (
        capfd.readouterr().err
    )
    assert asked(bench, "--json", *own, method="rtn:nvfp4") == 0
    found = json.loads(capfd.readouterr().out)
    assert found["picks"] == []
    assert all(group["alone"]["value"] > 0 for group in found["groups"])


FORMATS = "int3-g32/nvfp4/int8-channel/bf16"


@pytest.mark.parametrize(("method", "mixed"), [("rtn:g32", "mixed-rtn:"), ("awq:g32-noclip", "mixed:noclip-")])
def test_a_mix_of_formats_picks_what_the_mixed_recipe_chooses(bench, capfd, tmp_path, monkeypatch, method, mixed):
    """Against the variant that `compare` makes in a home of its own, at each of the budgets."""
    flags = ("--budgets", "6,9bpw", "--formats", FORMATS, "--json", "--out", str(tmp_path / "map"))
    assert asked(bench, *flags, method=method) == 0
    found = json.loads(capfd.readouterr().out)
    page = (tmp_path / "map" / "sensitivity.html").read_text()
    assert "Every group alone in each format" in page and "What a mix of formats picks at each size" in page

    names = [f"{mixed}{FORMATS}-{budget}bpw" for budget in (6, 9)]
    monkeypatch.setenv("QEVAL_HOME", str(tmp_path / "home"))
    assert bench.compare("--quiet", methods=",".join(names), tasks="kl", out=str(tmp_path / "out")) == 0
    made = {name: each for name, each in records(tmp_path / "out").items() if name in names}
    for name, pick in zip(names, found["picks"], strict=True):
        chosen = {(group["layer"], group["kind"]): group["format"] for group in made[name]["groups"]}
        assert {tuple(place): each for each, places in pick["formats"].items() for place in places} == chosen
        kls = {(group["layer"], group["kind"]): group["kls"] for group in made[name]["groups"]}
        assert {(each["layer"], each["kind"]): each["kls"] for each in found["by_format"]} == kls
        assert pick["predicted_kl_nats"] == pytest.approx(sum(kls[at].get(chosen[at], 0.0) for at in kls))
        assert pick["bits_per_weight"] <= pick["budget"]
        assert len(set(chosen.values())) > 1


def test_formats_without_a_budget_are_shown_at_five_sizes(bench, capfd, tmp_path):
    assert asked(bench, "--formats", "int3-g32/bf16", "--json", "--out", str(tmp_path)) == 0
    picks = json.loads(capfd.readouterr().out)["picks"]
    assert [len(pick["formats"]["float"]) for pick in picks] == sorted(len(pick["formats"]["float"]) for pick in picks)
    assert len({pick["bits_per_weight"] for pick in picks}) > 2


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--formats", "int3-g32/nvpf4"), "'nvpf4' in 'nvpf4' is not part of a grid's name (nearest: nvfp4)"),
        (("--formats", "int3-g32"), "names one format, int3-g32-signed, and a mix chooses among several"),
        (("--formats", "int3-g32/bf16", "--budgets", "1bpw"), "1 bits per weight is below the smallest possible size"),
    ],
)
def test_formats_that_can_not_be_mixed_are_refused_before_any_work(bench, capfd, tmp_path, flags, says):
    assert asked(bench, *flags, "--out", str(tmp_path)) == 2
    assert says in capfd.readouterr().err
    assert not (tmp_path / "measured.json").exists()


def test_a_torn_record_is_named(bench, capfd, tmp_path):
    (tmp_path / "measured.json").write_text('{"key": "a", "kl')
    assert asked(bench, "--out", str(tmp_path)) == 3
    assert "measured.json is torn" in capfd.readouterr().err


def made(alone, joint, without=0.2, sequences=2):
    def seen(value, unit="nats"):
        return Estimate(value, value, value, unit, "lower", sequences, sequences)

    groups = tuple(
        GroupEffect(i, "down", (f"w{i}",), 10, seen(kl), seen(without), seen(joint - without))
        for i, kl in enumerate(alone)
    )
    ratio = seen(sum(alone) / joint if joint else None, "ratio")
    picks = (Pick(4.5, 4.4, 0.1, ((1, "down"),)),)
    return Sensitivities("m", "rtn", "text", sequences, 64, seen(joint), ratio, groups, picks)


def test_sums_that_are_not_the_joint_are_said_so(tmp_path):
    assert made([0.1, 0.2], 0.3).adds_up
    assert not made([0.1, 0.2], 0.2).adds_up
    assert not made([0.1, 0.1], 0.3).adds_up
    assert "nothing was lost" in verdict(made([0.0], 0.0))
    assert "10 sequences." in groups_table(made([0.1], 0.1, sequences=10)).note
    assert "2 sequences: so few make it rough." in groups_table(made([0.1], 0.1)).note
    page = write_sensitivity(made([0.1, 0.2], 0.1), tmp_path)
    assert "sum to 3.00 [3.00, 3.00] times the joint one" in page.read_text()
    assert [row[0].text for row in groups_table(made([0.1, 0.2], 0.3)).rows] == ["Layer 1 down", "Layer 0 down"]
    assert groups_table(made([0.1], 0.1)).rows[0][-1].text == "−0.100"
    assert picks_table(made([0.1], 0.1)).rows[0][-1].text == "down 1"


def test_a_layers_experts_are_one_row_that_holds_all_their_weights():
    model = tiny_family("Mixtral")
    about = describe_model(model)
    source = source_of(model, about, head_of(model), [], {})
    names = [unit.names[0] for unit in about.units]
    found = Attribution((0.9, 1.1), dict.fromkeys(names, (0.1, 0.3)), dict.fromkeys(names, (0.2, 0.6)))
    effects = _effects(source, found, seed=0)
    assert effects[0].saved.value == pytest.approx(0.6)
    assert [effect.names for effect in effects] == [unit.names for unit in about.units]
    assert sum(effect.parameters for effect in effects) == sum(
        source.search.parameters[name].numel() for group in about.groups for name in group.names
    )

"""A sweep over bits, group sizes and budgets: the methods it means, and each method's frontier."""

import itertools
import json

import pytest

from qeval.api.grid import grid_methods
from qeval.cli.app import run_program
from qeval.config import parse_method
from qeval.errors import UsageError
from qeval.report import build_report
from qeval.report.frontier import by_method, frontier, frontiers, kl_of
from qeval.report.sweep import Ended, write_sweep
from tests.fixtures.bench import Bench
from tests.fixtures.runs import Made, Shape, make_run, reseal


def test_every_method_is_made_at_every_width_and_size_and_its_mix_at_every_budget():
    found = grid_methods("rtn,awq", "2,3,5,6", "32,channel", "4.5,4.8bpw")
    assert len(found) == len(set(found)) == 2 * 4 * 2 + 2 * 2
    grids = {parse_method(name).grid for name in found if not name.startswith("mixed")}
    assert grids == {f"int{bits}-{size}" for bits, size in itertools.product((2, 3, 5, 6), ("g32", "channel"))}
    assert [parse_method(name).budget for name in found if name.startswith("mixed:")] == [4.5, 4.8]
    assert grid_methods("", None, None, "5") == ["rtn:int4-g128", "awq:int4-g128", "mixed-rtn:5bpw", "mixed:5bpw"]
    assert grid_methods("mixed", None, None, "5") == ["mixed:5bpw"]


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        (("rtn:int4", "2", None, None), "without their grids"),
        (("rtn", "two", None, None), "--bits takes"),
        (("rtn", "2", "row", None), "--groups takes"),
        (("gptq", None, None, "4.5"), "--budgets is for"),
        (("rtm", "2", None, None), "rtn"),
    ],
)
def test_what_no_grid_has_is_refused(asked, says):
    with pytest.raises(UsageError, match=says):
        grid_methods(*asked)


MADE = (
    Made("rtn:int3-g32", "rtn", "int3-g32", "block 32", 4.0, 0.5),
    Made("rtn:int4-g128", "rtn", "int4-g128", "block 128", 4.25, 0.2),
    Made("rtn:int4-channel", "rtn", "int4-channel", "per channel", 4.3, 0.4),
    Made("rtn:int6-g128", "rtn", "int6-g128", "block 128", 6.25, 0.01),
    Made("awq:int3-g32", "awq", "int3-g32", "block 32", 4.0, 0.2),
    Made("awq:int4-g128", "awq", "int4-g128", "block 128", 4.25, 0.08),
)


def test_a_frontier_is_what_nothing_of_its_method_beats(tmp_path):
    report = build_report(make_run(tmp_path, Shape(variants=MADE, metrics=("kl",))))
    for found in by_method(report).values():
        slow = [
            v.name
            for v in found
            if not any(o.bits_per_weight <= v.bits_per_weight and kl_of(o) <= kl_of(v) and o is not v for o in found)
        ]
        assert [v.name for v in frontier(found)] == slow
    assert "rtn:int4-channel" not in [v.name for v in frontier(by_method(report)["rtn"])]
    plot = frontiers(report)
    assert "of rtn (4), awq (2)" in plot.alt
    assert "No noise floor was measured" in plot.alt


def test_a_floor_is_drawn_and_a_method_alone_has_no_frontier(tmp_path):
    record = make_run(tmp_path / "a", Shape(variants=MADE[:3], metrics=("kl",)))
    data = json.loads((record / "run.json").read_text())
    data["variants"][2]["role"] = "floor"
    reseal(record, data)
    assert "The noise floor lies at" in frontiers(build_report(record)).alt
    two = make_run(tmp_path / "b", Shape(variants=(MADE[0], MADE[4]), metrics=("kl",)))
    assert frontiers(build_report(two)) is None


def test_a_sweep_of_a_grid_draws_each_methods_frontier(tmp_path, monkeypatch):
    monkeypatch.setenv("QEVAL_HOME", str(tmp_path / "home"))
    bench = Bench(tmp_path)
    flags = bench.arguments(model=None, out=None, methods="rtn", tasks="kl", max_windows="2")
    flags += ["--bits", "2,3,5,6", "--groups", "32", "--quiet"]
    assert run_program(["sweep", "--models", str(bench.model), "--out", str(tmp_path / "out"), *flags]) == 0
    (model,) = json.loads((tmp_path / "out" / "sweep.json").read_text())["models"]
    variants = model["report"]["variants"]
    assert [v["name"] for v in variants] == [f"rtn:int{bits}-g32" for bits in (2, 3, 5, 6)]
    losses = [v["metrics"]["kl_nats"]["value"] for v in variants]
    assert losses == sorted(losses, reverse=True)
    ended = Ended(model["model"], tmp_path / "out" / model["folder"].rpartition("/")[2])
    write_sweep([ended], tmp_path / "again")
    (plot,) = (tmp_path / "again" / "plots").glob("*.png")
    assert plot.name.startswith("frontier-")
    page = (tmp_path / "again" / "sweep.md").read_text()
    assert page.startswith(f"# {ended.model}: what quantization lost")
    assert "None is both smaller and closer than rtn:int2-g32, rtn:int3-g32, rtn:int5-g32 and rtn:int6-g32." in page

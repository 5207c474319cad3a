"""A benchmark's page: figures against their slow definition, what is withheld, published tables, quality joined."""

import csv
import json
import re

import numpy as np
import pytest

from qeval.errors import BrokenRecordError, UsageError
from qeval.report import build_report, report_json
from qeval.report.bench import references, write_bench
from qeval.report.bench.quality import _marked
from qeval.report.bench.reference import read_reference, read_references
from qeval.report.bench.rows import rows
from qeval.report.bench.summary import summarize
from qeval.report.model import Metric
from qeval.store.timings import CellRecord, EngineRecord, Timing, read_bench_record, read_timings, write_bench_record
from tests.fixtures.benchpage import SPEEDS, Grid, make_bench
from tests.fixtures.runs import Shape, make_run

SMALL = Grid(batches=(1,), prompts=(16,))


def summarized(folder, **given):
    record = read_bench_record(folder)
    return summarize(record, read_timings(folder, record.timings), **given)


def table(folder, name):
    with (folder / "tables" / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    outcomes = {
        ("pytorch-compile", "fp32", 4, 256): ("oom", "12 GB were asked for."),
        ("onnxruntime", "awq", 4, 16): ("refused", "One sequence at a time."),
    }
    grid = Grid(spoilt=("pytorch-eager", "rtn"), outcomes=outcomes)
    folder = make_bench(tmp_path_factory.mktemp("bench"), grid)
    write_bench(folder, reference=list(references()))
    return folder


def test_figures_are_the_medians_of_each_repeats_own():
    rng = np.random.default_rng(1)
    prompts, steps = rng.lognormal(size=9), rng.lognormal(size=(9, 255))
    timings = [
        Timing("e", "v", 4, 64, i, i, float(p), tuple(s), float(p))
        for i, (p, s) in enumerate(zip(prompts, steps, strict=True))
    ]
    (row,) = rows([CellRecord("e", "v", 4, 64, "measured")], timings)
    value = {name: metric.value for name, metric in row.figures.items()}
    assert value["prompt_ms"] == pytest.approx(1000 * np.median(prompts))
    assert value["prompt_tps"] == pytest.approx(4 * 64 / np.median(prompts))
    assert value["half_ms"] == pytest.approx(1000 * np.median([np.mean(each[:127]) for each in steps]))
    assert value["whole_tps"] == pytest.approx(4 / np.median([np.mean(each) for each in steps]))
    wall = np.median([p + sum(s) for p, s in zip(prompts, steps, strict=True)])
    assert value["wall_s"] == pytest.approx(wall)
    assert value["wall_tps"] == pytest.approx(4 * (64 + 256) / wall)
    assert value["energy_joules"] == pytest.approx(np.median(prompts))
    ordered = np.sort(prompts)
    assert (row.figures["prompt_ms"].low, row.figures["prompt_ms"].high) == pytest.approx(
        (1e3 * ordered[1], 1e3 * ordered[-2])
    )
    assert row.figures["prompt_tps"].low == pytest.approx(4 * 64 / ordered[-2])


def test_few_generated_tokens_leave_figures_out():
    cell = CellRecord("e", "v", 1, 16, "measured")
    (one,) = rows([cell], [Timing("e", "v", 1, 16, 0, 0, 0.5, ())])
    assert set(one.figures) == {"prompt_ms", "prompt_tps", "wall_s", "wall_tps"}
    (three,) = rows([cell], [Timing("e", "v", 1, 16, 0, 0, 0.5, (0.1, 0.2))])
    assert "half_ms" not in three.figures
    assert three.figures["whole_ms"].value == pytest.approx(150)


@pytest.mark.parametrize("timings", [[], [Timing("e", "v", 1, 1, i, i, 0.5, (0.1,) * (i + 1)) for i in range(2)]])
def test_a_measured_cell_without_repeats_or_of_unlike_ones_is_an_error(timings):
    with pytest.raises(BrokenRecordError, match="batch 1, prompt 1"):
        rows([CellRecord("e", "v", 1, 1, "measured")], timings)


def test_the_base_is_the_first_unquantized_variant_or_the_one_asked_for(tmp_path):
    folder = make_bench(tmp_path, SMALL)
    assert str(summarized(folder).base) == "pytorch-eager fp32"
    found = summarized(folder, base="onnxruntime")
    assert str(found.base) == "onnxruntime fp32"
    faster = next(row for row in found.rows if str(row.system) == "onnxruntime rtn")
    assert found.against_base(faster, "whole").value == pytest.approx(2.0, rel=0.1)
    assert str(summarized(folder, base="onnxruntime/awq").base) == "onnxruntime awq"
    with pytest.raises(UsageError, match="onnxruntime, pytorch-compile, pytorch-eager"):
        summarized(folder, base="onnx")
    with pytest.raises(UsageError, match="Choices: awq, fp32, rtn"):
        summarized(folder, base="onnxruntime/gptq")


@pytest.mark.parametrize("base", ["onnxruntime", "onnxruntime/fp32"])
def test_a_base_that_was_asked_for_and_not_measured_is_told_and_the_page_is_there(tmp_path, base):
    outcomes = {("onnxruntime", "fp32", 1, 16): ("failed", "It broke.")}
    folder = make_bench(tmp_path, Grid(batches=(1,), prompts=(16,), outcomes=outcomes))
    found = summarized(folder, base=base)
    assert found.base is None
    write_bench(folder, base=base)
    assert f"Nothing was measured of {base}, the base that was asked for." in (folder / "bench.md").read_text()


def test_half_precision_is_the_base_before_single(tmp_path):
    record = read_bench_record(make_bench(tmp_path, SMALL))
    kinds = {"pytorch-eager": "fp32", "pytorch-compile": "bf16", "onnxruntime": "fp16"}
    cells = [CellRecord(engine, kind, 1, 16, "measured") for engine, kind in kinds.items()]
    timings = [Timing(engine, kind, 1, 16, 0, 0, 1.0, (1.0,)) for engine, kind in kinds.items()]
    found = summarize(record.model_copy(update={"cells": cells}), timings)
    assert str(found.base) == "onnxruntime fp16"
    with pytest.raises(UsageError, match="--base x/rtn"):
        only = [CellRecord("x", "rtn", 1, 16, "measured")]
        summarize(record.model_copy(update={"cells": only}), [Timing("x", "rtn", 1, 16, 0, 0, 1.0, (1.0,))], base="x")


def test_savings_are_against_the_engines_own_base(tmp_path):
    found = summarized(make_bench(tmp_path, SMALL))
    told = {str(saving.row.system): saving for saving in found.savings}
    assert set(told) == {"pytorch-eager rtn", "onnxruntime rtn", "onnxruntime awq"}
    saving = told["onnxruntime rtn"]
    assert str(saving.base) == "onnxruntime fp32"
    assert saving.memory == pytest.approx((0.7 * 8e8 + 1.6e6) / (0.35 * 8e8 + 1.6e6))
    assert saving.speed_up.low < 2.0 < saving.speed_up.high


def test_a_broken_models_speed_is_told_nowhere(page):
    broken = [row for row in table(page, "speeds") if (row["engine"], row["variant"]) == ("pytorch-eager", "rtn")]
    assert {row["outcome"] for row in broken} == {"broken"}
    assert {row["whole_tps"] for row in broken} == {""}
    assert not [row for row in table(page, "savings") if row["engine"] == "pytorch-eager"]
    text = (page / "bench.md").read_text()
    assert "pytorch-eager rtn is broken, and its speed is withheld: 10 % of its tokens" in text
    assert "pytorch-eager rtn, prompt 16: broken" in text
    assert re.search(r"\| pytorch-eager \(broken\) \| rtn \| – \| 10", text)


def test_cells_say_what_became_of_them_and_why(page):
    text = (page / "bench.md").read_text()
    assert re.search(r"\| pytorch-compile \| fp32 \| 4 \| 256 \|( OOM \|){8}", text)
    assert "| onnxruntime | awq | 4 | 16 | refused | One sequence at a time. |" in text
    assert "llama.cpp could not run fp32: llama-cpp-python is not installed." in text
    assert "pytorch-compile fp32, prompt 256: OOM" in text


def test_the_page_the_summary_and_the_tables_hold_the_same(page):
    found = json.loads((page / "summary.json").read_text())
    assert found["base"] == {"engine": "pytorch-eager", "variant": "fp32"}
    for name in ("engines", "speeds", "savings", "memory", "correctness"):
        for one, other in zip(found[name], table(page, name), strict=True):
            assert {key: "" if value is None else str(value) for key, value in one.items()} == other
    assert len(found["speeds"]) == len(SPEEDS) * 4
    for kind in ("prompt", "token"):
        for suffix in ("png", "svg"):
            assert (page / "plots" / f"{kind}-throughput-batch-4.{suffix}").stat().st_size > 1000
    assert (page / "bench.html").read_text().count("<svg") == 4


def test_published_rows_of_the_same_cells_are_marked(page):
    text = (page / "bench.md").read_text()
    line = next(each for each in text.splitlines() if "LLaMA-2 70B, fp16 | 4 | 256" in each)
    assert "onnxruntime (published, other hardware: 4 x A100 80GB)" in line
    assert "207.9 | 4925 | 33.4 | 119.8 | 33.44 | 119.6 | 9.585 | 213.7" in line
    assert "LLaMA-2 70B, fp16 | 4 | 1024" not in text
    assert "Gemma-2b-it (published, other hardware: RTX 4090, Windows)" in text
    assert "2.68×" in text


@pytest.mark.parametrize("name", list(references()))
def test_published_figures_agree_with_one_another_where_no_remark_says_otherwise(name):
    (found,) = read_references([name])
    assert found.rows
    for row in found.rows:
        assert row.source.startswith("https://")
        f, b = row.figures, row.batch
        if found.savings or row.oom or "contradicts" in row.remark or "above what" in row.remark:
            continue
        assert f["prompt_tps"] * f["prompt_ms"] == pytest.approx(1000 * b * row.prompt, rel=1e-5)
        assert f["half_tps"] * f["half_ms"] == pytest.approx(1000 * b, rel=1e-5)
        assert f["whole_tps"] * f["whole_ms"] == pytest.approx(1000 * b, rel=1e-5)
        assert f["wall_tps"] * f["wall_s"] == pytest.approx(b * (row.prompt + row.generated), rel=1e-5)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda text: text.replace("wall_tps", "wall", 1), "other columns"),
        (lambda text: text.replace("11.967659", "-1", 1), "line 2: -1 is no figure"),
        (lambda text: text.replace("11.967659", "fast", 1), "line 2: could not convert"),
        (lambda text: text.replace("1 x A100 80GB", "", 1), "line 2 lacks hardware"),
        (lambda text: text + "a,b\n", "2 cells in 17 columns"),
        (lambda _: "", "other columns than a published table: none"),
    ],
)
def test_a_published_table_is_read_strictly(change, told, tmp_path):
    text = references()["llama2-onnxruntime"].read_text()
    (tmp_path / "x.csv").write_text(change(text))
    with pytest.raises(BrokenRecordError, match=told):
        read_reference(tmp_path / "x.csv")


def test_an_unknown_reference_is_told_with_those_that_there_are(tmp_path):
    with pytest.raises(UsageError, match="llama2-onnxruntime"):
        write_bench(make_bench(tmp_path, SMALL), reference=["llama2"])


def compared(folder, sha):
    report = report_json(build_report(make_run(folder, Shape(windows=12, questions=2))))
    (folder / "report.json").write_text(report.replace("a" * 64, sha))
    return folder


def test_quality_is_laid_beside_speed_and_memory(tmp_path):
    lost = compared(tmp_path / "run", "0" * 64)
    folder = make_bench(tmp_path / "bench", SMALL)
    write_bench(folder, quality=lost)
    text = (folder / "bench.md").read_text()
    assert "KL from the baseline (nats) against generated tokens a second of tiny at batch 1, prompt 16" in text
    assert "Filled points are on the Pareto front: onnxruntime rtn and onnxruntime awq." in text
    assert (folder / "plots" / "quality-memory.png").stat().st_size > 1000


def test_a_comparison_in_the_benchmarks_own_folder_is_found(tmp_path):
    folder = make_bench(compared(tmp_path, "0" * 64), SMALL)
    write_bench(folder)
    assert (folder / "plots" / "quality-speed.svg").exists()


def test_a_comparison_of_another_model_is_refused_when_given_and_told_when_found(tmp_path):
    folder = make_bench(compared(tmp_path, "b" * 64), SMALL)
    with pytest.raises(UsageError, match="weights are not those"):
        write_bench(folder, quality=tmp_path)
    write_bench(folder)
    assert "No quality is laid beside speed" in (folder / "bench.md").read_text()
    assert not (folder / "plots" / "quality-speed.svg").exists()


def test_the_front_is_what_no_other_point_dominates():
    rng = np.random.default_rng(3)
    points = [(None, metric(x), metric(y)) for x, y in rng.integers(0, 6, size=(40, 2))]
    for sign, found in ((-1, _marked(points, more_is_better=True)), (1, _marked(points, more_is_better=False))):
        for point in found:
            assert point.front != any(beats(other, point, sign) for other in found)


def beats(other, point, sign):
    near = other.loss.value <= point.loss.value
    far = sign * other.value.value <= sign * point.value.value
    return near and far and (other.value, other.loss) != (point.value, point.loss)


def metric(value):
    return Metric(value=float(value), low=None, high=None, unit="", better="lower", n=1, clusters=1)


def test_nothing_measured_is_told_and_not_an_error(tmp_path):
    outcomes = {(*system, 1, 16): ("unspent", "The budget was spent.") for system in SPEEDS}
    folder = make_bench(tmp_path, Grid(batches=(1,), prompts=(16,), outcomes=outcomes), drifts=[])
    write_bench(folder)
    text = (folder / "bench.md").read_text()
    assert "there is nothing unquantized to tell it against" in text
    assert "Nothing was measured." in text


def test_a_reason_that_all_cells_share_is_told_once(tmp_path):
    missing = [EngineRecord("x", variant, "It is not installed.") for variant in ("fp32", "rtn")]
    cells = [CellRecord("x", variant, 1, 16, "refused", "It is not installed.") for variant in ("fp32", "rtn")]
    folder = make_bench(tmp_path, SMALL)
    record = read_bench_record(folder)
    write_bench_record(folder, record.model_copy(update={"opened": missing, "cells": [*record.cells, *cells]}))
    write_bench(folder)
    text = (folder / "bench.md").read_text()
    assert "x could not run fp32 and rtn: It is not installed." in text
    assert text.count("It is not installed.") == 3  # the warning, and a line a variant of what was not measured
    assert {row["engine"] for row in table(folder, "speeds")} >= {"x"}


def test_no_engine_at_all_is_told(tmp_path):
    folder = make_bench(
        tmp_path, SMALL, cells=[], timings=[], drifts=[], opened=[EngineRecord("x", "fp32", "It isn't there.")]
    )
    write_bench(folder)
    assert "x could not run fp32: It isn't there." in (folder / "bench.html").read_text().replace("&#39;", "'")

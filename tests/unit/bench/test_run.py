"""`qeval bench` on a tiny model: what is measured, and what can't be is told."""

import json
import shlex

import pytest

from qeval.cli.app import run_program
from qeval.store.timings import read_bench_record, read_timings
from tests.fixtures.tiny import save_tiny

FLAGS = "--batch 1,2 --prompt 8,40 --generate 4 --repeats 1 --threads 1 --time-budget 500 --quiet --device cpu"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    save_tiny(folder / "model", max_position_embeddings=32)
    return folder


@pytest.fixture(scope="module")
def bench(place):
    patch = pytest.MonkeyPatch()
    patch.setenv("QEVAL_HOME", str(place / "home"))

    def made(flags, out="out"):
        return run_program(["bench", *shlex.split(f"--model {place / 'model'} {FLAGS} {flags} --out {place / out}")])

    yield made
    patch.undo()


@pytest.fixture(scope="module")
def code(bench, place):
    return bench("--engines pytorch-eager,replay --methods fp32,rtn:g32")


@pytest.fixture
def record(code, place):
    del code
    return read_bench_record(place / "out")


def cells(record, engine):
    return {(cell.variant, cell.batch, cell.prompt): cell for cell in record.cells if cell.engine == engine}


def test_every_cell_that_fits_is_measured_with_its_memory(record):
    for (_, _, prompt), cell in cells(record, "pytorch-eager").items():
        if prompt == 8:
            assert cell.outcome == "measured"
            assert cell.peak_prompt_bytes > 1e7
            assert cell.peak_generate_bytes > 1e7
            assert cell.cache_bytes > 0


def test_a_prompt_beyond_the_context_is_one_sentence(record):
    told = {cell.reason for (_, _, prompt), cell in cells(record, "pytorch-eager").items() if prompt == 40}
    assert told == {"40 tokens of prompt and 4 generated don't fit the context of 32."}


def test_no_speed_is_told_of_an_engine_whose_tokens_are_not_the_models(record):
    found = cells(record, "replay").values()
    assert {cell.outcome for cell in found} == {"failed"}
    assert all("vocabulary" in cell.reason or "broken model" in cell.reason for cell in found)


def test_the_tokens_of_a_right_engine_are_the_references(record):
    drifts = [drift for drift in record.drifts if drift.engine == "pytorch-eager"]
    assert {drift.variant for drift in drifts} == {"fp32", "rtn:g32"}
    assert {(drift.equal_share, drift.first_divergence) for drift in drifts} == {(1.0, None)}


def test_repeats_hold_a_latency_for_each_token(record, place):
    timings = read_timings(place / "out", record.timings)
    assert {len(timing.step_seconds) for timing in timings} == {3}
    assert {(timing.variant, timing.batch, timing.prompt) for timing in timings} == {
        (variant, batch, 8) for variant in ("fp32", "rtn:g32") for batch in (1, 2)
    }
    opened = {(each.engine, each.variant): each for each in record.opened}
    assert opened["pytorch-eager", "rtn:g32"].weights == "int4-g32-signed as their float values"
    assert opened["pytorch-eager", "fp32"].weights == "fp32"


def test_a_failed_engine_makes_the_exit_code_3_and_the_page_is_there(code, place):
    assert code == 3
    assert (place / "out" / "bench.html").is_file()
    assert json.loads((place / "out" / "bench.json").read_text())["finished"]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--generate 0", "--generate must be at least 1, not 0."),
        ("--engines onnxrunime", "nearest: onnxruntime"),
        ("--batch one", "--batch takes whole numbers such as 1,4,16, not 'one'."),
        ("--methods fp64", "Unknown method or format 'fp64'"),
        ("--variant x=nowhere --methods fp32", "--variant x=nowhere: there is nothing there."),
        ("--reference nothing", "nothing"),
        ("--base onnxruntme", "Unknown engine in --base 'onnxruntme'; nearest: onnxruntime"),
        ("--base pytorch-eager/awq", "Unknown variant in --base 'awq'. Choices: fp32, rtn"),
        ("--base pytorch-eager --methods rtn:g32", "name another: --base pytorch-eager/rtn:g32."),
        ("--quality nowhere --methods fp32", "nowhere"),
    ],
)
def test_bad_input_is_one_sentence_and_code_2_before_any_work(bench, place, capfd, flags, says):
    assert bench(flags, out="bad") == 2
    assert not (place / "bad").exists()
    told = capfd.readouterr().err
    assert says in told
    assert told.startswith("error: ")
    assert told.count("\n") == 1

"""Every command on the pretended GPU: it runs, its figures are the CPU's, and nothing wide goes to the host."""

import json
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from benchmarks import gpu as benchmark
from qeval.bench.engines.base import greedy
from qeval.bench.engines.engine_spec import EngineSpec
from qeval.bench.engines.torch import open_eager
from qeval.cli.app import run_program
from qeval.compare.settings import CalibrationChoice, CorpusChoice, ModelChoice, Settings
from qeval.compare.settings_json import identity_of
from qeval.compare.task_choice import TaskChoice
from qeval.compare.workers import on_gpu_of
from qeval.config import parse_method
from qeval.models.source import resolve
from qeval.store.rows import RowStore
from tests.fixtures.bench import Bench, kl, records
from tests.fixtures.engines_llamacpp import STAND_IN
from tests.fixtures.families import tiny_family
from tests.fixtures.ggufs import write_ggufs
from tests.fixtures.pretend_gpu import pretend_gpu

FP32 = ("--device", "cuda:0", "--compute", "fp32", "--quiet")


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return Bench(tmp_path_factory.mktemp("bench"))


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("QEVAL_HOME", str(tmp_path / "home"))


def names(methods):
    return methods.split(",")


def settings(bench, device="cuda", **more):
    return Settings(
        ModelChoice(str(bench.model), device=device), (parse_method("rtn:g32"),), (), ("kl",),
        CorpusChoice(str(bench.corpus)), TaskChoice(), CalibrationChoice(str(bench.seen)), bench.out, **more,
    )  # fmt: skip


def numbers(groups):
    return [group[what]["value"] for group in groups for what in ("alone", "saved")]


def near(value):
    """Within 1e-5, and what the order of fp32 sums moves: 2e-8 nats with AVX-512, 3e-8 seen on a processor without."""
    return pytest.approx(value, rel=1e-5, abs=1e-7)


DRIFT = {"drift_prompts": "2", "drift_prompt_tokens": "8", "drift_tokens": "6"}
ROWS = {
    "rtn": "rtn:g32,rtn:int8-channel",
    "awq": "awq:g32",
    "gptq": "gptq:g32",
    "mixed": "mixed:g32,mixed-rtn:g32-fisher,mixed-rtn:g32-positional",
    "head": "rtn:g32-head",
}


class TestItIsAGpu:
    """The stand-in refuses what CUDA refuses."""

    def test_two_devices_do_not_mix(self):
        with pretend_gpu(), pytest.raises(RuntimeError, match="same device"):
            torch.ones(3, device="cuda") + torch.ones(3)

    def test_it_gives_no_array_and_no_kernel_of_the_cpu(self):
        with pretend_gpu():
            with pytest.raises(TypeError, match="numpy"):
                torch.ones(3, device="cuda").numpy()
            q = torch.ones(1, 1, 4, 8, device="cuda")
            with pytest.raises(NotImplementedError):
                torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, q, q)

    def test_it_counts(self):
        with pretend_gpu() as log:
            a = torch.ones(4, 4).to("cuda:0")
            (a @ a).sum().item()
        assert log.operators["aten.mm"] == 1
        assert sum(log.reads.values()) == 1
        assert sum(log.moved.values()) == 64

    def test_mps_has_no_fp64(self):
        with pretend_gpu("mps"), pytest.raises(TypeError, match="float64"):
            torch.ones(3, device="mps").double()


@pytest.mark.parametrize("methods", ROWS.values(), ids=ROWS)
def test_compare_gives_the_cpus_figures(bench, tmp_path, methods):
    tasks = {**DRIFT, "tasks": "kl,ppl,mmlu,drift", "calibration_samples": "6"}
    assert bench.compare("--quiet", methods=methods, out=str(tmp_path / "cpu"), **tasks) == 0
    with pretend_gpu() as log:
        assert bench.compare(*FP32, methods=methods, out=str(tmp_path / "gpu"), **tasks) == 0
    for name in names(methods):
        assert kl(tmp_path / "gpu", name) == near(kl(tmp_path / "cpu", name))
    record = json.loads((tmp_path / "gpu" / "run.json").read_text())
    assert record["environment"]["device"] == "Pretended GPU"
    assert record["environment"]["peak_gpu_bytes"] == 1 << 30
    assert log.launches


def test_rounded_activations_keys_and_values_stay_on_the_gpu(bench, tmp_path):
    methods = (
        "int8-w8a8,rtn:g32+a-fp8-static+kv-int4,fp16+k-int8-channel+v-fp8-token,rtn:g32+a-mxfp8-rceil,rtn:g32+a-nvfp4"
    )
    assert bench.compare("--quiet", methods=methods, out=str(tmp_path / "cpu")) == 0
    with pretend_gpu() as log:
        assert bench.compare(*FP32, methods=methods, out=str(tmp_path / "gpu")) == 0
    for name in names(methods):
        assert kl(tmp_path / "gpu", name) == pytest.approx(kl(tmp_path / "cpu", name), rel=2e-2)
    rounding = ("quant/fake_quant.py", "quant/floats.py", "backends/schemes.py", "models/structure/kv_cache.py")
    assert not [line for line in log.reads if line.startswith(rounding)]
    assert not [line for line, way in log.copies if way == "D2H" and line.startswith(rounding)]
    tables = sum(count for (line, way), count in log.copies.items() if way == "H2D" and line.startswith(rounding))
    assert tables <= 3 * 14 + 8  # each variant's ranges, once; constants, once


def test_bf16_has_its_floor_and_reads_like_fp32(bench, tmp_path):
    assert bench.compare("--quiet", methods="rtn:int6-g32", tasks="kl", out=str(tmp_path / "cpu")) == 0
    with pretend_gpu():
        device = ("--device", "cuda:0", "--compute", "bf16", "--quiet")
        assert bench.compare(*device, methods="rtn:int6-g32", tasks="kl", out=str(tmp_path / "gpu")) == 0
    floor = kl(tmp_path / "gpu", "baseline@fp32")
    exact = kl(tmp_path / "cpu", "rtn:int6-g32")
    assert 0 < floor < 0.1 * exact
    assert kl(tmp_path / "gpu", "rtn:int6-g32") == pytest.approx(exact, rel=0.25)


def test_experts(tmp_path):
    place = Bench(tmp_path)
    model = tiny_family("Mixtral")
    model.save_pretrained(place.model)
    for out, device in (("cpu", ()), ("gpu", FP32)):
        with pretend_gpu() if device else nullcontext():
            assert (
                place.compare("--quiet", *device, methods="rtn:g32,awq:g32", tasks="kl", out=str(tmp_path / out)) == 0
            )
    for name in ("rtn:g32", "awq:g32"):
        assert kl(tmp_path / "gpu", name) == near(kl(tmp_path / "cpu", name))


@pytest.mark.parametrize("methods", ["rtn:g32,awq:g32", "gptq:g32,mixed-rtn:g32-fisher"])
def test_streaming(bench, tmp_path, methods):
    more = {"calibration_samples": "6", "tasks": "kl,ppl,mmlu"}
    assert bench.compare("--quiet", methods=methods, out=str(tmp_path / "cpu"), **more) == 0
    with pretend_gpu():
        stream = (*FP32, "--stream", "--max-memory", "64MiB")
        assert bench.compare(*stream, methods=methods, out=str(tmp_path / "gpu"), **more) == 0
    for name in names(methods):
        assert kl(tmp_path / "gpu", name) == near(kl(tmp_path / "cpu", name))


def test_torch_on_the_gpu_beside_onnx_runtime_on_the_cpu(bench, tmp_path):
    pytest.importorskip("onnxruntime")
    both = ("--backend", "torch,ort", "--ep", "cpu")
    with pretend_gpu():
        assert bench.compare(*FP32, *both, methods="rtn:g32", tasks="kl", out=str(tmp_path / "gpu")) == 0
    rows = RowStore(tmp_path / "gpu").read("tokens").to_pylist()
    split = [row["kernel_kl_nats"] for row in rows if row["variant"] == "rtn:g32@ort"]
    assert 0 <= max(split) < 1e-8


def test_a_graph_is_judged_in_fp32_where_torch_computes_in_bf16(bench, tmp_path):
    pytest.importorskip("onnxruntime")
    both = ("--backend", "torch,ort", "--ep", "cpu", "--device", "cuda:0", "--compute", "bf16", "--quiet")
    with pretend_gpu():
        assert bench.compare(*both, methods="rtn:g32", tasks="kl", out=str(tmp_path / "gpu")) == 0
    assert kl(tmp_path / "gpu", "rtn:g32@ort") == pytest.approx(kl(tmp_path / "gpu", "rtn:g32"), rel=0.1)


def test_a_gate_and_what_it_verifies(bench, tmp_path, capfd):
    policy = tmp_path / "policy.yaml"
    policy.write_text("name: p\nrules:\n- {metric: kl_nats, at_most: 1 nats}\n")
    with pretend_gpu():
        assert bench.compare(*FP32, methods="rtn:g32", tasks="kl", out=str(tmp_path / "gpu")) == 0
        assert run_program(["verify", str(tmp_path / "gpu"), "--sample", "2"]) == 0, capfd.readouterr().err
    assert run_program(["gate", str(tmp_path / "gpu"), "--policy", str(policy)]) == 0


def test_a_live_gate(bench, tmp_path):
    policy = tmp_path / "policy.yaml"
    policy.write_text("name: p\nrules:\n- {metric: kl_nats, at_most: 1 nats}\n")
    flags = bench.arguments(
        methods=None, tasks=None, window="16", stride="16", max_windows="40", out=str(tmp_path / "x")
    )
    with pretend_gpu():
        assert run_program(["gate", *flags, "--method", "rtn:g32", *FP32, "--policy", str(policy)]) == 0


def test_sensitivity(bench, tmp_path):
    def ask(out, *device):
        seen = ("--calibration", str(bench.seen), "--calibration-samples", "4", "--calibration-length", "32")
        model = ("--model", str(bench.model), "--method", "rtn:int3-g32", "--out", str(tmp_path / out))
        return run_program(["sensitivity", *model, *seen, "--measured-samples", "3", "--quiet", *device])

    assert ask("cpu") == 0
    with pretend_gpu():
        assert ask("gpu", "--device", "cuda:0", "--compute", "fp32") == 0
    cpu, gpu = (json.loads((tmp_path / out / "sensitivity.json").read_text()) for out in ("cpu", "gpu"))
    assert numbers(gpu["groups"]) == near(numbers(cpu["groups"]))


@pytest.mark.parametrize("variant", [False, True])
def test_benchs_torch_engine(bench, tmp_path, variant):
    folder = None
    if variant:
        assert (
            run_program(["quantize", "--model", str(bench.model), "--method", "rtn:g32", "--out", str(tmp_path / "v")])
            == 0
        )
        folder = tmp_path / "v"
    prompts = np.arange(1, 17).reshape(2, 8)

    def tokens(device):
        spec = EngineSpec(resolve(str(bench.model)), folder, device=device, threads=1)
        return greedy(open_eager(spec, bench.model), prompts, 6)

    expected = tokens("cpu")
    with pretend_gpu():
        assert tokens("cuda:0") == expected


def test_mps_computes_without_fp64(bench, tmp_path):
    methods = "rtn:g32,awq:g32,gptq:g32,mixed-rtn:g32-fisher"
    tasks = {**DRIFT, "tasks": "kl,ppl,mmlu,drift", "calibration_samples": "6"}
    assert bench.compare("--quiet", methods=methods, out=str(tmp_path / "cpu"), **tasks) == 0
    with pretend_gpu("mps"):
        device = ("--device", "mps", "--compute", "fp32", "--quiet")
        assert bench.compare(*device, methods=methods, out=str(tmp_path / "mps"), **tasks) == 0
    for name in names(methods):
        assert kl(tmp_path / "mps", name) == pytest.approx(kl(tmp_path / "cpu", name), rel=1e-3)


def test_no_row_of_logits_goes_to_the_host(bench, tmp_path):
    with pretend_gpu() as log:
        assert bench.compare(*FP32, methods="rtn:g32", out=str(tmp_path / "gpu")) == 0
    wide = {
        line: count for (line, way), count in log.moved.items() if way == "D2H" and line.startswith("score/choices")
    }
    rows = 4 * 2 * 4 * 2  # choices, subjects, questions, models
    assert 0 < sum(wide.values()) <= rows * 16


def test_states_stay_on_the_gpu_between_variants(bench, tmp_path):
    """The baseline's go to the host once, to be kept for the next command; no variant's do, and none come back."""
    with pretend_gpu() as log:
        tasks = {"methods": "rtn:g32,rtn:int8-g32", "tasks": "kl,ppl"}
        assert bench.compare(*FP32, out=str(tmp_path / "gpu"), **tasks) == 0
    (record,) = (tmp_path / "home" / "states").rglob("*.safetensors")
    (positions, _), states = load_file(record)["states"].shape, load_file(record)["states"].nbytes
    moved = {way: {line: count for (line, each), count in log.moved.items() if each == way} for way in ("H2D", "D2H")}
    assert sum(count for line, count in moved["D2H"].items() if line.startswith("store/states")) == states
    columns = 2 + 2 * 10  # of the baseline's rows, and of two variants'
    rows = sum(count for line, count in moved["D2H"].items() if not line.startswith("store/"))
    assert rows == positions * columns * torch.float64.itemsize
    assert max(count for line, count in moved["D2H"].items() if line.startswith(("score", "metrics"))) < states
    assert max(count for line, count in moved["H2D"].items() if line.startswith(("score", "metrics"))) < states


def test_memory_that_lacks_while_a_variant_is_made_fails_that_variant_alone(bench, tmp_path, monkeypatch, capfd):
    def lack(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    monkeypatch.setattr("qeval.quantize.sequential.factorize", lack)
    with pretend_gpu():
        assert bench.compare(*FP32, methods="gptq:g32,rtn:g32", tasks="kl", out=str(tmp_path / "gpu")) == 3
    assert "cuda:0 ran out of memory while making gptq:g32" in capfd.readouterr().err
    assert {name: each["status"] for name, each in records(tmp_path / "gpu").items()} == {
        "gptq:g32": "failed",
        "rtn:g32": "done",
    }


def test_originals_lie_in_host_memory_where_the_gpu_lacks_room(bench, tmp_path, monkeypatch):
    monkeypatch.setattr("qeval.models.load.require_room", lambda *_: None)  # it was there when the model was loaded
    with pretend_gpu(free=1 << 10) as log:
        flags = {"methods": "rtn:g32", "tasks": "kl", "out": str(tmp_path / "gpu"), "batch_tokens": "64"}
        assert bench.compare(*FP32, **flags) == 0
    moved = {"D2H": 0, "H2D": 0}
    for (line, way), count in log.moved.items():
        moved[way] += count if line.startswith("backends/install") else 0
    assert moved["H2D"] >= moved["D2H"] == log.pinned > 0  # to pinned memory and back; codes unpacked there come too


def test_a_variants_key_names_the_arithmetic(bench, tmp_path):
    assert bench.compare("--quiet", methods="awq:g32", tasks="kl", out=str(tmp_path / "cpu")) == 0
    with pretend_gpu():
        assert bench.compare(*FP32, methods="awq:g32", tasks="kl", out=str(tmp_path / "gpu")) == 0
    keys = {records(tmp_path / out)["awq:g32"]["key"] for out in ("cpu", "gpu")}
    assert len(keys) == 2


class TestWorkers:
    def test_each_has_a_gpu_of_its_own(self, bench):
        asked = settings(bench, workers=2)
        assert [on_gpu_of(asked, place).model.device for place in range(2)] == ["cuda:0", "cuda:1"]
        assert len({identity_of(on_gpu_of(asked, place)) for place in range(2)}) == 1

    def test_one_that_was_named_is_shared(self, bench):
        assert on_gpu_of(settings(bench, device="cuda:1", workers=2), 1).model.device == "cuda:1"

    def test_a_ray_worker_sees_its_gpu_as_number_0(self, bench):
        assert on_gpu_of(settings(bench, device="cuda:1", executor="ray", workers=2), 1).model.device == "cuda:0"

    def test_more_of_them_than_gpus_are_refused(self, bench, capfd, tmp_path):
        with pretend_gpu(gpus=2):
            flags = ("--device", "cuda", "--workers", "3")
            assert bench.compare(*flags, methods="rtn:g32", out=str(tmp_path / "gpu")) == 2
        assert "each worker takes a GPU of its own, and this machine has 2" in capfd.readouterr().err


def test_the_benchmark_of_phases_runs(tmp_path):
    words = "--shape tiny --device cuda:0 --windows 4 --questions 2 --context 512 --methods rtn:g32,awq:g32 --threads 1"
    with pretend_gpu():
        report = benchmark.measure(benchmark.parse(words.split()), tmp_path)
    assert report["device"] == "Pretended GPU" and not report["failed"]
    phases = {phase["name"]: phase for phase in report["phases"]}
    assert {"load and check", "calibrate", "score baseline: corpus", "score awq:g32: questions"} <= set(phases)
    assert phases["score rtn:g32: corpus"]["share"] > 0


def test_torch_on_the_gpu_beside_llama_cpp(tmp_path, monkeypatch):
    monkeypatch.setattr(f"{STAND_IN}.llama_supports_gpu_offload", lambda: True)
    for module in ("library", "backend"):
        monkeypatch.setattr(f"qeval.backends.llamacpp.{module}.MODULE", STAND_IN)
    place = Bench(tmp_path / "bench")
    flags = ("--backend", "torch,llama.cpp", "--model", str(write_ggufs(tmp_path, "f32")["f32"]))
    with pretend_gpu():
        assert place.compare(*FP32, *flags, methods="rtn:g32", tasks="kl", out=str(tmp_path / "gpu"), model=None) == 0
    assert kl(tmp_path / "gpu", "rtn:g32@llama.cpp") == pytest.approx(kl(tmp_path / "gpu", "rtn:g32"), rel=0.05)

"""`--device-map auto` on two pretended GPUs: the figures are one device's, and little goes between the GPUs."""

from dataclasses import replace

import pytest
import torch

from qeval.backends.install import without_room
from qeval.backends.torch import TorchSession
from qeval.cli.app import run_program
from qeval.compare.machine import workers_here
from qeval.compare.settings import BackendChoice, ModelChoice
from qeval.compare.settings_json import identity_of, settings_json
from qeval.errors import UsageError
from qeval.models.device_map import placement_in_words
from qeval.models.load import load_model
from qeval.models.source import resolve
from qeval.types import Request
from tests.fixtures.bench import Bench, kl
from tests.fixtures.pretend_gpu import pretend_gpu
from tests.fixtures.tiny import save_tiny
from tests.unit.compare.test_settings_json import SETTINGS

SPREAD = ("--device", "cuda", "--device-map", "auto", "--compute", "fp32", "--quiet")
DRIFT = {"drift_prompts": "2", "drift_prompt_tokens": "8", "drift_tokens": "4"}
WIDTH, LAYERS, HEAD_SIZE = 64, 4, 16


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return Bench(tmp_path_factory.mktemp("bench"))


@pytest.fixture(scope="module", params=[False, True], ids=["own head", "tied head"])
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "m"
    sizes = {"hidden_size": WIDTH, "num_attention_heads": WIDTH // HEAD_SIZE, "num_hidden_layers": LAYERS}
    save_tiny(path, tie_word_embeddings=request.param, **sizes)
    return path


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("QEVAL_HOME", str(tmp_path / "home"))


@pytest.mark.parametrize(
    "methods",
    ["rtn:g32-head", "awq:g32,gptq:g32,mixed-rtn:g32-fisher", "rtn:int4-channel+r1r2,fp16+kv-int8,mixed-rtn:g32"],
)
def test_compare_gives_one_devices_figures(bench, tmp_path, methods):
    more = {"calibration_samples": "6", "tasks": "kl,mmlu,drift" if "head" in methods else "kl", **DRIFT}
    assert bench.compare("--quiet", methods=methods, out=str(tmp_path / "cpu"), **more) == 0
    with pretend_gpu(gpus=2) as log:
        assert bench.compare(*SPREAD, methods=methods, out=str(tmp_path / "gpu"), **more) == 0
    assert log.bytes_between_gpus() > 0
    for name in methods.split(","):
        assert kl(tmp_path / "gpu", name) == pytest.approx(kl(tmp_path / "cpu", name), rel=1e-5, abs=1e-7)


def test_states_are_one_gpus_and_cross_once(folder):
    tokens = tuple(range(3, 40))
    requests = [Request(tokens, (0, 5, 36)), Request(tokens, (36,))]
    with pretend_gpu():
        alone = TorchSession(load_model(resolve(str(folder)), device="cuda", dtype="float32").model).states(requests)
    with pretend_gpu(gpus=2) as log:
        model = load_model(resolve(str(folder)), device="cuda", dtype="float32", spread=True).model
        session = TorchSession(model)
        log.moved.clear()
        states = session.states(requests)
        to_host, between = log.bytes_to_host(), log.bytes_between_gpus()
        assert all(torch.equal(one.cpu(), other.cpu()) for one, other in zip(states, alone, strict=True))
        assert session.logits(states[0]).shape == (3, session.vocab_size)

        # the hidden states once, and the positions and their angles for each layer of the second GPU
        places = [next(layer.parameters()).device.index for layer in model.model.layers]
        assert model.model.rotary_emb.inv_freq.device.index == 0
    assert places == [0, 0, 1, 1]
    hidden, angles, scored = 2 * len(tokens) * WIDTH * 4, 2 * len(tokens) * HEAD_SIZE * 4, 4 * WIDTH * 4
    assert hidden <= between <= hidden + 2 * (angles + len(tokens) * 8) + scored
    assert to_host == 0


def test_the_plan_says_which_layers_lie_where(folder):
    with pretend_gpu(gpus=2):
        model = load_model(resolve(str(folder)), device="cuda", spread=True).model
        words = placement_in_words(model, [f"model.layers.{layer}" for layer in range(LAYERS)])
    assert words == "cuda:0: layers 0-1 of 4, 16.0 GiB free; cuda:1: layers 2-3 of 4, 16.0 GiB free"


def test_a_variant_is_quantized_by_itself_too(bench, tmp_path):
    with pretend_gpu(gpus=2):
        words = ("--model", str(bench.model), "--method", "rtn:g32", "--out", str(tmp_path / "v"))
        assert run_program(["quantize", *words, *SPREAD]) == 0


def test_originals_move_to_the_host_from_the_gpu_that_lacks_room(monkeypatch):
    free = {0: 100, 1: 1000}
    monkeypatch.setattr("qeval.backends.install.free_bytes", lambda device: free[device.index])
    sizes = {torch.device("cuda", 0): 60, torch.device("cuda", 1): 60}
    assert without_room(sizes) == {torch.device("cuda", 0)}
    assert without_room({torch.device("cpu"): 60}) == set()


class TestRefusals:
    @pytest.mark.parametrize(
        ("flags", "says"),
        [
            (("--stream",), "--stream holds one layer at a time and --device-map auto all layers"),
            (("--workers", "3"), "none is left for --workers 3"),
            (("--executor", "ray"), "Ray's workers have one model each"),
            (("--backend", "torch,ort"), "leave out --backend ort"),
            (("--device", "cuda:1"), "--device cuda:1 names one"),
            (("--device", "cpu"), "this run computes on cpu"),
        ],
    )
    def test_what_does_not_go_with_it(self, bench, tmp_path, capfd, flags, says):
        with pretend_gpu(gpus=2):
            assert bench.compare(*SPREAD, *flags, methods="rtn:g32", out=str(tmp_path / "out")) == 2
        assert says in capfd.readouterr().err

    def test_gpus_that_do_not_hold_it_together(self, bench, tmp_path, capfd):
        with pretend_gpu(gpus=2, free=512 << 20):
            assert bench.compare(*SPREAD, methods="rtn:g32", out=str(tmp_path / "out")) == 2
        assert "there are 0.5 GiB free on cuda:0, 0.5 GiB free on cuda:1" in capfd.readouterr().err

    def test_a_model_that_does_not_say_what_stays_together(self, folder, monkeypatch):
        monkeypatch.setattr("transformers.LlamaPreTrainedModel._no_split_modules", None)
        with pretend_gpu(gpus=2), pytest.raises(UsageError, match="LlamaForCausalLM does not say which"):
            load_model(resolve(str(folder)), device="cuda", spread=True)


def test_one_process_scores_and_no_key_knows_of_it():
    choice, torch_alone = ModelChoice("org/m", device="cuda"), BackendChoice()
    one_gpu = replace(SETTINGS, model=choice, backends=torch_alone, workers=0, executor="local")
    spread = replace(one_gpu, model=replace(choice, device_map="auto"))
    with pretend_gpu(gpus=2):
        assert (workers_here(one_gpu), workers_here(spread)) == (2, 1)
    assert identity_of(one_gpu) == identity_of(spread)
    assert "device_map" not in settings_json(one_gpu)["settings"]["model"]
    assert settings_json(spread)["settings"]["model"]["device_map"] == "auto"

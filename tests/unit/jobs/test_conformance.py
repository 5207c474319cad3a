"""Every family against everything that is promised of it; and that these checks can fail."""

import json
import shutil
import sys
import warnings

import pytest
import torch

from qeval.backends.sharing import Sharing
from qeval.backends.torch import TorchSession
from qeval.cli.app import run_program
from qeval.errors import QevalError
from qeval.jobs import conformance
from qeval.jobs.conformance import CHECKS, Bench, CheckCell, WrongError, any_failed, check_families, matrix_markdown
from qeval.models.families import FAMILIES, Family
from qeval.models.silence_transformers import quiet
from qeval.models.structure.weight_views import weights_of
from qeval.progress import Silent
from qeval.types import Request
from tests.fixtures.bench import Bench as Workplace
from tests.fixtures.families import LATENT
from tests.fixtures.made_up import heron
from tests.fixtures.tiny import tiny_tokenizer

QUICK = [check for check in CHECKS if check != "onnx"]
EXPORTED = ("GPT2", "GPTNeoX")
"""What the tests of exports leave out: matrices kept transposed, and fused head by head."""


@pytest.fixture(scope="module", params=FAMILIES)
def bench(request):
    return Bench(request.param)


@pytest.mark.parametrize("check", QUICK)
def test_a_family_does_all_that_is_promised(bench, check):
    assert CHECKS[check](bench)


def test_a_family_that_nobody_has_heard_of_needs_no_line():
    bench = Bench("Heron", heron())
    groups = [group for group in bench.description.groups if group.layer == 1]
    assert [group.kind for group in groups] == ["ask/offer/tell", "gather", "drag/lift", "land"]
    takers = [group.fold.parameters[0].removeprefix("heron.strides.1.") for group in groups]
    assert takers == ["before.weight", "gaze.tell.weight", "between.weight", "wing.lift.weight"]
    assert [group.fold.plus_one for group in groups] == [True, False, True, False]
    assert groups[1].fold.parameters[1] == "heron.strides.1.gaze.tell.bias"
    for check in QUICK:
        assert CHECKS[check](bench)


@pytest.fixture
def unnamed(monkeypatch):
    """The tiny model of a family of transformers that no line of qeval names."""

    def made(config, **settings):
        monkeypatch.setitem(FAMILIES, config, Family(config, "", settings))
        return Bench(config)

    return made


@pytest.mark.parametrize(("config", "settings"), [("Arcee", {}), ("SeedOss", {"head_dim": 16}), ("DeepseekV3", LATENT)])
def test_families_that_no_line_names_work_too(unnamed, config, settings):
    bench = unnamed(config, **settings)
    for check in ("awq", "gptq", "folding", "prefix", "states"):
        assert CHECKS[check](bench)


def test_a_prefix_that_attention_would_not_see_is_an_error_and_found_before(unnamed, monkeypatch):
    monkeypatch.setattr("qeval.backends.sharing.can_share", lambda *_: True)
    bench = unnamed("DeepseekV3", **LATENT)
    assert CHECKS["prefix"](bench)
    assert "it fails (QevalError)" in bench.backend.sharing.warning
    session = TorchSession(bench.model, sharing=Sharing(apart=True))
    with pytest.raises(QevalError, match="DeepseekV3Attention attends to other keys than those it cached"):
        session.states([Request((1, 2), (0, 1))], session.prefill((3, 4)))


@pytest.mark.parametrize("name", ["Llama", "Mixtral"])
def test_blocks_of_128_in_widths_that_they_do_not_divide(name):
    bench = Bench(name, conformance.tiny_family(name, hidden_size=160, intermediate_size=208))
    widths = {weight.codes.shape[1] for weight in bench.variant("rtn:g128").weights.values()}
    assert widths == {160, 208}
    kls = [bench.kl(bench.variant(f"{method}:g128")) for method in ("rtn", "awq", "gptq", "mixed")]
    assert 0 < kls[3] < kls[0]
    assert bench.kl(bench.variant("rtn:int8-g128")) < kls[0] / 4


@pytest.mark.parametrize("method", ["awq:g32-full", "gptq:g32-full"])  # on which the tiny router keeps its choices
def test_an_expert_that_no_token_reaches_is_rounded_plainly_and_named(method):
    bench = Bench("Qwen3Moe", conformance.tiny_family("Qwen3Moe", num_experts=32))
    bench.samples = [bench.samples[0][:6]]
    reached = set(bench.statistics)
    unseen = [group.names[0] for group in bench.description.groups if group.names[0] not in reached]
    assert 0 < len(unseen) < 64
    variant, plain = bench.variant(method), bench.variant("rtn:g32-full-clip")
    told = variant.details["rounded plainly, no token reached them"]
    assert told.startswith(f"{len(unseen)}: {unseen[0]}")
    for name in unseen:
        assert torch.equal(variant.weights[name].codes, plain.weights[name].codes)
    seen = next(group.names[0] for group in bench.description.groups if group.names[0] in reached)
    assert not torch.equal(variant.weights[seen].codes, plain.weights[seen].codes)


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("QEVAL_HOME", str(tmp_path))


@pytest.fixture
def exporters_here(home, monkeypatch):
    """Exporters without a process of their own, whose imports take longer than a tiny export."""
    pytest.importorskip("onnxruntime_genai")
    pytest.importorskip("onnxscript")
    from qeval.backends.onnx import dynamo_child, export, genai_child

    def build(checkpoint, out, _):
        out.mkdir(parents=True)
        monkeypatch.setattr(sys, "argv", ["", str(checkpoint), str(out), "cpu", "fp32"])
        here(genai_child.main)

    def translate(checkpoint, out):
        out.mkdir(parents=True, exist_ok=True)
        here(lambda: dynamo_child.export_graph(checkpoint, out))

    monkeypatch.setattr(export, "_run_builder", build)
    monkeypatch.setattr(export.dynamo, "export_dynamo", translate)


def here(call):
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            call()
    except Exception as error:
        raise QevalError(str(error)) from error


@pytest.mark.parametrize("name", EXPORTED)
@pytest.mark.usefixtures("exporters_here")
def test_what_torchs_exporter_alone_takes_is_exported(name):
    assert CHECKS["onnx"](Bench(name)).startswith("dynamo")


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in EXPORTED])
@pytest.mark.usefixtures("exporters_here")
def test_every_other_family_is_exported(name):
    assert CHECKS["onnx"](Bench(name))


def test_every_check_fails_where_something_is_wrong(monkeypatch):
    """Each mutation is one that the check is there for."""
    bench = Bench("Mixtral")
    router = next(iter(bench.description.float_kinds))
    with monkeypatch.context() as patched, pytest.raises(WrongError, match="AWQ's scales alone change the states"):
        patched.setattr(conformance, "folded_floats", without(conformance.folded_floats, router))
        CHECKS["folding"](bench)
    with monkeypatch.context() as patched, pytest.raises(WrongError, match="changes nothing"):
        patched.setattr(Bench, "kl", lambda *_: 0.0)
        CHECKS["rtn"](bench)
    with monkeypatch.context() as patched, pytest.raises(WrongError, match="neither quantized nor kept"):
        patched.setattr(conformance, "quantizable", lambda description: ["another"])
        CHECKS["rtn"](bench)
    with monkeypatch.context() as patched, pytest.raises(WrongError, match="INT8 has a KL"):
        patched.setattr(conformance, "_FINER", 0.0)
        CHECKS["rtn"](bench)
    with monkeypatch.context() as patched, pytest.raises(WrongError, match="the mix has a KL of 1 nats, INT4 alone 1"):
        patched.setattr(Bench, "kl", lambda *_: 1.0)
        CHECKS["mixed"](bench)
    with monkeypatch.context() as patched, pytest.raises(WrongError, match="its logits are not those"):
        patched.setattr("qeval.backends.install._put", lambda *_: None)
        CHECKS["scoring"](bench)
    prefill = TorchSession.prefill
    with monkeypatch.context() as patched, pytest.raises(WrongError, match="a prefix of 7 tokens changes states"):
        patched.setattr(TorchSession, "prefill", lambda session, tokens: prefill(session, tokens[::-1]))
        CHECKS["prefix"](bench)
    bench.head.weight.mul_(2)  # the model's own: kept states still give its logits
    assert CHECKS["states"](bench)
    bench.__dict__["states"] = bench.states * 1.01
    with pytest.raises(WrongError, match="kept states give other logits"):
        CHECKS["states"](bench)


def without(call, name):
    return lambda *given: {key: value for key, value in call(*given).items() if key != name}


def test_weights_are_views_so_that_what_is_written_is_in_the_model():
    model = conformance.tiny_family("Mixtral")
    weights = weights_of(model)
    weights["model.layers.0.mlp.experts.down_proj[2]"].fill_(7)
    assert bool((model.model.layers[0].mlp.experts.down_proj[2] == 7).all())
    turned = conformance.tiny_family("GPT2")
    weights_of(turned)["transformer.h.0.mlp.c_fc.weight"][3].fill_(7)
    assert bool((turned.transformer.h[0].mlp.c_fc.weight[:, 3] == 7).all())


def test_the_command_prints_the_matrix_and_its_code_is_1_when_something_fails(monkeypatch, capfd):
    monkeypatch.setattr(conformance, "CHECKS", {"rtn": CHECKS["rtn"], "states": lambda bench: 1 / 0})
    monkeypatch.setattr(check_families, "__defaults__", (("rtn", "states"),))
    assert run_program(["models", "--check", "--family", "Llama", "--family", "Olmo"]) == 1
    lines = capfd.readouterr().out.splitlines()
    assert lines[0].split() == ["|", "family", "|", "rtn", "|", "states", "|"]
    assert lines[2].split() == ["|", "Llama", "|", "yes", "|", "NO", "|"]
    assert lines[-1] == "Olmo, states: division by zero"
    monkeypatch.setattr(conformance, "CHECKS", {"rtn": CHECKS["rtn"], "states": CHECKS["states"]})
    assert run_program(["models", "--check", "--family", "Llama", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["Llama"]["rtn"]["status"] == "works"


def test_wrong_use_of_the_command(capfd):
    assert run_program(["models", "--check", "--family", "Lama"]) == 2
    assert "Unknown family 'Lama'; nearest: Llama" in capfd.readouterr().err
    assert run_program(["models", "--family", "Llama"]) == 2
    assert "--family belongs to --check" in capfd.readouterr().err
    assert run_program(["models", "--json"]) == 0
    assert {"alias", "model", "line"} == set(json.loads(capfd.readouterr().out)[0])


def test_a_cell_that_cannot_apply_is_no_failure():
    matrix = {"A": {"onnx": CheckCell("cannot", "it has experts"), "rtn": CheckCell("works", "KL 1")}}
    assert not any_failed(matrix)
    assert matrix_markdown(matrix)[2:] == ["| A      | -    | yes |", "", "A, onnx: it has experts"]


def test_an_unforeseen_failure_is_told_in_its_cell(monkeypatch):
    monkeypatch.setattr(conformance, "CHECKS", {"rtn": lambda bench: torch.zeros(2) @ torch.zeros(3)})
    found = check_families(["Llama"], Silent(), ["rtn"])
    assert found["Llama"]["rtn"].status == "fails"
    assert "inconsistent tensor size" in found["Llama"]["rtn"].line


@pytest.mark.parametrize("name", ["Mixtral", "GPT2"])
def test_the_program_takes_checkpoints_whose_matrices_lie_otherwise(name, tmp_path, monkeypatch):
    """Experts under the checkpoint's own names; Conv1D: quantized, written, read back, scored and accounted for."""
    monkeypatch.setenv("QEVAL_HOME", str(tmp_path / "home"))
    place = Workplace(tmp_path)
    shutil.rmtree(place.model)
    with quiet():
        conformance.tiny_family(name).save_pretrained(place.model)
    tiny_tokenizer().save_pretrained(place.model)
    methods = ("rtn:g32", "awq:g32", "gptq:g32", "mixed-rtn:g32-fisher")
    assert place.compare("--quiet", methods=",".join(methods), tasks="kl", calibration_samples="6") == 0
    found = {variant["name"]: variant for variant in place.report()["variants"]}
    assert tuple(found) == methods
    kls = {each: found[each]["metrics"]["kl_nats"]["value"] for each in methods}
    assert 0 < kls["mixed-rtn:g32-fisher"] < kls["rtn:g32"]
    manifest = json.loads(next((tmp_path / "home" / "variants").glob("*/manifest.json")).read_text())
    total = sum(entry["rows"] * entry["columns"] for entry in manifest["weights"])
    total += sum(entry["parameters"] for entry in manifest["kept"])
    assert total == place.report()["model"]["parameters"]

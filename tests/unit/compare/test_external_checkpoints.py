"""`--variant NAME=PATH` of checkpoints that other tools quantized: through `compare`, and refused with their cause."""

import json
import math
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from qeval.compare.external_checkpoints import ExternalCheckpoint, baseline_of, check_answers
from qeval.compare.external_paths import VariantPath
from qeval.errors import UsageError
from qeval.formats.assemble import Reading
from qeval.models.families import tiny_family
from qeval.models.silence_transformers import quiet
from qeval.models.structure.graph import describe_model
from qeval.models.structure.head import head_of
from qeval.quant.grid import parse
from qeval.quant.qweight import QWeight
from qeval.quant.rtn import quantize_rtn
from qeval.report import build_report
from qeval.score.corpus import Shard
from qeval.score.token_hash import witness_of
from qeval.tasks.windows import Window
from tests.fixtures import packers
from tests.fixtures.architectures import tiny_architecture
from tests.fixtures.bench import CONTEXT, Bench, kl, records
from tests.fixtures.runs import reseal
from tests.fixtures.tiny import BYTES, save_tiny, tiny_tokenizer

AWQ = {"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm"}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 16}
UP = "model.layers.0.mlp.up_proj.weight"
QUIET = ("--quiet", "--tasks", "kl,ppl")


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """A model and its corpus; tests write their checkpoints beside it."""
    folder = tmp_path_factory.mktemp("elsewhere")
    made = Bench(folder)
    save_tiny(made.model, max_position_embeddings=CONTEXT, intermediate_size=128)
    return made


@pytest.fixture(autouse=True)
def home(bench, monkeypatch):
    monkeypatch.setenv("QEVAL_HOME", str(bench.folder / "home"))


@pytest.fixture
def made(bench, tmp_path):
    """Saves the bench's model quantized: by a packing, with changed tensors or weights."""

    def save(config, pack, grid="int4-g16", *, change=None, changed=None, name="theirs"):
        weights = packers.quantized(bench.model, grid)
        weights = {each: change(each, weight) if change else weight for each, weight in weights.items()}
        parts = {each: pack(weight) for each, weight in weights.items()}
        return packers.save_checkpoint(bench.model, tmp_path / name, config, parts, changed)

    return save


@pytest.fixture
def refused(bench, tmp_path, capsys):
    """What `compare` says of a variant that it refuses, before anything is scored."""

    def told(path, tasks="kl,ppl", **flags):
        out = tmp_path / "refused"
        asked = {"methods": None, "tasks": tasks, "out": str(out)} | flags
        assert bench.compare("--quiet", "--variant", f"theirs={path}", **asked) == 2
        assert not (out / "rows").exists()
        return " ".join(capsys.readouterr().err.split())

    return told


def test_a_checkpoint_is_scored_as_the_variant_that_it_was_packed_from(bench, made, tmp_path):
    """GPTQ's and AWQ's packings of round-to-nearest's integers lose what round-to-nearest loses."""
    paths = {"awq": made(AWQ, packers.awq, name="a"), "gptq": made(GPTQ, packers.gptq, name="g")}
    given = [flag for name, path in paths.items() for flag in ("--variant", f"{name}={path}")]
    out = tmp_path / "out"
    assert bench.compare(*QUIET, *given, methods="rtn:g16", out=str(out)) == 0
    found = records(out)
    for name in paths:
        assert kl(out, name) == pytest.approx(kl(out, "rtn:g16"), rel=2e-2)  # scales in half precision
        assert found[name]["grid"] == "int4-g16"
        assert found[name]["method"] == name
        assert found[name]["details"]["read as"] == "14 matrices as integers, scales and zero points"
        assert found[name]["details"]["computed"] == "by qeval's own path, not by the kernels that it was made for"
    run = json.loads((out / "run.json").read_text())
    assert {each["witness"] for each in run["variants"]} == {run["witness"]}


def test_model_optimizers_export_is_scored_with_its_own_file_of_settings(bench, made, tmp_path):
    """Its first exports said how they are quantized in hf_quant_config.json alone."""
    path = made(None, packers.modelopt)
    settings = {"quantization": {"quant_algo": "W4A16_AWQ", "group_size": 16}, "producer": {"name": "modelopt"}}
    (path / "hf_quant_config.json").write_text(json.dumps(settings))
    out = tmp_path / "out"
    assert bench.compare(*QUIET, "--variant", f"theirs={path}", methods="rtn:g16", out=str(out)) == 0
    assert kl(out, "theirs") == pytest.approx(kl(out, "rtn:g16"), rel=2e-2)  # scales in half precision
    assert records(out)["theirs"]["method"] == "modelopt"
    assert records(out)["theirs"]["details"]["made by"] == "Model Optimizer (W4A16_AWQ)"


def test_the_old_zero_points_read_as_the_new_are_named(made, refused):
    path = made(GPTQ | {"checkpoint_format": "gptq_v2"}, packers.gptq, "int4-g16-asym")
    assert "its zero points are one too low (as in 13 more of its 21 parameters)" in refused(path)


def test_the_new_zero_points_read_as_the_old_are_named(made, refused):
    path = made(GPTQ, lambda weight: packers.gptq(weight, v1=False), "int4-g16-asym")
    assert "its zero points are one too high" in refused(path)


def test_rows_packed_in_plain_order_are_named(made, refused):
    path = made(AWQ, lambda weight: packers.awq(weight, order=tuple(range(8))))
    assert "its nibbles are not in AWQ's order" in refused(path)


def test_swapped_nibbles_are_named(made, refused):
    def swapped(_, weight):
        codes = weight.codes.reshape(len(weight.codes), -1, 2).flip(-1).reshape(weight.codes.shape)
        return QWeight(weight.grid, codes, weight.scales, weight.zeros)

    assert "its nibbles are swapped along the columns" in refused(made(GPTQ, packers.gptq, change=swapped))


def test_one_layer_of_noise_is_named_without_a_cause(made, refused):
    def noise(name, weight):
        if name != UP:
            return weight
        codes = torch.randint(0, 16, weight.codes.shape, generator=torch.Generator().manual_seed(0)).to(torch.uint8)
        return QWeight(weight.grid, codes, weight.scales, weight.zeros)

    told = refused(made(GPTQ, packers.gptq, change=noise))
    assert f"its {UP} is not the baseline's: the relative error is" in told
    assert "no misreading that qeval knows explains it (nothing else of its 21 parameters is wrong)" in told


def test_the_matrix_and_not_what_follows_it_is_named_where_nothing_makes_good_for_its_scales(made, refused):
    def doubled(name, weight):
        return replace(weight, scales=weight.scales * 2) if name == UP else weight

    told = refused(made(GPTQ, packers.gptq, change=doubled))
    assert f"its {UP} is not the baseline's: the relative error is 1.0" in told
    assert "its scales are 2 times what its codes need" in told
    assert "(nothing else of its 21 parameters is wrong)" in told


def test_a_clip_that_makes_a_matrix_smaller_is_no_scale(bench, made, tmp_path):
    """AWQ's search clips values by a fifth and folds nothing into what follows."""
    names = [f"model.layers.{layer}.self_attn.v_proj.weight" for layer in (0, 1)]
    tensors = load_file(bench.model / "model.safetensors")

    def clipped(name, weight):
        own = tensors[name].float()
        return quantize_rtn(own.clamp(-1.3 * own.std(), 1.3 * own.std()), weight.grid) if name in names else weight

    path = made(GPTQ, packers.gptq, "int4-g16", change=clipped)
    given = ("--variant", f"theirs={path}")
    assert bench.compare(*QUIET, *given, methods=None, out=str(tmp_path / "out")) == 0


@pytest.mark.parametrize(
    ("change", "error"),
    [(lambda norm: norm * 2, "1.00"), (lambda norm: norm * (1 + 0.2 * (-1.0) ** torch.arange(64)).half(), "0.20")],
    ids=["doubled", "of another layer"],  # the second alone is within what four bits allow
)
def test_a_norm_that_no_matrix_makes_good_for_is_named(bench, made, refused, change, error):
    name = "model.layers.1.input_layernorm.weight"
    norm = load_file(bench.model / "model.safetensors")[name]
    told = refused(made(GPTQ, packers.gptq, changed={name: change(norm)}))
    assert f"its {name} is not the baseline's: the relative error is {error}" in told
    assert "no matrix after it makes good for it" in told


def test_scales_that_are_not_finite_are_named(made, refused):
    def broken(name, weight):
        scales = weight.scales.clone()
        scales[0, 0] = float("nan") if name == UP else scales[0, 0]
        return QWeight(weight.grid, weight.codes, scales, weight.zeros)

    assert f"its {UP} has 1 scales that are not finite." in refused(made(GPTQ, packers.gptq, change=broken))


def test_another_base_model_is_known_by_what_no_quantizer_changes(bench, made, refused, tmp_path):
    other = load_file(save_tiny(tmp_path / "other", seed=1, max_position_embeddings=CONTEXT) / "model.safetensors")
    name = "model.embed_tokens.weight"
    told = refused(made(GPTQ, packers.gptq, changed={name: other[name]}))
    assert f"its {name} differs from the baseline's by 1" in told
    assert "which no quantizer changes: it was made from another model" in told
    norm = load_file(bench.model / "model.safetensors")["model.norm.weight"]
    changed = {"model.norm.weight": norm * 1.1}
    assert "its model.norm.weight differs" in refused(made(GPTQ, packers.gptq, changed=changed))


def test_awqs_folded_norms_are_excused(bench, made, tmp_path):
    """Columns multiplied by scales that the norm before was divided by: the same model, up to rounding."""
    tensors = load_file(bench.model / "model.safetensors")
    scales = torch.exp2(torch.arange(64) % 5 - 2.0)
    norm = "model.layers.0.input_layernorm.weight"
    folded = {norm: (tensors[norm].float() / scales).half()}
    scaled = {f"model.layers.0.self_attn.{kind}_proj.weight" for kind in "qkv"}
    changed = {name: tensors[name] * scales.half() for name in scaled}
    folder = packers.save_checkpoint(bench.model, tmp_path / "folded", None, {}, changed)
    weights = packers.quantized(folder, "int4-g16")
    path = packers.save_checkpoint(
        bench.model, tmp_path / "awq", AWQ, {name: packers.awq(weight) for name, weight in weights.items()}, folded
    )
    out = tmp_path / "out"
    assert bench.compare(*QUIET, "--variant", f"theirs={path}", methods=None, out=str(out)) == 0
    reasons = {each["name"]: each["reason"] for each in records(out)["theirs"]["kept"]}
    assert reasons[norm] == "in float, other than the baseline has it"
    assert kl(out, "theirs") < 1


def test_a_missing_tensor_and_another_shape_are_named(made, refused):
    path = made(GPTQ, packers.gptq)
    file = path / "model.safetensors"
    tensors = load_file(file)
    save_file({name: tensor for name, tensor in tensors.items() if "1.mlp.down_proj" not in name}, file)
    assert "it lacks model.layers.1.mlp.down_proj.weight, which the baseline has" in refused(path)


def test_fewer_ids_than_the_baselines_are_named(bench, made, refused):
    tensors = load_file(bench.model / "model.safetensors")
    names = ("model.embed_tokens.weight", "lm_head.weight")
    path = made(GPTQ, packers.gptq, changed={name: tensors[name][:-6].clone() for name in names})
    assert "its model.embed_tokens.weight lacks rows 250 to 255 of the baseline's" in refused(path)


def test_a_streamed_baseline_can_not_be_laid_beside(bench, made, capsys):
    flags = ("--stream", "--variant", f"theirs={made(GPTQ, packers.gptq, 'int4-g32')}")
    assert bench.compare(*QUIET, *flags, methods=None) == 2
    assert "run once without --stream where memory holds both" in " ".join(capsys.readouterr().err.split())


def test_another_configuration_is_named(made, refused):
    path = made(GPTQ, packers.gptq)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.1}))
    assert "its configuration has rms_norm_eps 0.1 where the baseline has 1e-06" in refused(path)


@pytest.mark.parametrize("tasks", ["kl,ppl", "drift"])
def test_another_tokenizer_is_found_before_scoring(made, refused, tasks):
    path = made(GPTQ, packers.gptq)
    file = path / "tokenizer.json"
    words = json.loads(file.read_text())
    vocab = words["model"]["vocab"]
    vocab["e"], vocab["x"] = vocab["x"], vocab["e"]
    file.write_text(json.dumps(words))
    short = {"drift_prompts": "2", "drift_prompt_tokens": "16", "drift_tokens": "8"} if tasks == "drift" else {}
    told = refused(path, tasks, **short)
    assert "has other token ids than the baseline for the same text (the first at token" in told
    assert "so nothing of it could be compared." in told


def test_another_bos_is_found_before_scoring(made, refused):
    path = made(GPTQ, packers.gptq)
    tiny_tokenizer(bos=True).save_pretrained(path)
    assert "has another BOS than the baseline (id " in refused(path)


def test_a_padded_vocabulary_is_cut_and_said(bench, made, tmp_path):
    tensors = load_file(bench.model / "model.safetensors")
    names = ("model.embed_tokens.weight", "lm_head.weight")
    padded = {name: torch.cat([tensors[name], torch.ones(8, 64).half()]) for name in names}
    plain, path = made(GPTQ, packers.gptq, name="plain"), made(GPTQ, packers.gptq, changed=padded, name="padded")
    out = tmp_path / "out"
    given = ("--variant", f"plain={plain}", "--variant", f"padded={path}")
    assert bench.compare(*QUIET, *given, methods=None, out=str(out)) == 0
    assert f"the ids {BYTES} to {BYTES + 7} beyond the baseline's" in records(out)["padded"]["details"]["padding"]
    assert kl(out, "padded") == kl(out, "plain")


def test_a_chat_template_of_its_own_is_a_note(bench, made, tmp_path):
    path = made(GPTQ, packers.gptq)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained(path)
    out = tmp_path / "out"
    assert bench.compare(*QUIET, "--variant", f"theirs={path}", methods=None, out=str(out)) == 0
    assert records(out)["theirs"]["details"]["chat template"].startswith("another than the baseline's")


def test_a_broken_tie_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("QEVAL_HOME", str(tmp_path / "home"))
    bench = Bench(tmp_path)
    save_tiny(bench.model, max_position_embeddings=CONTEXT, intermediate_size=128, tie_word_embeddings=True)
    embedding = load_file(bench.model / "model.safetensors")["model.embed_tokens.weight"]
    weights = packers.quantized(bench.model, "int4-g16")
    parts = {name: packers.gptq(weight) for name, weight in weights.items()}
    path = packers.save_checkpoint(bench.model, tmp_path / "theirs", GPTQ, parts, {"lm_head.weight": embedding * 2})
    assert bench.compare(*QUIET, "--variant", f"theirs={path}", methods=None) == 2
    assert "its lm_head.weight is not its model.embed_tokens.weight" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("head", ["of another model", "of zeros"])
def test_a_float_head_that_is_not_the_baselines_is_named(bench, made, refused, head):
    own = load_file(bench.model / "model.safetensors")["lm_head.weight"]
    other = own.roll(1, 0) if head == "of another model" else torch.zeros_like(own)
    assert "its lm_head.weight differs from the baseline's by 1" in refused(
        made(GPTQ, packers.gptq, changed={"lm_head.weight": other})
    )


@pytest.mark.parametrize(("value", "told"), [(0.0, "its logits are constant"), (math.nan, "its logits are not finite")])
def test_answers_that_are_none_are_named(tmp_path, value, told):
    """Weights that pass by the letter may still answer nothing."""
    made = ExternalCheckpoint(
        VariantPath("theirs", "x", tmp_path), tmp_path, {}, Reading(None, {}, {}), "float", "floats", ()
    )
    answers = torch.full((16, 8), value)
    session = SimpleNamespace(vocab_size=8, states=lambda requests: [answers], logits=lambda states: states)
    with pytest.raises(UsageError, match=told):
        check_answers(made, session)


def test_a_run_whose_witness_differs_compares_nothing(bench, made, tmp_path):
    out = tmp_path / "out"
    assert (
        bench.compare(*QUIET, "--variant", f"theirs={made(GPTQ, packers.gptq)}", methods="rtn:g16", out=str(out)) == 0
    )
    run = json.loads((out / "run.json").read_text())
    run["variants"][1]["witness"] = "0" * 32
    reseal(out, run)
    shown = {variant.name: variant for variant in build_report(out).variants}
    assert shown["theirs"].status == "failed" and not shown["theirs"].metrics
    assert "It was not asked what the baseline was" in shown["theirs"].error
    assert shown["rtn:g16"].metrics


def test_the_witness_changes_with_every_part_of_what_is_scored():
    window = Window((1, 2, 3), 0, (0, 1), (1, 2))
    others = [
        (replace(window, tokens=(1, 2, 4)),),
        (replace(window, kl_positions=(0,)),),
        (replace(window, nll_positions=(1,)),),
        (window, window),
    ]
    one = witness_of([Shard(0, (window,))], [], None)
    assert witness_of([Shard(0, (window,))], [], None) == one
    assert len({one, *(witness_of([Shard(0, windows)], [], None) for windows in others)}) == 5


def test_a_torn_copy_in_the_cache_is_read_again(bench, made, tmp_path):
    path = made(GPTQ, packers.gptq)
    given = ("--variant", f"theirs={path}")
    assert bench.compare(*QUIET, *given, methods=None, out=str(tmp_path / "one")) == 0
    folder = bench.folder / "home" / "variants" / records(tmp_path / "one")["theirs"]["key"]
    (folder / "weights.safetensors").write_bytes(b"torn")
    assert bench.compare(*QUIET, *given, methods=None, out=str(tmp_path / "two")) == 0
    assert kl(tmp_path / "one", "theirs") == kl(tmp_path / "two", "theirs")


STACKED = {"Mixtral": r".*(\.experts\..*|_proj)\.weight", "GPT2": r".*\.c_(attn|proj|fc)\.weight"}


@pytest.mark.parametrize("family", STACKED)
def test_what_transformers_stacks_or_turns_is_found_in_a_file_that_does_not(bench, tmp_path, family):
    """Experts one by one, GPT-2's matrices as [inputs, outputs]: packed by GPTQ, they lose what rtn loses."""
    model, tokenizer = tiny_family(family, max_position_embeddings=CONTEXT, vocab_size=BYTES), tiny_tokenizer()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    turn = family == "GPT2"
    parts = {
        name: packers.gptq(quantize_rtn(tensor.T if turn else tensor, parse("int4-g16")))
        for name, tensor in tensors.items()
        if re.fullmatch(STACKED[family], name)
    }
    path = packers.save_checkpoint(tmp_path / "model", tmp_path / "theirs", GPTQ, parts)
    out, given = tmp_path / "out", {"model": str(tmp_path / "model"), "methods": "rtn:g16"}
    assert bench.compare(*QUIET, "--variant", f"theirs={path}", **given, out=str(out)) == 0
    assert kl(out, "theirs") == pytest.approx(kl(out, "rtn:g16"), rel=1e-3)
    assert "not used" not in records(out)["theirs"]["details"]


@pytest.mark.parametrize("name", ["Mamba", "Blt"])
def test_a_baseline_without_heads_or_sizes_of_its_own_can_be_laid_beside(name):
    """Every run prepares that, whether or not a checkpoint is given."""
    with quiet():
        model = tiny_architecture(name)
        source = SimpleNamespace(description=describe_model(model, folds=False), head=head_of(model))
    found = baseline_of(SimpleNamespace(model=model), source)
    assert {weight for group in source.description.groups for weight in group.names} <= found.parameters.keys()

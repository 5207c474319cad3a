"""What users get wrong, through the command line: one sentence that says what and where, its exit code, no traceback.

Every refusal comes before any work: nothing is written to the report's folder.
"""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from qeval.cli.app import run_program
from qeval.models.families import byte_tokenizer
from tests.fixtures.bench import Bench
from tests.fixtures.tiny import tiny_tokenizer


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return Bench(tmp_path_factory.mktemp("bench"))


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("QEVAL_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture
def refused(place, tmp_path, capfd):
    """Runs `compare`, which must refuse; returns the sentence."""

    def check(*more, code=2, **changed):
        out = tmp_path / "out"
        capfd.readouterr()
        assert place.compare(*more, **({"out": str(out)} | changed)) == code
        heard = capfd.readouterr()
        assert heard.out == ""
        assert "Traceback" not in heard.err
        assert not out.exists()
        assert heard.err.startswith("error: ")
        assert heard.err.count("\n") == 1
        return heard.err.removeprefix("error: ").rstrip("\n")

    return check


FLAGS = {
    "an unknown model": (
        {"model": "llama-2-7c"},
        "Unknown model 'llama-2-7c'; nearest: llama-2-7b",
        "or give a hub id",
    ),
    "a folder that is not there": ({"model": "./nowhere"}, "The model folder './nowhere' does not exist."),
    "an unknown method": ({"methods": "rtn,awk"}, "Unknown method 'awk'; nearest: awq. Choices: autoround, awq, gptq"),
    "no method": ({"methods": " , "}, "--methods names no method"),
    "a method twice": ({"methods": "rtn:g32,rtn:g32"}, "Two variants are named 'rtn:g32'"),
    "bits that no grid has": ({"methods": "rtn:g32,rtn:int9"}, "'rtn:int9': A grid has 2 to 8 bits, not 9."),
    "a word that no grid has": ({"methods": "awq:bogus"}, "'awq:bogus'", "'bogus' in 'bogus' is not part"),
    "a block larger than a row": (
        {"methods": "rtn:g32,rtn:g128"},
        "'rtn:g128': Blocks of 128 are larger than a row of model.layers.0.self_attn.q_proj.weight (64 weights)",
    ),
    "a format that is misspelt": ({"methods": "rtn:g32,nvpf4"}, "Unknown method or format 'nvpf4'; nearest: nvfp4"),
    "a rule that no format has": ({"methods": "mxfp4-ceil"}, "Unknown grid 'mxfp4-ceil'; nearest: mxfp4-rceil"),
    "a format within a method": (
        {"methods": "rtn:nvpf4"},
        "'nvpf4' in 'nvpf4' is not part of a grid's name (nearest: nvfp4)",
    ),
    "floats on ONNX Runtime": (
        {"methods": "rtn:g32,nvfp4", "backend": "torch,ort"},
        "'nvfp4': ONNX Runtime's MatMulNBits multiplies by integers of 4 or 8 bits, not by nvfp4",
        "--backend torch.",
    ),
    "floats in a mix": (
        {"methods": "mixed:nvfp4"},
        "'mixed:nvfp4': mixed mixes widths of integers, not nvfp4; take rtn",
        "or several formats (mixed:int4/nvfp4-6bpw).",
    ),
    "a mix of formats without a size": (
        {"methods": "mixed-rtn:int4-g32/bf16"},
        "'mixed-rtn:int4-g32/bf16' names formats and no size; add one such as",
    ),
    "a mix of formats below the smallest": (
        {"methods": "mixed-rtn:int4-g32/nvfp4/fp8-3bpw"},
        "'mixed-rtn:int4-g32/nvfp4/fp8-3bpw': a budget of 3 bits per weight is below the smallest possible size",
    ),
    "a format of a mix that ONNX Runtime has no kernel for": (
        {"methods": "mixed-rtn:int4-g32/nvfp4-4.9bpw", "backend": "torch,ort"},
        "ONNX Runtime's MatMulNBits multiplies by integers of 4 or 8 bits, not by nvfp4 (model.layers.0.",
    ),
    "floats by another tool": ({"methods": "hqq:nvfp4"}, "'hqq:nvfp4': hqq is asked for integers alone"),
    "another tool's range": (
        {"methods": "ort:rtn-signed"},
        "'ort:rtn-signed': ort spans its range in a way of its own",
    ),
    "a range and zero points": ({"methods": "rtn:g32-asym-half"}, "'half' says how a symmetric grid spans its range"),
    "a budget that is no number": ({"budget": "lots"}, "--budget takes bits per weight such as 4.8bpw, not 'lots'."),
    "a budget for rtn": ({"methods": "rtn:4bpw"}, "'rtn:4bpw': a budget or a high grid belongs to mixed methods"),
    "a budget below the smallest": (
        {"methods": "mixed-rtn:g32", "budget": "5bpw"},
        "'mixed-rtn:g32': a budget of 5 bits per weight is below the smallest possible size",
        "this model takes 5.031 to 9.030.",
    ),
    "a budget above the largest": (
        {"methods": "mixed-rtn:g32-9.1bpw"},
        "'mixed-rtn:g32-9.1bpw': a budget of 9.1 bits per weight is above the largest possible size",
    ),
    "a mix of one width with itself": (
        {"methods": "rtn:g32,mixed:int8-g32"},
        "'mixed:int8-g32' has nothing to mix: what matters most would get int8-g32, and the rest has int8-g32 already;",
        "give the rest fewer bits",
    ),
    "a mix of one width with itself, by position": (
        {"methods": "mixed-rtn:int8-g32", "importance": "positional"},
        "'mixed-rtn:int8-g32' has nothing to mix",
    ),
    "a budget for a head that no mix raises": (
        {"methods": "mixed-rtn:g32-head-8.5bpw"},
        "above the largest possible size; this model takes 5.025 to 8.243.",
    ),
    "too little text to choose on and to accept on": (
        {"methods": "mixed-rtn:g32-fisher"},
        "'mixed-rtn:g32-fisher': --importance fisher chooses on 4 calibration samples",
    ),
    "a budget under the positional rule": (
        {"methods": "mixed-rtn:g32-6bpw", "importance": "positional"},
        "the positional rule has its own size",
    ),
    "an unknown task": ({"tasks": "kl,hellaswagg"}, "Unknown task 'hellaswagg'; nearest: hellaswag,"),
    "no task": ({"tasks": ","}, "Nothing to score: give --tasks"),
    "an unknown corpus": ({"corpus": "pydok"}, "Unknown corpus (and no such file) 'pydok'; nearest: pydoc."),
    "a corpus that is not there": ({"corpus": "a/none.txt"}, "The corpus 'a/none.txt' does not exist"),
    "an unknown protocol": (
        {"window": None, "stride": None, "protocol": "wikitext2"},
        "Unknown protocol 'wikitext2'; nearest: wikitext2-4096",
    ),
    "a protocol and a window": (
        {"protocol": "wikitext2-4096", "stride": None},
        "--protocol wikitext2-4096 fixes the window and the stride",
    ),
    "a window longer than the context": (
        {"window": "513", "stride": "513"},
        "A window of 513 tokens is longer than the model's context of 512",
    ),
    "a stride longer than the window": ({"stride": "65"}, "--stride 65 must lie between 1 and the window, 64"),
    "a BOS that the tokenizer lacks": ({"bos": "always"}, "--bos always", "has no BOS"),
    "an unknown subject": ({"subjects": "astronomi"}, "'astronomi'; nearest: astronomy"),
    "no subject": ({"subjects": ","}, "--subjects ',' names no subject; leave it out for all of them."),
    "more shots than examples": ({"shots": "3"}, "astronomy_dev.csv holds 2 examples, fewer than --shots 3."),
    "shots below none": ({"shots": "-1"}, "Invalid value for '--shots'"),
    "a seed below zero": ({"seed": "-1"}, "Invalid value for '--seed'"),
    "no question": ({"limit": "0"}, "--limit must be at least 1, not 0."),
    "no thread": ({"threads": "0"}, "Invalid value for '--threads'"),
    "an unknown device": ({"device": "tpu"}, "Unknown device 'tpu'"),
    "an unknown compute type": ({"compute": "fp8"}, "Unknown compute type 'fp8'"),
    "an unknown backend": ({"backend": "onnx"}, "Unknown backend 'onnx'. Choices: llama.cpp, ort, torch, vllm"),
    "a revision of a folder": ({"revision": "main"}, "--revision main needs a model on the hub"),
    "a variant without a folder": ({"variant": "mine"}, "--variant takes NAME=PATH, not 'mine'."),
    "a variant named as a method": ({"variant": "rtn:g32=x"}, "Two variants are named 'rtn:g32'"),
    "a variant named as the baseline": ({"variant": "baseline=x"}, "A variant cannot be named 'baseline'"),
    "a variant that is not there": ({"variant": "mine=x"}, "--variant mine=x: there is nothing there; on the hub"),
}


@pytest.mark.parametrize(("changed", "said"), [(c, s) for c, *s in FLAGS.values()], ids=FLAGS)
def test_a_wrong_flag_is_refused(refused, changed, said):
    sentence = refused(**changed)
    assert len(sentence) < 500
    for words in said:
        assert words in sentence


RECIPES = {
    "an unknown key": (
        "variants: [{method: rtn, gird: g32}]",
        "variant 1 'gird'; nearest: grid. Choices: act_order, activations, algorithm,",
    ),
    "an unknown key at the top": ("varients: [rtn]", "'varients'; nearest: variants"),
    "an unknown method": ("variants: [rtn:g32, {method: awk}]", "Unknown method 'awk'; nearest: awq."),
    "a wrong type": ("variants: [{method: rtn, clip: 3}]", "variant 1: 'clip' must be bool, not 3."),
    "a method that is no name": ("variants: [{method: [rtn]}]", "variant 1: 'method' must be str, not ['rtn']."),
    "no method": ("variants: [rtn:g32, {grid: g32}]", "variant 2 names no method."),
    "no list": ("variants: 3", "'variants' must be a list with at least one recipe."),
    "no mapping": ("- rtn", "must hold a mapping with a list 'variants'."),
    "no YAML": ("variants: [{", "c.yaml' is not valid YAML", "line 1"),
    "an unknown grid": ("variants: [{method: rtn, grid: g32-floot}]", "'rtn': 'floot' in 'g32-floot' is not part"),
    "a high grid with fewer bits": (
        "variants: [{method: mixed, grid: int4-g32, high: int3-g32}]",
        "'mixed' has nothing to mix: what matters most would get int3-g32-signed",
        "and the rest has int4-g32-signed already",
    ),
    "rules that leave nothing to raise": (
        "variants: [{method: mixed-rtn, grid: g32, rules: [{match: '*', grid: int8}]}]",
        "'mixed-rtn' has nothing to mix",
    ),
    "an unknown high grid": ("variants: [{method: mixed, grid: g32, high: floot}]", "'mixed': 'floot' in 'floot'"),
    "a rule without a grid": ("variants: [{method: rtn, rules: [{match: a}]}]", "a rule needs both"),
    "a rule that matches nothing": (
        "variants: [{method: rtn, grid: g32, rules: [{match: '*z_proj*', grid: float}]}]",
        "'rtn': the rule '*z_proj*' matches no weight",
    ),
}


@pytest.mark.parametrize(("text", "said"), [(t, s) for t, *s in RECIPES.values()], ids=RECIPES)
def test_a_wrong_recipe_is_refused(refused, tmp_path, text, said):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    sentence = refused(config=str(path), methods=None)
    for words in said:
        assert words in sentence


def test_a_config_that_is_not_there_is_refused(refused):
    assert refused(config="none.yaml", methods=None) == "Cannot read 'none.yaml': No such file or directory."


@pytest.fixture
def model(place, tmp_path):
    """A model of one's own to break."""
    return shutil.copytree(place.model, tmp_path / "model")


def change(model, **tensors):
    path = model / "model.safetensors"
    found = load_file(path) | {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    save_file({n: t for n, t in found.items() if t is not None}, path, metadata={"format": "pt"})


def test_a_folder_without_config_is_refused(refused, model):
    (model / "config.json").unlink()
    assert refused(model=str(model)) == f"'{model}' is no model folder: there is no config.json in it."


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("hidden_size", "64", "config.json' can't be used: Validation error for field 'hidden_size'"),
        ("hidden_size", 128, "its config.json asks for hidden_size 128, which no tensor in it has"),
        ("model_type", "llamma", "config.json' is of type 'llamma', which transformers"),
    ],
)
def test_a_configuration_that_is_not_the_models_is_refused(refused, model, key, value, said):
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    assert said in refused(model=str(model))


def test_a_folder_without_weights_is_refused(refused, model):
    (model / "model.safetensors").unlink()
    assert refused(model=str(model)).startswith(f"'{model}' has no weights: neither model.safetensors nor")


def test_pickled_weights_are_refused_with_the_reason(refused, model):
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    assert "pickles only (pytorch_model.bin), which can run any code" in refused(model=str(model))


def test_a_missing_weight_is_named(refused, model):
    change(model, model__layers__1__mlp__up_proj__weight=None)
    expected = f"'{model}' lacks tensors that its model needs: model.layers.1.mlp.up_proj.weight."
    assert refused(model=str(model)) == expected


def test_torn_weights_are_refused(refused, model):
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    assert f"'{path}' is torn or not safetensors" in refused(model=str(model))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_weight_that_is_not_finite_is_named(refused, model, value):
    name = "model.layers.1.self_attn.k_proj.weight"
    weight = load_file(model / "model.safetensors")[name]
    weight[3, 5] = value
    change(model, **{name: weight})
    assert refused(model=str(model)).startswith(f"The weight {name} holds 1 values that are not finite")


def test_a_tokenizer_of_another_model_is_refused(refused, model):
    vocab = {letter: index + 100 for letter, index in tiny_tokenizer().get_vocab().items()}
    byte_tokenizer(vocab).save_pretrained(model)
    assert "is another model's" in (said := refused(model=str(model)))
    assert "but the model's embedding has 256 rows" in said


def test_a_corpus_shorter_than_a_window_is_refused(refused, tmp_path):
    (tmp_path / "short.txt").write_text("x" * 63)
    sentence = refused(corpus=str(tmp_path / "short.txt"))
    assert sentence.startswith("The corpus holds 63 tokens, fewer than one window of 64;")


def test_a_calibration_text_that_is_too_short_is_refused(refused):
    sentence = refused(calibration_length="5000")
    assert "holds 720 tokens, fewer than 4 samples of 5000" in sentence


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("What?,a,b,c,A", "a row has 6 cells (question, four choices, letter), not 5."),
        ("What?,a,b,c,d,E", "the answer must be one of A, B, C, D, not 'E'."),
        ("What?,a,,c,d,A", "the question or a choice is empty."),
    ],
)
def test_the_line_of_a_broken_csv_row_is_named(place, refused, tmp_path, row, said):
    folder = shutil.copytree(place.mmlu, tmp_path / "mmlu")
    path = folder / "test" / "philosophy_test.csv"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:2], row, *lines[2:]]) + "\n")
    assert refused(mmlu_dir=str(folder)) == f"{path}, line 3: {said}"


def test_a_folder_without_questions_is_refused(refused, tmp_path):
    assert f"'{tmp_path}' holds no MMLU questions" in refused(mmlu_dir=str(tmp_path))


def test_a_file_as_the_place_for_a_report_is_refused(place, refused):
    assert refused(out=str(place.corpus)) == f"--out {place.corpus} is a file; name a folder for the report."


@pytest.mark.parametrize("address", ["s3://bucket/run", "memory://run", "file:///tmp/run", "gs://bucket"])
def test_an_address_is_no_folder_for_a_run(refused, address):
    told = refused(out=address)
    assert f"{address.partition(':')[0]}:/" in told
    assert "a run's ledger needs a folder whose file system locks files" in told


@pytest.mark.parametrize("name", ["mmlu", "corpus.txt"])
def test_quantize_writes_over_nothing_but_variants(place, capfd, monkeypatch, name):
    monkeypatch.setattr("qeval.compare.variants.quantize_plan", None)  # refused before the work
    out = place.folder / name
    assert run_program(["quantize", "--model", str(place.model), "--method", "rtn:g32", "--out", str(out)]) == 2
    assert capfd.readouterr().err == f"error: '{out}' exists and is no variant; name another folder.\n"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--method", "rtn"], "'rtn': Blocks of 128 are larger than a row of"),
        (["--method", "awq:g32", "--calibration-samples", "0"], "Invalid value for '--calibration-samples'"),
        (["--method", "mixed-rtn:g32", "--budget", "2bpw"], "'mixed-rtn:g32': a budget of 2 bits per weight is below"),
        (["--method", "rtm"], "Unknown method 'rtm'; nearest: rtn, ort."),
    ],
)
def test_quantize_refuses_what_cannot_be_made(place, tmp_path, capfd, flags, said):
    assert (
        run_program(["quantize", "--model", str(place.model), "--out", str(tmp_path / "v"), "--offline", *flags]) == 2
    )
    assert capfd.readouterr().err.startswith(f"error: {said}")
    assert not (tmp_path / "v").exists()


def test_debug_shows_the_traceback_of_a_refusal(place, capfd):
    assert place.compare("--debug", model="./nowhere") == 2
    heard = capfd.readouterr().err
    assert "Traceback" in heard
    assert heard.endswith("error: The model folder './nowhere' does not exist.\n")

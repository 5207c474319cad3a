"""`--stream`: the rows of the unstreamed run, bit for bit, whatever the memory allowed; and memory that is kept to."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig
from transformers.core_model_loading import Transpose
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from qeval.backends.base import Saved
from qeval.backends.stream.backend import StreamBackend, inspect, streamed
from qeval.backends.torch import TorchBackend, TorchSession
from qeval.compare.arguments import size_bytes
from qeval.errors import QevalError, UsageError
from qeval.models.checkpoint.meta_model import build_meta_model
from qeval.models.checkpoint.weights import read_entries
from qeval.models.families import Family
from qeval.models.structure.graph import describe_model
from qeval.models.structure.head import head_of
from qeval.models.structure.weight_views import stacks_of
from qeval.quant.grid import parse
from qeval.quant.rtn import quantize_rtn
from qeval.quant.variant import FloatWeight, Variant
from qeval.store.rows import concat
from qeval.store.variants import Origin, save_variant
from qeval.types import Call, Request
from tests.fixtures.bench import Bench
from tests.fixtures.families import FAMILIES, LATENT, STREAMED_FAMILIES, tiny_family

STREAMED = (
    "rtn:g32,rtn:int8-channel,rtn:g32-asym-head,rtn:int4-tensor-asym-head,mixed-rtn:g32-positional,rtn:int4-tensor,"
    "rtn:nvfp4-head,rtn:fp8-tile128-head,rtn:mxfp4-rceil-head,rtn:g32-signed"
)
LIMIT = 1 << 20


def tokens(count, seed=0):
    return tuple(torch.randint(1, 256, (count,), generator=torch.Generator().manual_seed(seed)).tolist())


def backend_of(model, folder, limit=LIMIT):
    model.save_pretrained(folder)
    entries = read_entries([folder / "model.safetensors"])
    weightless, notes = build_meta_model(AutoConfig.from_pretrained(folder), torch.float32, entries, str(folder))
    assert not notes
    assert {parameter.device.type for parameter in weightless.parameters()} == {"meta"}
    made = streamed(weightless, entries, torch.device("cpu"), "float32")
    return StreamBackend(made, *inspect(made, "float32"), limit)


@pytest.mark.parametrize("family", STREAMED_FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_every_family_gives_the_same_states_bit_for_bit_in_one_pass(family, tied, tmp_path):
    model = tiny_family(family, tie_word_embeddings=tied)
    whole = TorchSession(model)
    whole.packs &= not stacks_of(model)  # an expert multiplies all of a batch's tokens at once, fillers too
    outer, inner = tokens(11), tokens(5, seed=1)
    short = (Request(tokens(9, seed=2), (0, 8)), Request(tokens(7, seed=3), (6,)))
    windows = (Request(tokens(40, seed=5), tuple(range(40))), Request(tokens(40, seed=6), (39,)))
    limit = LIMIT * (4 if stacks_of(model) else 1)
    with backend_of(model, tmp_path, limit).open(None) as session:
        session.expect([Call((), windows), Call((outer,), short), Call((outer, inner), short)])
        kept, mine = whole.prefill(outer), session.prefill(outer)
        nested, own = whole.prefill(inner, kept), session.prefill(inner, mine)
        pairs = [
            (session.states(windows), whole.states(windows)),
            (session.states(short, mine), whole.states(short, kept)),
            (session.states(short, own), whole.states(short, nested)),
        ]
        for found, expected in pairs:
            assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
            assert torch.equal(session.logits(found[0]), whole.logits(expected[0]))
        assert session.passes == 1


def test_buffers_that_are_kept_with_the_weights_are_read(tmp_path, monkeypatch):
    monkeypatch.setitem(FAMILIES, "DeepseekV3", Family("DeepseekV3", "", LATENT))
    model, requests = tiny_family("DeepseekV3"), (Request(tokens(40), tuple(range(40))),)
    before = TorchSession(model).states(requests)[0]
    model.get_buffer("model.layers.1.mlp.gate.e_score_correction_bias").copy_(torch.tensor([3.0, 0.0, 0.0, -3.0]))
    expected = TorchSession(model).states(requests)[0]
    assert not torch.equal(before, expected)
    with backend_of(model, tmp_path, 4 * LIMIT).open(None) as session:
        assert torch.equal(session.states(requests)[0], expected)


@pytest.mark.parametrize("tied", [False, True])
def test_what_a_variant_changes_outside_the_layers_is_streamed_too(tied, tmp_path):
    model, requests = tiny_family("Llama", tie_word_embeddings=tied), (Request(tokens(40), tuple(range(40))),)
    names = ["model.embed_tokens.weight", "model.norm.weight", *([] if tied else ["lm_head.weight"])]
    floats = {name: model.get_parameter(name).detach() * (1.5 + place) for place, name in enumerate(names)}
    matrix = "model.layers.0.self_attn.q_proj.weight"
    weights = {matrix: quantize_rtn(model.get_parameter(matrix).detach(), parse("int8-channel"))}
    variant = Variant("key", weights, floats, {}, tuple(FloatWeight(name, 1, "changed") for name in floats))
    origin = Origin(
        recipe={"method": "rtn"}, model={"name": "tiny"}, calibration={"source": "pydoc"}, float_bits=32, seconds=0.0
    )
    save_variant(variant, tmp_path / "variant", origin)
    whole = TorchBackend(model, describe_model(model), head_of(model), torch.float32)
    with whole.open(variant) as session:
        states = session.states(requests)[0]
        expected = states, session.logits(states)
    streaming = backend_of(model, tmp_path / "model")
    with streaming.open(None) as session:
        before = session.states(requests)[0]
    with streaming.open(Saved(tmp_path / "variant")) as session:
        states = session.states(requests)[0]
        assert torch.equal(states, expected[0])
        assert torch.equal(session.logits(states), expected[1])
    assert not torch.equal(before, states)
    with streaming.open(None) as session:
        assert torch.equal(session.states(requests)[0], before)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return Bench(tmp_path_factory.mktemp("bench"))


@pytest.fixture(scope="module")
def unstreamed(place, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QEVAL_HOME", str(tmp_path_factory.mktemp("home")))
        assert place.compare("--quiet", methods=STREAMED) == 0
        yield place.out


def rows(out, kind):
    return concat(kind, sorted((out / "rows" / kind).glob("*.parquet"))).to_pylist()


def by_name(found):
    return sorted(found, key=lambda row: (row["variant"], *(row.get(k) or 0 for k in ("window", "position", "item"))))


@pytest.mark.parametrize("limit", ["2MiB", "1MiB"])
def test_a_streamed_run_has_the_rows_of_an_unstreamed_one(place, unstreamed, tmp_path, monkeypatch, limit):
    monkeypatch.setenv("QEVAL_HOME", str(tmp_path / "home"))
    out = tmp_path / "out"
    assert place.compare("--quiet", "--stream", methods=STREAMED, max_memory=limit, out=str(out)) == 0
    for kind in ("tokens", "items"):
        expected, found = by_name(rows(unstreamed, kind)), by_name(rows(out, kind))
        assert len(found) == len(expected) > 0
        for row, other in zip(found, expected, strict=True):
            assert row == {
                name: value if isinstance(value, (str, int, bool, type(None))) else pytest.approx(value, abs=1e-5)
                for name, value in other.items()
            }


def test_streamed_rows_are_found_under_the_same_keys_and_variants_are_the_same_files(
    place, unstreamed, tmp_path, monkeypatch
):
    home = tmp_path / "home"
    monkeypatch.setenv("QEVAL_HOME", str(home))
    monkeypatch.setattr("qeval.compare.stream._HEAD_BYTES", 1 << 8)  # the head in blocks of the vocabulary
    out = tmp_path / "out"
    assert place.compare("--quiet", "--stream", methods=STREAMED, max_memory="2MiB", out=str(out)) == 0
    names = [{path.name.partition("-")[0] for path in (run / "rows").rglob("*.parquet")} for run in (out, unstreamed)]
    assert names[0] == names[1]
    manifests = sorted(json.loads(path.read_text())["weights_sha256"] for path in home.rglob("manifest.json"))
    other = tmp_path / "other"
    monkeypatch.setenv("QEVAL_HOME", str(other))
    assert place.compare("--quiet", methods=STREAMED, out=str(tmp_path / "again")) == 0
    assert manifests == sorted(json.loads(path.read_text())["weights_sha256"] for path in other.rglob("manifest.json"))


def test_a_given_awq_variant_streams_with_its_floats_and_input_scales(place, tmp_path, monkeypatch):
    folder = tmp_path / "awq"
    assert place.quantize("awq:g32", folder) == 0
    outs = []
    for name, more in (("whole", []), ("streamed", ["--stream", "--max-memory", "1MiB"])):
        monkeypatch.setenv("QEVAL_HOME", str(tmp_path / name))
        outs.append(tmp_path / f"out-{name}")
        given = ["--variant", f"mine={folder}", "--quiet", *more]
        assert place.compare(*given, methods=None, out=str(outs[-1])) == 0
    one, other = (by_name(rows(out, "tokens")) for out in outs)
    for mine, theirs in zip(one, other, strict=True):
        assert mine["nll"] == (None if theirs["nll"] is None else pytest.approx(theirs["nll"], abs=1e-5))
        assert mine["kl_nats"] == (None if theirs["kl_nats"] is None else pytest.approx(theirs["kl_nats"], abs=1e-5))


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (
            ["--stream", "--max-memory", "1MiB", "--methods", "rtn:g32,awq:g32"],
            "than making 'awq:g32' takes, one layer",
        ),
        (["--stream", "--backend", "torch,ort"], "--stream runs in torch"),
        (["--stream", "--tasks", "kl,drift"], "generates one token after another, and --stream would read"),
        (["--stream", "--methods", "rtn:g32,hqq"], "hqq: other tools quantize models that are in memory"),
        (["--max-memory", "2GiB"], "--max-memory is the limit of a streamed model; add --stream"),
        (["--stream", "--max-memory", "2 apples"], "takes a size such as 2GiB or 500MB, not '2 apples'"),
        (["--stream", "--max-memory", "0GiB"], "leaves nothing"),
        (["--stream", "--max-memory", "90KiB"], "is less than one decoder layer and a few tokens take; give at least"),
    ],
)
def test_what_can_not_be_streamed_is_refused_before_any_work(place, tmp_path, capfd, flags, sentence):
    given = {} if "--methods" in flags else {"methods": "rtn:g32"}
    arguments = place.arguments(**({"methods": None} | given), out=str(tmp_path / "out"))
    from qeval.cli.app import run_program

    assert run_program(["compare", *arguments, *flags]) == 2
    assert sentence in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


def test_sizes_are_read_as_they_are_written():
    assert [size_bytes(text) for text in ("2GiB", "2G", "1.5GB", "300 MiB", "7", "12KB", None)] == [
        2 << 30, 2 << 30, 1_500_000_000, 300 << 20, 7, 12_000, None,
    ]  # fmt: skip


def test_a_call_that_was_not_expected_is_answered_all_the_same(tmp_path):
    model = tiny_family("Llama")
    whole = TorchSession(model)
    one, other = ((Request(tokens(20, seed=n), (3, 19)),) for n in (1, 2))
    with backend_of(model, tmp_path).open(None) as session:
        session.expect([Call((), one)])
        for request in (other, one, one):
            assert torch.equal(session.states(request)[0], whole.states(request)[0])
        assert session.passes == 3


def test_a_pass_takes_no_more_calls_than_memory_holds(tmp_path):
    model = tiny_family("Llama")
    requests = [(Request(tokens(64, seed=n), (63,)),) for n in range(80)]
    passes = []
    for limit in (LIMIT, 2 * LIMIT, 100 * LIMIT):
        with backend_of(model, tmp_path / f"{limit}", limit).open(None) as session:
            session.expect([Call((), request) for request in requests])
            for request in requests:
                session.states(request)
            passes.append(session.passes)
    assert passes[0] > passes[1] > passes[2] == 1


def test_a_decoder_that_computes_between_its_layers_streams(tmp_path, monkeypatch):
    original = LlamaDecoderLayer.__call__
    monkeypatch.setattr(LlamaDecoderLayer, "__call__", lambda *a, **k: original(*a, **k) * 1.5)
    model, requests = tiny_family("Llama"), (Request(tokens(20), tuple(range(20))),)
    with backend_of(model, tmp_path).open(None) as session:
        assert torch.equal(session.states(requests)[0], TorchSession(model).states(requests)[0])


def test_a_layer_that_is_given_more_than_what_the_last_one_handed_on_is_refused(tmp_path, monkeypatch):
    """As a U-net's are: the last layer sees the output of the first, which a pass of the last alone does not have."""
    original, outputs = LlamaDecoderLayer.__call__, []

    def call(layer, hidden, *args, **keywords):
        if layer.self_attn.layer_idx == 0:
            outputs.append(original(layer, hidden, *args, **keywords))
            return outputs[-1]
        return original(layer, hidden + outputs[-1] if layer.self_attn.layer_idx == 2 else hidden, *args, **keywords)

    monkeypatch.setattr(LlamaDecoderLayer, "__call__", call)
    with pytest.raises(UsageError, match="computes between its decoder layers, from more than what the last of them"):
        backend_of(tiny_family("Llama", num_hidden_layers=3), tmp_path)


def test_layers_that_run_twice_are_refused(tmp_path, monkeypatch):
    original = LlamaDecoderLayer.__call__
    monkeypatch.setattr(
        LlamaDecoderLayer,
        "__call__",
        lambda layer, hidden, *a, **k: original(layer, original(layer, hidden, *a, **k), *a, **k),
    )
    with pytest.raises(UsageError, match="runs its decoder layers in an order of its own, or some more than once"):
        backend_of(tiny_family("Llama"), tmp_path)


def test_a_weight_that_is_not_finite_is_named(tmp_path):
    model = tiny_family("Llama")
    model.model.layers[1].mlp.up_proj.weight[3, 4] = torch.nan
    with pytest.raises(UsageError, match=r"layers\.1\.mlp\.up_proj\.weight holds 1 values that are not finite"):
        backend_of(model, tmp_path)


def skeleton_of(family, folder, state):
    """The weightless model of a family over a checkpoint that holds `state`."""
    save_file({name: value.clone() for name, value in state.items()}, folder / "model.safetensors")
    entries = read_entries([folder / "model.safetensors"])
    return build_meta_model(tiny_family(family).config, torch.float32, entries, "here")


EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda state: state.pop("lm_head.weight"), "'here' lacks tensors that its model needs: lm_head.weight"),
        (
            lambda state: state.pop(EXPERT),
            r"'here' holds 3 tensors \*mlp.experts.\*.up_proj.weight .* its model needs 4",
        ),
        (
            lambda state: state.update({EXPERT: state[EXPERT][:5]}),
            r"'here' holds model.layers.1.mlp.experts.gate_up_proj\[3\] as \[53, 64\], its model needs \[96, 64\]",
        ),
    ],
)
def test_a_checkpoint_that_is_not_whole_is_refused(tmp_path, change, sentence):
    tiny_family("Qwen3Moe").save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    change(state)
    with pytest.raises(UsageError, match=sentence):
        skeleton_of("Qwen3Moe", tmp_path, state)


def test_tensors_that_the_model_does_not_use_are_named_and_the_decoders_own_names_are_taken(tmp_path):
    model = tiny_family("Llama", tie_word_embeddings=True)
    _, notes = skeleton_of("Llama3", tmp_path, model.model.state_dict() | {"other": torch.ones(1)})
    assert notes == ("The model does not use some tensors of the checkpoint: other.",)


def test_a_stack_that_is_made_in_another_way_is_refused(tmp_path, monkeypatch):
    tiny_family("Mixtral").save_pretrained(tmp_path)
    monkeypatch.setattr("qeval.models.checkpoint.weight_map.MergeModulelist", Transpose)
    with pytest.raises(UsageError, match=r"converted as it is loaded \(MergeModulelist, Concatenate\), which --stream"):
        skeleton_of("Mixtral", tmp_path, load_file(tmp_path / "model.safetensors"))


def test_a_file_that_became_shorter_is_named(tmp_path):
    backend = backend_of(tiny_family("Llama"), tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with backend.open(None) as session, pytest.raises(QevalError, match="became shorter"):
        session.states([Request(tokens(5), (4,))])

"""`--stream` with rounded activations, keys and values: the states, files and rows of the model in memory."""

import json

import pytest
import torch

from qeval.backends.base import Saved
from qeval.backends.stream.backend import StreamBackend, inspect, streamed, streamed_head_shapes
from qeval.backends.torch import TorchBackend, TorchSession
from qeval.compare.schemes import with_scheme
from qeval.config import parse_method
from qeval.errors import UsageError
from qeval.models.checkpoint.meta_model import build_meta_model
from qeval.models.checkpoint.weights import read_entries
from qeval.models.families import Family
from qeval.models.structure.graph import describe_model
from qeval.models.structure.head import head_of
from qeval.models.structure.kv_cache import check_cache
from qeval.models.structure.weight_views import stacks_of
from qeval.quant.scheme import scheme_of
from qeval.quantize.build import build_variant, source_of
from qeval.store.rows import concat
from qeval.store.variants import Origin, save_variant
from qeval.types import Call, Request
from tests.fixtures.bench import Bench
from tests.fixtures.families import FAMILIES, LATENT, tiny_family

LIMIT = 1 << 21
CASES = [
    *((family, "rtn:fp8-channel+a-fp8-token+kv-fp8") for family in ("Llama", "Qwen3", "Gemma3")),
    ("Qwen3", "fp16+kv-int8"),
    ("Llama", "int8-w8a8"),
    ("Llama", "fp16+kv-int4-g8-hadamard"),
    ("Llama", "rtn:int8-channel+k-int8-channel+v-fp8-token"),
    ("Llama", "rtn:mxfp4+a-mxfp8"),
    ("Llama", "rtn:nvfp4+a-nvfp4"),
    ("Gemma3", "fp16+k-fp8-tensor+v-int8-channel-hadamard"),
    ("GPTNeoX", "int8-w8a8+kv-int8"),
    ("Mixtral", "fp16+kv-int4"),
    ("Mixtral", "rtn:g32+a-int8+kv-int8"),
]


def tokens(count, seed=0):
    return tuple(torch.randint(1, 256, (count,), generator=torch.Generator().manual_seed(seed)).tolist())


SAMPLES = [tokens(40, seed=seed) for seed in range(3)]


def backend_of(model, folder, limit=LIMIT):
    model.save_pretrained(folder)
    entries = read_entries([folder / "model.safetensors"])
    weightless, _ = build_meta_model(model.config, torch.float32, entries, str(folder))
    made = streamed(weightless, entries, torch.device("cpu"), "float32")
    return StreamBackend(made, *inspect(made, "float32"), limit)


def saved(model, name, folder):
    """A recipe's variant, made of the model in memory, on disk."""
    recipe, description = parse_method(name), describe_model(model)
    source = source_of(model, description, head_of(model), SAMPLES, {})
    alone = recipe if recipe.method == "none" else recipe.weights_alone
    weights = build_variant(source, alone, "key", lambda _: None)
    variant = with_scheme(weights, recipe, model, description, SAMPLES, lambda _: None)
    save_variant(variant, folder, Origin(recipe={}, model={}, calibration=None, float_bits=32, seconds=0.0))
    return folder


def answers(session):
    """States of windows and of questions after one prefix and after another inside it, in one pass."""
    outer, inner = tokens(11), tokens(5, seed=1)
    short = (Request(tokens(9, seed=2), (0, 8)), Request(tokens(7, seed=3), (6,)))
    windows = (Request(tokens(40, seed=5), tuple(range(40))), Request(tokens(40, seed=6), (39,)))
    session.expect([Call((), windows), Call((outer,), short), Call((outer, inner), short)])
    kept = session.prefill(outer)
    nested = session.prefill(inner, kept)
    return [state for call in ((windows, None), (short, kept), (short, nested)) for state in session.states(*call)]


@pytest.mark.parametrize(("family", "name"), CASES)
def test_states_are_those_of_the_model_in_memory_bit_for_bit(family, name, tmp_path):
    model = tiny_family(family)
    target = Saved(saved(model, name, tmp_path / "variant"))
    whole = TorchBackend(model, describe_model(model), head_of(model), torch.float32)
    with whole.open(target) as session:
        session.packs &= not stacks_of(model)  # an expert multiplies all of a batch's tokens at once, fillers too
        expected = answers(session)
    backend = backend_of(model, tmp_path / "model", LIMIT * (2 if stacks_of(model) else 1))
    with backend.open(target) as session:
        found = answers(session)
        assert session.passes == 1
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    with backend.open(None) as session:
        floats = answers(session)
    assert not torch.allclose(floats[0], found[0], atol=1e-6)
    untouched = TorchSession(model)
    untouched.packs &= not stacks_of(model)
    assert all(torch.equal(one, other) for one, other in zip(floats, answers(untouched), strict=True))


def test_another_scheme_stands_in_the_place_of_a_variants_own(tmp_path):
    model = tiny_family("Llama")
    folder = saved(model, "rtn:nvfp4+a-nvfp4", tmp_path / "variant")
    whole = TorchBackend(model, describe_model(model), head_of(model), torch.float32)
    backend, seen = backend_of(model, tmp_path / "model"), []
    for names in ({}, {"keys": "q8_0", "values": "q4_0"}, {"activations": "int8-token"}):
        target = Saved(folder, scheme=scheme_of(names))
        with whole.open(target) as one, backend.open(target) as other:
            expected, found = answers(one), answers(other)
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
        seen.append(found[0])
    assert not torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], seen[2])


@pytest.mark.parametrize("family", ["Llama", "Gemma3", "Mixtral", "GPTNeoX"])
def test_shapes_of_keys_and_values_are_those_of_the_model_in_memory(family, tmp_path):
    model = tiny_family(family)
    backend = backend_of(model, tmp_path, 2 * LIMIT)
    assert streamed_head_shapes(backend.stream) == check_cache(model)


def test_attention_whose_keys_can_not_be_rounded_is_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(FAMILIES, "DeepseekV3", Family("DeepseekV3", "", LATENT))
    model = tiny_family("DeepseekV3")
    backend = backend_of(model, tmp_path, 2 * LIMIT)
    with pytest.raises(UsageError, match="DeepseekV3ForCausalLM caches latents in the place of keys and values"):
        streamed_head_shapes(backend.stream)


def test_the_copies_that_rounding_makes_count(tmp_path):
    backend = backend_of(tiny_family("Llama"), tmp_path)
    backend.reserve(64)
    plain, batch = backend.budget.token_activations, backend.budget.batch_tokens
    backend.reserve(64, [parse_method("fp16+kv-int8").scheme])
    keys = backend.budget.token_activations
    backend.reserve(64, [parse_method("fp16+kv-int8").scheme, parse_method("int8-w8a8+kv-int8").scheme])
    assert plain < keys < backend.budget.token_activations
    assert backend.budget.batch_tokens < batch
    backend.reserve(64)
    assert backend.budget.token_activations == plain


METHODS = "rtn:g32+kv-int4,int8-w8a8,awq:int8-channel+a-int8-static+v-fp8-tensor,fp16+a-nvfp4"
FLAGS = {"calibration_samples": "3", "calibration_length": "24"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return Bench(tmp_path_factory.mktemp("bench"))


@pytest.fixture(scope="module")
def runs(place, tmp_path_factory):
    """The folders and caches of an unstreamed and a streamed run of the same recipes and their parts."""
    found = {}
    for name, more in (("whole", []), ("streamed", ["--stream", "--max-memory", "24MiB"])):
        home, out = (tmp_path_factory.mktemp(f"{name}-{kind}") for kind in ("home", "out"))
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("QEVAL_HOME", str(home))
            assert place.compare("--quiet", "--split", *more, methods=METHODS, out=str(out / "run"), **FLAGS) == 0
        found[name] = (out / "run", home)
    return found


def manifests(home):
    """The manifests of a cache, by key, without the seconds that making took."""
    found = [json.loads(path.read_text()) for path in home.rglob("manifest.json")]
    return {each["key"]: {k: v for k, v in each.items() if k not in ("seconds", "sha256")} for each in found}


def test_variants_are_the_same_files(runs):
    one, other = (manifests(runs[name][1]) for name in ("whole", "streamed"))
    assert one == other
    assert sum(bool(each.get("ranges")) for each in one.values()) >= 3


@pytest.mark.parametrize("kind", ["tokens", "items"])
def test_rows_are_those_of_the_unstreamed_run(runs, kind):
    def rows(name):
        found = concat(kind, sorted((runs[name][0] / "rows" / kind).glob("*.parquet"))).to_pylist()
        return sorted(
            found, key=lambda row: (row["variant"], *(row.get(k) or 0 for k in ("window", "position", "item")))
        )

    found, expected = rows("streamed"), rows("whole")
    assert len(found) == len(expected) > 0
    assert len({row["variant"] for row in found}) > len(METHODS.split(","))
    for row, other in zip(found, expected, strict=True):
        assert row == {
            name: value if isinstance(value, (str, int, bool, type(None))) else pytest.approx(value, abs=1e-5)
            for name, value in other.items()
        }


def test_quantize_streams_a_scheme(place, tmp_path, monkeypatch):
    monkeypatch.setenv("QEVAL_HOME", str(tmp_path / "home"))
    name = "rtn:g32+a-int8-static+kv-int8"
    written = []
    for folder, more in ((tmp_path / "one", []), (tmp_path / "other", ["--stream", "--max-memory", "24MiB"])):
        assert place.quantize(name, folder, *more) == 0
        written.append((folder / "weights.safetensors").read_bytes())
    assert written[0] == written[1]

"""What PyTorch's backend owes beside the session's contract: the model's own logits, weights put back bit for bit."""

import gc
import weakref

import pytest
import torch
from transformers import AttentionInterface

from qeval.backends import shared
from qeval.backends.base import Saved
from qeval.backends.sharing import Sharing
from qeval.backends.torch import TorchBackend, TorchSession
from qeval.config import parse_method
from qeval.errors import QevalError
from qeval.models.structure.graph import describe_model
from qeval.models.structure.head import head_of
from qeval.quant.variant import Variant
from qeval.quantize.build import build_variant, source_of
from qeval.quantize.statistics import collect
from qeval.types import Request
from tests.fixtures.families import FAMILIES, tiny_family
from tests.fixtures.tiny import tiny_llama

TOLERANCE = 1e-4


def tokens(count, seed=0, vocab=256):
    return tuple(torch.randint(1, vocab, (count,), generator=torch.Generator().manual_seed(seed)).tolist())


@pytest.fixture
def model():
    return tiny_llama()


@pytest.fixture
def backend(model):
    return TorchBackend(model, describe_model(model), head_of(model), torch.float32)


def made(model, backend, name):
    description = describe_model(model)
    samples = [tokens(64, seed=i) for i in range(4)]
    statistics = collect(model, description, samples, 0, lambda done: None)
    source = source_of(model, description, backend.head, samples, statistics)
    return build_variant(source, parse_method(name), "key", lambda done: None)


def test_states_and_head_give_the_models_own_logits(model, backend):
    ids = tokens(20)
    with backend.open(None) as session:
        states = session.states([Request(ids, tuple(range(20)))])[0]
        assert torch.allclose(session.logits(states), model(torch.tensor([ids])).logits[0], atol=TOLERANCE)


@pytest.mark.parametrize("name", ["rtn:g32", "awq:g32", "mixed-rtn:g32-6bpw", "mixed:g32-positional", "rtn:g32-head"])
def test_the_baseline_comes_back_bit_for_bit(model, backend, name):
    before = {key: value.clone() for key, value in model.state_dict().items()}
    variant = made(model, backend, name)
    with backend.open(variant) as session:
        changed = session.logits(session.states([Request(tokens(9), (8,))])[0])
    after = model.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    with backend.open(None) as session:
        assert not torch.equal(changed, session.logits(session.states([Request(tokens(9), (8,))])[0]))


def test_an_error_inside_the_block_still_restores(model, backend):
    before = model.state_dict()["model.layers.0.mlp.up_proj.weight"].clone()
    variant = made(model, backend, "rtn:g32")
    with pytest.raises(RuntimeError, match="torn"), backend.open(variant):
        raise RuntimeError("torn")
    assert torch.equal(before, model.state_dict()["model.layers.0.mlp.up_proj.weight"])


def test_a_second_variant_or_the_baseline_cannot_be_opened_inside(model, backend):
    variant = made(model, backend, "rtn:g32")
    with backend.open(variant), pytest.raises(QevalError, match="another variant"), backend.open(None):
        pass


def test_a_tied_head_can_be_quantized_without_touching_the_embedding():
    model = tiny_llama(tie_word_embeddings=True)
    backend = TorchBackend(model, describe_model(model), head_of(model), torch.float32)
    embedding = model.get_input_embeddings().weight.clone()
    variant = made(model, backend, "rtn:g32-head")
    assert "lm_head.weight" in variant.weights
    with backend.open(variant) as session:
        assert torch.equal(model.get_input_embeddings().weight, embedding)
        assert not torch.equal(session._head.weight, embedding)


LACK = RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried")


class Lacking(TorchSession):
    """Memory for so many rows a batch and no more."""

    def __init__(self, model, rows, error=LACK):
        super().__init__(model)
        self.rows, self.error, self.batches = rows, error, []

    def _forward(self, ids, cache):
        self.batches.append(len(ids))
        if len(ids) > self.rows:
            raise self.error
        return super()._forward(ids, cache)


@pytest.mark.parametrize("error", [LACK, torch.OutOfMemoryError("CUDA out of memory")])
def test_a_batch_that_memory_does_not_hold_is_run_in_parts_and_remembered(model, error):
    requests = [Request(tokens(9, seed=n), (8,)) for n in range(5)]
    expected = TorchSession(model).states(requests)
    session = Lacking(model, 1, error)
    for _ in range(2):
        for found, other in zip(session.states(requests), expected, strict=True):
            assert torch.allclose(found, other, atol=TOLERANCE)
    assert session.batches == [5, 2, 1, 1, 1, 1, 1] + [1] * 5  # the second call starts with what fits


def test_the_next_session_of_a_backend_knows_what_fits(model, monkeypatch):
    backend, batches = TorchBackend(model, describe_model(model), head_of(model), torch.float32), []
    forward = TorchSession._forward

    def lacking(self, ids, cache, **places):
        batches.append(len(ids))
        if len(ids) > 2:
            raise LACK
        return forward(self, ids, cache, **places)

    monkeypatch.setattr(TorchSession, "_forward", lacking)
    requests = [Request(tokens(9, seed=n), (8,)) for n in range(4)]
    for _ in range(2):
        with backend.open(None) as session:
            session.states(requests)
    assert batches == [4, 2, 2, 2, 2]


def test_a_sequence_that_memory_does_not_hold_is_a_clear_error(model):
    requests = [Request(tokens(9, seed=n), (8,)) for n in range(5)]
    with pytest.raises(QevalError, match=r"not enough memory for a batch of one sequence of 9 tokens.*--window"):
        Lacking(model, 0).states(requests)


def test_another_error_is_not_taken_for_a_lack_of_memory(model):
    with pytest.raises(RuntimeError, match="shapes"):
        Lacking(model, 0, RuntimeError("shapes do not fit")).states([Request(tokens(9), (8,))])


def test_batches_shrink_with_free_memory_and_a_flag_wins(backend, monkeypatch):
    sizes = []
    for free in (1 << 40, 1 << 26, 1 << 24, 0):
        monkeypatch.setattr("qeval.backends.memory.free_bytes", lambda device, free=free: free)
        sizes.append(backend.batch_tokens)
    assert sizes[0] == 2048 >= sizes[1] > sizes[2] > sizes[3] == 128


@pytest.mark.parametrize(("family", "uses"), [("Llama", True), ("Phi", True), ("Mistral", False), ("Gemma2", False)])
def test_a_prefix_is_attended_to_without_copies_where_attention_is_plainly_causal(family, uses, monkeypatch):
    calls = []
    original = shared.attend
    monkeypatch.setitem(
        AttentionInterface._global_mapping,
        shared.SHARED_ATTENTION,
        lambda *a, **k: calls.append(1) or original(*a, **k),
    )
    model = tiny_family(family)
    before = model.config._attn_implementation
    session, copying = TorchSession(model), TorchSession(model, sharing=Sharing())
    calls.clear()  # those of the proof
    requests = [Request(tokens(n, seed=n), tuple(range(n))) for n in (9, 7, 1)]
    for outer in (None, tokens(5, seed=9)):
        pair = []
        for each in (session, copying):
            kept = each.prefill(tokens(30), each.prefill(outer) if outer else None)
            pair.append(each.states(requests, kept))
        for one, other in zip(*pair, strict=True):
            assert torch.allclose(one, other, atol=1e-5)
    assert len(calls) == (4 if uses else 0)  # two layers, two batches
    assert model.config._attn_implementation == before


@pytest.mark.parametrize("family", FAMILIES)
def test_sequences_packed_into_one_row_give_what_each_gives_alone(family):
    session = TorchSession(tiny_family(family))
    requests = [Request(tokens(n, seed=n), tuple(range(n))) for n in (2, 9, 1, 7, 9)]
    for kept in (None, session.prefill(tokens(20, seed=50)), session.prefill(tokens(3), session.prefill(tokens(8)))):
        together = session.states(requests, kept)
        for request, found in zip(requests, together, strict=True):
            assert torch.allclose(found, session.states([request], kept)[0], atol=2e-5)


def test_a_packed_batch_runs_no_padding(monkeypatch):
    session = TorchSession(tiny_family("Llama"))
    shapes = []
    forward = session._forward
    monkeypatch.setattr(session, "_forward", lambda ids, *a, **k: shapes.append(ids.shape) or forward(ids, *a, **k))
    session.states([Request(tokens(n), (n - 1,)) for n in (9, 7, 1)])
    assert session.packs and shapes == [(1, 17)]


def test_a_variants_integers_are_let_go_of_once_they_are_installed(model, backend, monkeypatch, tmp_path):
    watched = []

    def load(*_):
        variant = made(model, backend, "rtn:g32")
        watched.extend(weakref.ref(weight.codes) for weight in variant.weights.values())
        return variant

    monkeypatch.setattr("qeval.backends.base.load_variant", load)
    with backend.open(Saved(tmp_path)):
        gc.collect()
        assert watched and not any(codes() is not None for codes in watched)


@pytest.mark.parametrize("tied", [True, False])
def test_an_embedding_or_head_of_its_own_leaves_the_baselines_head_alone(tied):
    """A file that quantizes the embedding: the baseline's logits are made while its weights are in the model."""
    model = tiny_llama(tie_word_embeddings=tied)
    about, own = describe_model(model), head_of(model).weight.clone()
    name = about.embedding if tied else about.head
    value = own * 1.25 + 0.1
    other = tiny_llama(tie_word_embeddings=tied)
    other.get_parameter(name).copy_(value)
    tokens = (1, 2, 3, 4)
    expected = other(input_ids=torch.tensor([tokens])).logits[0]
    backend = TorchBackend(model, about, head_of(model), torch.float32)
    with backend.open(Variant("key", {}, {name: value}, {}, ())) as session:
        states = session.states([Request(tokens, (0, 1, 2, 3))])[0]
        assert torch.allclose(session.logits(states), expected, atol=1e-5)
        assert torch.equal(backend.head.weight, own)
    assert torch.equal(model.get_parameter(name), own)
    assert torch.equal(head_of(model).weight, own)

"""Sequences that continue a prefix score as those that run whole, whatever a model keeps of what it has read.

The oracle is transformers' own forward pass over each sequence alone. Tiny models of each kind of state: their chunks,
windows and choices of sparse attention are of 8 tokens, so that prefixes end inside of them and far behind.
"""

import copy

import pytest
import torch
from transformers.cache_utils import Cache

from qeval.backends import prefix as prefixes
from qeval.backends.prefix import GrowingLayer, PrefixLayer, continued_cache, is_lent
from qeval.backends.sharing import WHOLE, Sharing
from qeval.backends.torch import TorchSession
from qeval.models.silence_transformers import quiet
from qeval.models.tiny import tiny_config, tiny_model
from qeval.types import Request

LENT, COPIED, STEPWISE, NOTHING = "lent", "copied", "stepwise", "nothing"
KINDS = {
    "mamba": STEPWISE,
    "jamba": STEPWISE,  # with attention between
    "mamba2": COPIED,
    "nemotron_h": COPIED,
    "falcon_h1": COPIED,  # both in every layer
    "zamba2": COPIED,
    "qwen3_next": COPIED,  # gated delta rule
    "kimi_linear": COPIED,  # KDA and latent attention
    "minimax": COPIED,  # lightning attention, in a cache class of its own
    "lfm2": COPIED,  # short convolutions
    "deepseek_v32": COPIED,  # an indexer's keys
    "glm_moe_dsa": COPIED,
    "deepseek_v4": COPIED,  # compressed keys
    "gemma4_text": LENT,  # head sizes by layer
    "gemma3n_text": LENT,  # keys and values shared between layers
    "llama4_text": LENT,  # chunks, and layers without positions
    "gpt_oss": LENT,  # sinks
    "bert": LENT,  # a transform before the head
    "bart": LENT,  # the decoder of an encoder-decoder
    "rwkv": NOTHING,
    "recurrent_gemma": NOTHING,  # its states lie in its modules
}
ALLOWED_NATS = 1e-4
PREFIXES, RESTS = (5, 35), (20, 1, 9)


def tokens(count, seed):
    return tuple(torch.randint(3, 240, (count,), generator=torch.Generator().manual_seed(seed)).tolist())


def model_of(kind):
    with quiet():
        return tiny_model(tiny_config(kind))


@pytest.fixture(scope="module", params=KINDS)
def session(request):
    with quiet(), torch.inference_mode():
        made = TorchSession(model_of(request.param))
        yield made


@pytest.fixture(scope="module")
def model(session):
    return session._model


def log_probs(model, ids):
    return torch.log_softmax(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].double(), -1)


def scored(session, rests, prefix=None):
    states = session.states([Request(rest, tuple(range(len(rest)))) for rest in rests], prefix)
    return [torch.log_softmax(session.logits(each).double(), -1) for each in states]


def shared_by(session):
    if not session.sharing.prefixes:
        return NOTHING
    if session.sharing.stepwise:
        return STEPWISE
    return LENT if is_lent(prefixes.prefix_cache(session._model)) else COPIED


def test_every_kind_scores_after_prefixes_as_whole_and_is_left_as_it_was(session, model, request):
    kind = request.node.callspec.params["session"]
    assert shared_by(session) == KINDS[kind]
    outer, inner = (tokens(count, seed) for seed, count in enumerate(PREFIXES))
    rests = [tokens(count, 9 + count) for count in RESTS]
    kept = session.prefill(outer)
    after_both = session.prefill(inner, kept)
    for before, given in ((outer + inner, after_both), (outer, kept), (outer + inner, after_both)):
        for rest, found in zip(rests, scored(session, rests, given), strict=True):
            expected = log_probs(model, before + rest)[len(before) :]
            assert float((found - expected).abs().max()) <= ALLOWED_NATS


def test_windows_of_unequal_length_score_as_each_alone(session, model):
    windows = [tokens(count, count) for count in (61, 17, 40)]
    for window, found in zip(windows, scored(session, windows), strict=True):
        assert float((found - log_probs(model, window)).abs().max()) <= ALLOWED_NATS


def test_greedy_continuations_are_those_of_whole_passes(session, model):
    ids = list(tokens(20, seed=3))
    for said in session.greedy([tuple(ids)], 3)[0].tolist():
        assert int(log_probs(model, ids)[-1].argmax()) == said
        ids.append(said)


@torch.inference_mode()
def test_a_copy_that_forgets_the_state_is_found_out_at_load(monkeypatch):
    monkeypatch.setattr(prefixes, "continued_layer", lambda layer, rows, **_: prefixes.copy.deepcopy(type(layer)()))
    model = model_of("mamba2")
    found = TorchSession(model).sharing
    assert found == Sharing(prefixes=False, warning=found.warning)
    assert "does not give the same states" in found.warning and "each is run whole" in found.warning
    whole = TorchSession(model, sharing=WHOLE)
    before, rest = tokens(9, 1), tokens(4, 2)
    (found_rest,) = scored(whole, [rest], whole.prefill(before))
    assert float((found_rest - log_probs(model, before + rest)[9:]).abs().max()) <= ALLOWED_NATS


def test_a_continuation_changes_a_copy_and_never_the_prefix():
    model = model_of("qwen3_next")
    with quiet(), torch.inference_mode():
        cache = TorchSession(model).prefill(tokens(12, 1)).cache
        before = copy.deepcopy(cache.layers[0].recurrent_states[0])
        copies = continued_cache(cache, 3)
        assert copies.layers[0].recurrent_states[0].shape[0] == 3
        copies.layers[0].recurrent_states[0].add_(1.0)
    assert torch.equal(cache.layers[0].recurrent_states[0], before)
    assert not is_lent(cache)


def test_a_growing_layer_returns_all_that_came_and_leaves_its_prefix():
    drawn = torch.randn(2, 4, 2, 6, 8, generator=torch.Generator().manual_seed(0))
    keys, values = drawn[0, :1], drawn[1, :1]
    layer = PrefixLayer()
    layer.update(keys, values)
    growing = continued_cache(Cache(layers=[layer]), 3, grows=True).layers[0]
    assert isinstance(growing, GrowingLayer)
    new_keys, new_values = drawn[0, 1:, :, :2], drawn[1, 1:, :, :2]
    for step in range(2):
        found = growing.update(new_keys[:, :, step : step + 1], new_values[:, :, step : step + 1])
    assert torch.equal(found[0], torch.cat([keys.expand(3, -1, -1, -1), new_keys], dim=2))
    assert torch.equal(found[1], torch.cat([values.expand(3, -1, -1, -1), new_values], dim=2))
    assert growing.get_seq_length() == 8 and layer.get_seq_length() == 6
    assert torch.equal(layer.keys, keys)

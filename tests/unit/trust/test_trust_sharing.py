"""No other score because prefixes are shared or rows packed: proven at load, and not done where states differ."""

import pytest
import torch
import transformers
from transformers import CONFIG_MAPPING

from qeval.backends import sharing
from qeval.backends.sharing import WHOLE, Sharing
from qeval.backends.torch import TorchBackend, TorchSession
from qeval.errors import UsageError
from qeval.models.families import SIZES, tiny_family
from qeval.models.structure.graph import describe_model
from qeval.models.structure.head import head_of
from qeval.types import Request
from tests.fixtures.bench import Bench
from tests.fixtures.gguf_families import of_config
from tests.fixtures.tiny import byte_tokenizer, tiny_llama

PREFIX, RESTS = tuple(range(5, 35)), [tuple(range(40, 49)), (7,), tuple(range(60, 65))]


def doge():
    """Its attention adds to the mask."""
    return of_config(CONFIG_MAPPING["doge"](**{**SIZES, "head_dim": 16, "max_position_embeddings": 512}))


def falcon(**settings):
    """Its attention is not transformers' interface where it has ALiBi."""
    return of_config(transformers.FalconConfig(**{**SIZES, **settings}))


def without_cache():
    """The first GPT takes no keys and values."""
    return of_config(
        transformers.OpenAIGPTConfig(vocab_size=256, n_positions=256, n_embd=64, n_layer=2, n_head=4, attn_pdrop=0.0)
    )


MODELS = {
    "doge": doge,
    "falcon": lambda: falcon(multi_query=True, parallel_attn=True, alibi=False),
    "falcon-rw": lambda: falcon(multi_query=False, parallel_attn=False, alibi=True, bias=True),
    "openai-gpt": without_cache,
    "llama": lambda: tiny_family("Llama"),
    "gemma2": lambda: tiny_family("Gemma2"),
}


@pytest.mark.parametrize("name", MODELS)
def test_states_after_a_shared_prefix_are_those_of_full_passes(name):
    model = MODELS[name]()
    session = TorchSession(model)
    requests = [Request(rest, tuple(range(len(rest)))) for rest in RESTS]
    found = session.states(requests, session.prefill(PREFIX))
    with torch.inference_mode():
        for rest, states in zip(RESTS, found, strict=True):
            ids = torch.tensor([[*PREFIX, *rest]])
            expected = model(input_ids=ids).logits[0, len(PREFIX) :]
            assert float((session.logits(states) - expected).abs().max()) < 1e-4 * float(expected.abs().max())


@pytest.mark.parametrize("name", MODELS)
def test_greedy_continuations_are_those_of_full_passes(name):
    model = MODELS[name]()
    found = TorchSession(model).greedy([PREFIX, PREFIX[::-1]], 4)
    with torch.inference_mode():
        for prompt, said in zip((PREFIX, PREFIX[::-1]), found.tolist(), strict=True):
            ids = list(prompt)
            for token in said:
                assert int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()) == token
                ids.append(token)


@pytest.mark.parametrize(("name", "shares"), [("llama", True), ("doge", False), ("falcon-rw", False)])
def test_what_is_proven_is_said_where_less_is_shared(name, shares):
    found = TorchSession(MODELS[name]()).sharing
    assert (found.apart, found.packs) == (shares, shares)
    assert (found.warning is None) == shares
    assert shares or "does not give the same states when sequences share a prefix or a row" in found.warning


def test_a_model_without_a_cache_is_run_whole():
    found = TorchSession(without_cache()).sharing
    assert found == Sharing(prefixes=False, warning=found.warning)
    assert "each is run whole" in found.warning


def test_a_model_is_tried_once(monkeypatch):
    model = tiny_llama()
    TorchSession(model)
    monkeypatch.setattr(sharing, "_prove", lambda *_: pytest.fail("tried twice"))
    TorchSession(model)
    head = head_of(model)
    assert TorchBackend(model, describe_model(model), head, torch.float32).sharing.apart


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_is_no_difference(dtype):
    found = TorchSession(tiny_llama().to(dtype)).sharing
    assert found.prefixes and found.warning is None


def test_states_that_sharing_changes_a_little_are_seen(monkeypatch):
    model = tiny_llama()
    states = TorchSession.states

    def off(self, requests, prefix=None):
        found = states(self, requests, prefix)
        return [each * (1.001 if self.sharing != WHOLE else 1.0) for each in found]

    monkeypatch.setattr(TorchSession, "states", off)
    found = TorchSession(model).sharing
    assert not found.prefixes
    assert "its states are 0.1 % off" in found.warning


def test_a_model_that_sees_what_stands_behind_is_refused():
    config = transformers.BertGenerationConfig(**{**SIZES, "is_decoder": False})
    with pytest.raises(UsageError, match="BertGenerationDecoder is not causal"):
        TorchSession(of_config(config))


def test_a_run_says_that_it_shares_less(tmp_path, monkeypatch):
    monkeypatch.setenv("QEVAL_HOME", str(tmp_path / "home"))
    bench = Bench(tmp_path)
    doge().save_pretrained(tmp_path / "doge")
    byte_tokenizer().save_pretrained(tmp_path / "doge")
    found = []
    for out, more in (("whole", ()), ("streamed", ("--stream",))):
        flags = {"methods": "rtn:g32", "model": str(tmp_path / "doge"), "out": str(tmp_path / out)}
        assert bench.compare("--quiet", "--tasks", "mmlu", *more, **flags) == 0
        report = bench.report(tmp_path / out)
        assert any("DogeForCausalLM does not give the same states" in str(note) for note in report["warnings"])
        found.append(report["baseline"]["metrics"]["mmlu_acc"]["value"])
    assert found[0] == found[1]

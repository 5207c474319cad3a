"""Long sequences in parts: the states of the whole, without anything as large as window x window."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaForCausalLM, MistralConfig, MistralForCausalLM

from qeval.backends import parts
from qeval.backends.torch import TorchSession
from qeval.types import Request
from tests.fixtures.tiny import tiny_llama

WINDOW, CONTEXT = 700, 2048


def sliding():
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=256, hidden_size=64, intermediate_size=112, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=CONTEXT, sliding_window=48,
    )  # fmt: skip
    return MistralForCausalLM(config).eval().requires_grad_(False)


MODELS = {
    "sliding": sliding,
    "eager": lambda: tiny_llama(max_position_embeddings=CONTEXT, attn_implementation="eager"),
    "plain": lambda: tiny_llama(max_position_embeddings=CONTEXT),
}


class Largest(TorchDispatchMode):
    """Keeps the numbers of the largest tensor that an operator made."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            made = out if isinstance(out, tuple) else (out,)
            self.numbers = max([self.numbers, *(each.numel() for each in made if isinstance(each, torch.Tensor))])
        return out


def tokens(length):
    return tuple(torch.randint(256, (length,), generator=torch.Generator().manual_seed(length)).tolist())


def states(session, prefix=0):
    """The states of every third position of a window, the first tokens of it as a prefix."""
    ids = tokens(WINDOW)
    request = Request(ids[prefix:], tuple(range(0, WINDOW - prefix, 3)))
    with Largest() as seen:
        (found,) = session.states([request], session.prefill(ids[:prefix]) if prefix else None)
    return found, seen.numbers


@pytest.mark.parametrize("prefix", [0, 300])
@pytest.mark.parametrize("kind", ["sliding", "eager"])
def test_the_states_in_parts_are_those_of_the_whole(kind, prefix, monkeypatch):
    model = MODELS[kind]()
    session = TorchSession(model)
    whole, held = states(session, prefix)
    heads = 4 if kind == "eager" else 1
    assert held >= (WINDOW - prefix) * WINDOW * heads
    monkeypatch.setattr(parts, "_BYTES", 1)
    in_parts, held = states(session, prefix)
    torch.testing.assert_close(in_parts, whole, rtol=1e-4, atol=1e-5)
    assert held <= parts._LEAST_PART * (WINDOW + 1) * heads


def test_plain_attention_makes_no_mask_and_stays_whole(monkeypatch):
    session = TorchSession(MODELS["plain"]())
    whole, held = states(session)
    assert held < WINDOW * WINDOW
    monkeypatch.setattr(parts, "_BYTES", 1)
    again, same = states(session)
    assert torch.equal(again, whole)
    assert held == same


def test_parts_fill_what_pairs_may_take():
    model: LlamaForCausalLM = MODELS["eager"]()
    cpu = torch.device("cpu")
    assert parts.part_tokens(model, 1024, cpu, continues=False) is None
    assert parts.part_tokens(model, 32_768, cpu, continues=False) == (1 << 29) // (72 * 32_768)
    assert parts.part_tokens(model, 32_768, torch.device("cuda"), continues=False) == (1 << 31) // (72 * 32_768)
    assert parts.part_tokens(MODELS["plain"](), 32_768, cpu, continues=False) is None
    assert parts.part_tokens(MODELS["plain"](), 32_768, cpu, continues=True) == (1 << 29) // (8 * 32_768)

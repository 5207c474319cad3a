"""Half precision: products in bf16, sums in fp32, logits never rounded; in every family."""

import copy

import pytest
import torch

from qeval.backends.torch import TorchSession
from qeval.metrics.tokens import mean_kl
from qeval.models.structure.head import head_of
from qeval.models.structure.precision import (
    keep_sums_in_fp32,
    sums_in_fp32_where_possible,
    wide_product,
    with_rounding,
    with_tf32,
)
from qeval.models.structure.weight_views import is_expert, weights_of
from qeval.quant.grid import parse
from qeval.quant.rtn import quantize_rtn
from qeval.types import Request
from tests.fixtures.families import FAMILIES, tiny_family
from tests.fixtures.tiny import tiny_llama

IDS = torch.randint(256, (3, 48), generator=torch.Generator().manual_seed(0)).tolist()
REQUESTS = [Request(tuple(ids), tuple(range(48))) for ids in IDS]


def states_of(model):
    session = TorchSession(model, head_of(model))
    with torch.inference_mode():
        return session, torch.cat(session.states(REQUESTS))


def is_mixture(model):
    return any(map(is_expert, weights_of(model)))


@pytest.mark.parametrize("family", FAMILIES)
def test_sums_in_fp32_come_nearer_to_fp32_than_bf16_throughout(family):
    exact = tiny_family(family).eval()
    half = copy.deepcopy(exact).to(torch.bfloat16)
    exact.load_state_dict(half.state_dict())  # the same weights, so that arithmetic alone differs
    reference, exact_states = states_of(exact)
    plain, plain_states = states_of(half)
    undo = keep_sums_in_fp32(half, half.device)
    wide, wide_states = states_of(half)
    before = mean_kl(reference.logits, exact_states, plain.logits, plain_states)
    after = mean_kl(reference.logits, exact_states, wide.logits, wide_states)
    # Rounding may move a token to another expert, in either arithmetic.
    assert 0 < after < (2 * before if is_mixture(exact) else before)
    undo()
    assert torch.equal(states_of(half)[1], plain_states)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_shared_prefix_changes_nothing_in_bf16(family):
    half = tiny_family(family).eval().to(torch.bfloat16)
    keep_sums_in_fp32(half, half.device)
    session = TorchSession(half, head_of(half))
    ids = IDS[0]
    with torch.inference_mode():
        whole = session.states([Request(tuple(ids), tuple(range(40, 48)))])[0]
        prefix = session.prefill(ids[:40])
        part = session.states([Request(tuple(ids[40:]), tuple(range(8)))], prefix)[0]
    assert abs(mean_kl(session.logits, whole, session.logits, part)) < 1e-3


def test_a_model_that_takes_no_fp32_computes_in_its_own_type_and_says_so(monkeypatch):
    model = tiny_llama().to(torch.bfloat16)
    plain = states_of(model)[1]
    forward = type(model.model.norm).forward

    def picky(self, hidden):
        if hidden.dtype != torch.bfloat16:
            raise RuntimeError("expected BFloat16, got Float")
        return forward(self, hidden)

    monkeypatch.setattr(type(model.model.norm), "forward", picky)
    (note,) = sums_in_fp32_where_possible(model)
    assert "expected BFloat16, got Float" in note and "--compute fp32" in note
    assert torch.equal(states_of(model)[1], plain)


def test_nothing_is_done_to_fp32():
    model = tiny_llama()
    forward = model.forward
    keep_sums_in_fp32(model, model.device)
    assert model.forward == forward


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_of_half_precision_weights_are_those_of_fp32(dtype):
    generator = torch.Generator().manual_seed(1)
    states, weight = (torch.randn(n, 64, generator=generator) for n in (7, 1000))
    weight = weight.to(dtype)
    exact = states.double() @ weight.double().T
    assert torch.allclose(wide_product(states, weight).double(), exact, rtol=1e-5, atol=1e-5)
    assert wide_product(states, weight).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_floors_rounding_is_of_the_size_of_a_variants(dtype):
    weight = torch.randn(200, 300, generator=torch.Generator().manual_seed(0)).to(dtype).float()
    values = quantize_rtn(weight, parse("int8-g32")).dequantize()
    lost = (values.to(dtype).float() - values).square().mean()
    noise = (with_rounding(weight, dtype) - weight).square().mean()
    assert float(noise) == pytest.approx(float(lost), rel=0.15)


def test_tf32_is_lent_and_taken_back():
    before = torch.backends.cuda.matmul.allow_tf32
    with pytest.raises(KeyboardInterrupt), with_tf32():
        assert torch.backends.cuda.matmul.allow_tf32
        raise KeyboardInterrupt
    assert torch.backends.cuda.matmul.allow_tf32 == before

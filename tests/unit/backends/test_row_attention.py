"""Attention of a row of sequences after a prefix, as a GPU runs it: the states of full forward passes."""

import pytest
import torch
import transformers
from torch.nn.attention.flex_attention import flex_attention

from qeval.backends import row_attention
from qeval.backends.row_attention import RowLayout, attend_row
from qeval.backends.sharing import Sharing
from qeval.backends.torch import TorchSession
from qeval.models.families import SIZES, tiny_family
from qeval.types import Request
from tests.fixtures.dense_kernel import dense, rows_by_dense_kernel, visible
from tests.fixtures.gguf_families import of_config

CPU = torch.device("cpu")
LENGTHS = [(5, 9, 1), (150, 33, 200, 17), (128, 128), (1,)]


def slow_mask(lengths, prefix, window):
    """Token by token."""
    rows = []
    for start, length in zip(torch.tensor([0, *lengths]).cumsum(0).tolist(), lengths, strict=False):
        for place in range(length):
            row = torch.zeros(prefix + sum(lengths), dtype=torch.bool)
            seen = [*range(prefix), *range(prefix + start, prefix + start + place + 1)]
            row[seen if window is None else seen[-window:]] = True
            rows.append(row)
    return torch.stack(rows)


@pytest.mark.parametrize("window", [None, 1, 20, 130, 400])
@pytest.mark.parametrize("prefix", [0, 7, 128, 300])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_a_query_sees_its_own_sequence_and_the_prefix_within_the_window(lengths, prefix, window):
    mask = RowLayout(lengths, CPU).mask(prefix, window)
    assert torch.equal(visible(mask), slow_mask(lengths, prefix, window))


def test_blocks_that_are_empty_are_skipped():
    mask = RowLayout([4096] * 4, CPU).mask(512, None)
    blocks = int((mask.kv_num_blocks + mask.full_kv_num_blocks).sum())
    of_prefix, of_rows = 128 * 4, 4 * (32 * 33 // 2)
    assert blocks == of_prefix + of_rows


def test_a_mask_is_made_once_for_all_layers():
    row = RowLayout([3, 4], CPU)
    assert row.mask(5, None) is row.mask(5, None)
    assert row.mask(5, 2) is not row.mask(5, None)


def gemma2():
    return tiny_family("Gemma2")


def mistral():
    return of_config(transformers.MistralConfig(**SIZES, sliding_window=8))


def qwen2():
    config = transformers.Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=8, max_window_layers=1)
    return of_config(config)


MODELS = {"llama": lambda: tiny_family("Llama"), "gemma2": gemma2, "gemma3": lambda: tiny_family("Gemma3"),
          "mistral": mistral, "qwen2": qwen2, "phi3": lambda: tiny_family("Phi3")}  # fmt: skip
PREFIX, RESTS = tuple(range(5, 35)), [tuple(range(40, 49)), (7,), tuple(range(60, 85))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_states_of_a_row_are_those_of_full_passes(name, dtype):
    model = MODELS[name]().to(dtype)
    whole = TorchSession(model, sharing=Sharing(prefixes=False))
    requests = [Request((*PREFIX, *rest), tuple(range(len(PREFIX), len(PREFIX) + len(rest)))) for rest in RESTS]
    expected = whole.states(requests)
    with rows_by_dense_kernel():
        session = TorchSession(model)
        assert session.sharing == Sharing(apart=True, packs=True)
        found = session.states([Request(rest, tuple(range(len(rest)))) for rest in RESTS], session.prefill(PREFIX))
    for mine, theirs in zip(found, expected, strict=True):
        off = torch.linalg.vector_norm(mine - theirs, dim=-1) / torch.linalg.vector_norm(theirs, dim=-1)
        assert float(off.max() if dtype == torch.float32 else off.median()) < (1e-5 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("name", MODELS)
def test_sequences_of_one_length_after_a_prefix_of_a_prefix(name):
    model = MODELS[name]()
    whole = TorchSession(model, sharing=Sharing(prefixes=False))
    rests = [tuple(range(40, 49)), tuple(range(60, 69))]
    expected = whole.states([Request((*PREFIX, *rest), (len(PREFIX) + 8,)) for rest in rests])
    with rows_by_dense_kernel():
        session = TorchSession(model)
        prefix = session.prefill(PREFIX[20:], session.prefill(PREFIX[:20]))
        found = session.states([Request(rest, (8,)) for rest in rests], prefix)
    assert torch.allclose(torch.cat(found), torch.cat(expected), atol=1e-4)


def test_a_window_that_a_layer_does_not_hand_on_is_not_shared():
    model = tiny_family("Gemma3")
    for layer in model.model.layers:
        layer.self_attn.sliding_window = None  # its mask still has it
    with rows_by_dense_kernel():
        found = TorchSession(model).sharing
    assert not found.apart and not found.packs
    assert "does not give the same states when sequences share a prefix or a row" in found.warning


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("soft_cap", [None, 5.0])
@pytest.mark.parametrize("window", [None, 20])
def test_the_dense_kernel_is_flex_attention(window, soft_cap):
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, heads, 60, 16, generator=generator) for heads in (4, 2, 2))
    prefix = tuple(torch.randn(1, 2, 30, 16, generator=generator) for _ in range(2))

    def attend(kernel):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(row_attention, "_kernel", lambda: kernel)
            row = RowLayout([25, 1, 34], CPU)
            return attend_row(query, key, value, row, prefix, scale=0.3, window=window, soft_cap=soft_cap)

    assert torch.allclose(attend(dense), attend(flex_attention), atol=1e-6)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own, while it compiles
def test_one_compiled_kernel_serves_rows_of_any_lengths_after_any_prefix():
    generator = torch.Generator().manual_seed(0)
    counted = torch._dynamo.utils.counters["stats"]
    graphs = []
    for lengths, length in [((150, 33, 200), 300), ((40, 41, 310, 7), 129), ((129,), 140)]:
        query, key, value = (torch.randn(1, heads, sum(lengths), 16, generator=generator) for heads in (4, 2, 2))
        prefix = tuple(torch.randn(1, 2, length, 16, generator=generator) for _ in range(2))
        options = {"scale": 0.3, "window": 50, "soft_cap": 5.0}
        found = attend_row(query, key, value, RowLayout(lengths, CPU), prefix, **options)
        with rows_by_dense_kernel():
            expected = attend_row(query, key, value, RowLayout(lengths, CPU), prefix, **options)
        assert torch.allclose(found, expected, atol=1e-5)
        graphs.append(counted["unique_graphs"])
    assert len(set(graphs)) == 1

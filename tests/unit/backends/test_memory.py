"""Memory that lacks: prefixes, logits, installing and making go on in smaller pieces, and what fitted is remembered."""

from types import SimpleNamespace

import pytest
import torch

from qeval.backends import install as install_module
from qeval.backends.install import installed
from qeval.backends.memory import FittingBatches, with_room_made
from qeval.backends.torch import TorchBackend, TorchSession
from qeval.compare.variants import Workshop
from qeval.config import Recipe
from qeval.errors import QevalError
from qeval.models.structure.graph import describe_model
from qeval.models.structure.head import head_of
from qeval.progress import Silent
from qeval.quant.grid import parse
from qeval.quant.qweight import QWeight
from qeval.quant.rtn import quantize_rtn
from qeval.quant.variant import Variant
from qeval.score.choices import score_pairs
from qeval.score.corpus import baseline_columns, shards_of, variant_columns, window_states
from qeval.tasks.windows import Window
from qeval.types import Request
from tests.fixtures.families import tiny_family

TOLERANCE = 1e-5


def lack():
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")


def tokens(count, seed=0):
    return tuple(torch.randint(1, 256, (count,), generator=torch.Generator().manual_seed(seed)).tolist())


@pytest.fixture(scope="module")
def model():
    return tiny_family("Llama")


class Tight(TorchSession):
    """Memory for so many tokens a forward pass and so many rows of logits, and no more."""

    def __init__(self, model, most_tokens=10**6, most_rows=10**6, batches=None):
        super().__init__(model, batches=batches)
        self.most, self.most_rows, self.runs, self.blocks = most_tokens, most_rows, [], []

    def _forward(self, ids, cache, **places):
        self.runs.append(ids.numel())
        if ids.numel() > self.most:
            raise lack()
        return super()._forward(ids, cache, **places)

    def logits(self, states):
        self.blocks.append(len(states))
        if len(states) > self.most_rows:
            raise lack()
        return super().logits(states)


def test_a_prefix_that_memory_does_not_hold_at_once_is_run_in_parts(model):
    request, whole = [Request(tokens(6, seed=1), (0, 5))], TorchSession(model)
    expected = whole.states(request, whole.prefill(tokens(5, seed=3), whole.prefill(tokens(40))))
    batches = FittingBatches()
    session = Tight(model, 11, batches=batches)
    outer = session.prefill(tokens(40))
    assert session.runs == [40, 20, 10, 10, 10, 10]
    assert outer.tokens == tokens(40)
    found = session.states(request, session.prefill(tokens(5, seed=3), outer))
    assert torch.allclose(found[0], expected[0], atol=TOLERANCE)
    again = Tight(model, 11, batches=batches)
    again.prefill(tokens(40))
    assert again.runs == [10] * 4  # the next session begins with what fitted


def test_a_prefix_whose_every_token_lacks_memory_is_a_clear_error(model):
    with pytest.raises(QevalError, match="not enough memory for one more token of a prefix"):
        Tight(model, 0).prefill(tokens(9))


def test_logits_that_memory_does_not_hold_are_made_of_fewer_rows(model):
    windows = [Window(tokens(40, seed=n), 0, tuple(range(40)), tuple(range(1, 40))) for n in range(2)]
    (shard,), names = shards_of(windows), {"variant": "v", "backend": "torch", "corpus": "c"}
    pairs = [(tokens(9, seed=1), tokens(3, seed=n)) for n in range(4)]
    whole, tight = TorchSession(model), Tight(model, most_rows=30)
    tight._batches.block_rows = 100
    states = window_states(whole, shard.windows, 2048, lambda _: None)

    expected = baseline_columns(whole, shard, states, names)
    found = baseline_columns(tight, shard, states, names)
    assert tight.blocks == [80, 50, 25, 25, 25, 5]
    assert all(found[name] == expected[name] for name in ("nll", "entropy_nats"))

    base = (whole.logits, states)
    expected = variant_columns(*base, whole, states * 1.01, shard, names)
    found = variant_columns(*base, tight, states * 1.01, shard, names)
    assert all(found[name] == expected[name] for name in ("nll", "kl_nats", "top1_agreement"))
    assert max(tight.blocks[2:]) == 25  # what did not fit is not tried again

    tight._batches.block_rows, whole_scores = 100, score_pairs(whole, pairs, 2048, lambda _: None)
    tight.most_rows = 5
    found = score_pairs(tight, pairs, 2048, lambda _: None)
    assert [score for score, _ in found] == pytest.approx([score for score, _ in whole_scores], abs=TOLERANCE)


def test_logits_of_a_single_row_that_memory_does_not_hold_are_an_error(model):
    (shard,) = shards_of([Window(tokens(9), 0, tuple(range(9)), ())])
    states = window_states(TorchSession(model), shard.windows, 2048, lambda _: None)
    with pytest.raises(torch.OutOfMemoryError):
        baseline_columns(Tight(model, most_rows=0), shard, states, {})


@pytest.mark.parametrize("failing", ["a copy", "a weight"])
def test_originals_go_to_the_host_where_memory_lacks_and_are_put_back(model, monkeypatch, failing):
    names = [name for name, value in model.named_parameters() if value.dim() == 2 and "proj" in name][:3]
    before = {name: value.clone() for name, value in model.named_parameters()}
    weights = {name: quantize_rtn(model.get_parameter(name).detach(), parse("int8-channel")) for name in names}
    holder, method = (install_module, "_compact") if failing == "a copy" else (QWeight, "dequantize")
    original, calls, moved = getattr(holder, method), [], []

    def lacking_once(*args):
        calls.append(args)
        if len(calls) == 2:
            raise lack()
        return original(*args)

    to_host = install_module._Originals.move_to_host
    monkeypatch.setattr(holder, method, lacking_once)
    monkeypatch.setattr(install_module._Originals, "move_to_host", lambda self: (moved.append(1), to_host(self)))
    variant = Variant("key", weights, {}, {}, ())
    with installed(model, variant, skip="lm_head.weight", keep_dtype=torch.float32):
        assert len(calls) == 4
        for name in names:
            assert torch.equal(model.get_parameter(name), original_weight(weights[name]))
    assert moved == [1]
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())


def original_weight(weight):
    """The weight's values, by a path that the test does not patch."""
    return QWeight(weight.grid, weight.codes, weight.scales, weight.zeros, weight.global_scale).dequantize()


def test_a_backend_that_lacked_memory_for_logits_begins_the_next_session_with_what_fitted(model):
    backend = TorchBackend(model, describe_model(model), head_of(model), torch.float32)
    with backend.open(None) as session:
        rows = session.block_rows
        assert session.halve_blocks()
    with backend.open(None) as session:
        assert session.block_rows == rows // 2
        session._batches.block_rows = 1
        assert not session.halve_blocks()
        assert session.block_rows == 1


class Shelf(Workshop):
    """Makes nothing: there is room for its folder once the statistics of other recipes are gone."""

    def __init__(self, folder, lacks):
        self.place, self.lacks, self.tries, self.closed = folder, lacks, 0, 0
        self._progress, self._device = Silent(), torch.device("cpu")

    def folder(self, recipe):
        self.tries += 1
        if self.tries <= self.lacks:
            raise lack()
        return self.place

    def close(self):
        self.closed += 1


@pytest.mark.parametrize(("lacks", "tries", "fails"), [(0, 1, False), (1, 2, False), (2, 2, True)])
def test_a_variant_that_memory_lacked_for_is_made_once_more_without_what_others_left(
    tmp_path, monkeypatch, lacks, tries, fails
):
    monkeypatch.setattr("qeval.compare.variants.read_manifest", lambda _: SimpleNamespace(expert_tokens={}))
    shelf = Shelf(tmp_path, lacks)
    entry = shelf.entry(Recipe("rtn", "rtn"))
    assert (shelf.tries, shelf.closed) == (tries, min(lacks, 1))
    assert (entry.folder is None) is fails
    assert bool(entry.error) is fails


def test_another_error_is_not_tried_again():
    made = []
    with pytest.raises(RuntimeError, match="shapes"):
        with_room_made(lambda: torch.ones(2) @ torch.ones(3) if made else _raise("shapes"), lambda: made.append(1))
    assert made == []


def _raise(text):
    raise RuntimeError(text)

"""Token rows against the slow definition, computed from a model's logits with NumPy and SciPy."""

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, rel_entr

from qeval.backends.torch import TorchBackend
from qeval.config import parse_method
from qeval.metrics.tokens import distance, mean_kl
from qeval.models.structure.graph import describe_model
from qeval.models.structure.head import head_of
from qeval.quantize.build import build_variant, source_of
from qeval.score.corpus import Shard, baseline_columns, shards_of, variant_columns, window_states
from qeval.store.rows import RowStore, concat
from qeval.store.states import StateStore
from qeval.tasks.windows import make_windows
from tests.fixtures.tiny import tiny_llama

NAMES = {"variant": "v", "backend": "torch", "corpus": "text"}
IDS = torch.randint(1, 256, (150,), generator=torch.Generator().manual_seed(1)).tolist()


@pytest.fixture(scope="module")
def pair():
    model = tiny_llama()
    backend = TorchBackend(model, describe_model(model), head_of(model), torch.float32)
    variant = build_variant(
        source_of(model, describe_model(model), backend.head, (), {}), parse_method("rtn:g32"), "k", lambda n: None
    )
    return model, backend, variant


def nobody(done):
    del done


def rows_of(pair, windows, tmp_path, batch_tokens=64):
    _, backend, variant = pair
    store = RowStore(tmp_path)
    paths = []
    for number, shard in enumerate(shards_of(windows)):
        with backend.open(None) as base:
            base_states = window_states(base, shard.windows, batch_tokens, nobody)
        with backend.open(variant) as session:
            states = window_states(session, shard.windows, batch_tokens, nobody)
            columns = variant_columns(base.logits, base_states, session, states, shard, NAMES)
        paths.append(store.write("tokens", f"k{number}", columns))
    return concat("tokens", paths).to_pylist()


def logits_of(pair, tokens, quantized):
    model, backend, variant = pair
    with backend.open(variant if quantized else None), torch.inference_mode():
        return model(torch.tensor([tokens])).logits[0].double().numpy()


@pytest.mark.parametrize(("window", "stride"), [(32, 32), (32, 16), (40, 7)])
def test_rows_equal_the_slow_definition(pair, tmp_path, window, stride):
    windows = make_windows(IDS, window, stride).windows
    rows = rows_of(pair, windows, tmp_path)
    by_place = {(row["window"], row["position"]): row for row in rows}
    assert (
        len(by_place)
        == len(rows)
        == len({(n, p) for n, w in enumerate(windows) for p in {*w.kl_positions, *w.nll_positions}})
    )
    for number, w in enumerate(windows):
        log_p = log_softmax(logits_of(pair, w.tokens, quantized=False), axis=-1)
        log_q = log_softmax(logits_of(pair, w.tokens, quantized=True), axis=-1)
        for p in w.kl_positions:
            row = by_place[number, p]
            assert row["token"] == w.tokens[p]
            assert row["kl_nats"] == pytest.approx(rel_entr(np.exp(log_p[p]), np.exp(log_q[p])).sum(), abs=1e-6)
            assert row["reverse_kl_nats"] == pytest.approx(rel_entr(np.exp(log_q[p]), np.exp(log_p[p])).sum(), abs=1e-6)
            assert row["kl_abs_modelopt"] == pytest.approx(
                (np.exp(log_p[p]) * abs(log_p[p] - log_q[p])).sum(), abs=1e-6
            )
            assert row["top1_agreement"] == (log_p[p].argmax() == log_q[p].argmax())
            assert row["entropy_nats"] == pytest.approx(-(np.exp(log_q[p]) * log_q[p]).sum(), abs=1e-5)
        for p in w.nll_positions:
            row, token = by_place[number, p], w.tokens[p]
            assert row["nll"] == pytest.approx(-log_q[p - 1, token], abs=1e-5)
            assert row["delta_p"] == pytest.approx(np.exp(log_q[p - 1, token]) - np.exp(log_p[p - 1, token]), abs=1e-6)
        if 0 in w.kl_positions:
            assert by_place[number, 0]["nll"] is None


def test_rows_do_not_depend_on_the_batch(pair, tmp_path):
    windows = make_windows(IDS, 24, 24).windows
    one = rows_of(pair, windows, tmp_path / "a", batch_tokens=1)
    many = rows_of(pair, windows, tmp_path / "b", batch_tokens=4096)
    for a, b in zip(one, many, strict=True):
        assert a["kl_nats"] == pytest.approx(b["kl_nats"], abs=1e-4)


def test_the_models_own_loss_is_the_rows_mean(pair):
    """transformers' own cross-entropy over a window is the mean of its rows' NLL."""
    model, backend, _ = pair
    (window,) = make_windows(IDS[:40], 40, 40).windows
    with backend.open(None) as session:
        states = window_states(session, [window], 64, nobody)
        columns = baseline_columns(session, Shard(0, (window,)), states, NAMES)
    nll = [value for value in columns["nll"].to_pylist() if value is not None]
    ids = torch.tensor([window.tokens])
    assert len(nll) == 39
    assert np.mean(nll) == pytest.approx(float(model(ids, labels=ids).loss), abs=1e-5)


def test_kl_of_a_model_from_itself_is_zero(pair):
    _, backend, _ = pair
    states = torch.randn(50, 64, generator=torch.Generator().manual_seed(0))
    with backend.open(None) as session:
        found = distance(session.logits, states, session.logits, states, torch.full((50,), -1), 7)
    assert float(found.kl_nats.abs().max()) == 0.0
    assert bool(found.top1_agreement.all())
    assert bool(found.numbers.log_p.isnan().all())


def test_kl_from_cached_states_equals_kl_from_logits(pair, tmp_path):
    _, backend, variant = pair
    warnings = []
    store = StateStore(tmp_path, warnings.append)
    windows = make_windows(IDS, 32, 32).windows
    with backend.open(None) as base:
        live = window_states(base, windows, 64, nobody)
        store.write("key", live)
    cached = store.read("key")
    with backend.open(variant) as session:
        states = window_states(session, windows, 64, nobody)
        from_cache = mean_kl(base.logits, cached, session.logits, states)
        log_p, log_q = (
            base.logits(live).double().log_softmax(-1),
            session.logits(states).double().log_softmax(-1),
        )
    assert from_cache == pytest.approx(float((log_p.exp() * (log_p - log_q)).sum(-1).mean()), abs=1e-6)
    (record,) = tmp_path.glob("key-*.safetensors")
    assert record.stat().st_size <= live.numel() * 4 + 256  # d_model x 4 bytes a token, and a header
    assert not warnings


def test_a_state_record_changed_by_hand_is_named_and_made_again(tmp_path):
    warnings = []
    store = StateStore(tmp_path, warnings.append)
    path = store.write("key", torch.ones(3, 4))
    path.write_bytes(path.read_bytes()[:-1] + b"\x00")
    assert store.read("key") is None
    assert path.name in warnings[0]
    assert not path.exists()

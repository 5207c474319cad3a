"""What every engine owes, whatever runs it: the tokens and logits of full forward passes, one token at a time.

A new engine is one line of `CASES`, under its name in `qeval.bench.engines.registry.ENGINES`.
"""

from itertools import pairwise

import numpy as np
import pytest

from qeval.backends.replay import ReplaySession
from qeval.backends.torch import TorchSession
from qeval.bench.engines.base import Identity, greedy
from qeval.bench.engines.replay import ReplayEngine
from qeval.bench.engines.torch import CompiledEngine, TorchEngine
from qeval.errors import QevalError, UsageError
from qeval.models.structure.head import head_of
from tests.fixtures.engines import Case, prompts, slow_greedy, slow_logits
from tests.fixtures.engines_llamacpp import LLAMA_CPP_CASE
from tests.fixtures.engines_onnx import ONNX_CASES
from tests.fixtures.families import tiny_family
from tests.fixtures.tiny import tiny_llama

CONTEXT = 256
GENERATED = 6

CASES = {
    "replay": Case(
        lambda: ReplayEngine(256, CONTEXT, largest_batch=4),
        lambda: ReplaySession(256, max_length=CONTEXT),
        largest_batch=4,
    ),
    **ONNX_CASES,
    "llama.cpp": LLAMA_CPP_CASE,
}
"""Engines by what they run."""


def of_model(engine, model, **options):
    """A case of an engine over a model that is in memory."""
    told = Identity("pytorch", "cpu", "fp32", "fp32", 1, "torch")
    return Case(lambda: engine(model, head_of(model), told, **options), lambda: TorchSession(model))


MODELS = {
    "llama": lambda: tiny_llama(vocab_size=256),
    **{name.lower(): lambda name=name: tiny_family(name, vocab_size=256) for name in ("Mistral", "Gemma2", "Phi")},
}
"""Grouped queries; sliding windows; soft caps; parallel attention."""
for _name, _make in MODELS.items():
    CASES[f"pytorch-eager-{_name}"] = of_model(TorchEngine, _make())
CASES["pytorch-compile-llama"] = of_model(CompiledEngine, MODELS["llama"](), backend="eager")
"""Traced by dynamo and run as traced: generating code for it takes a minute."""


@pytest.fixture(scope="module", params=CASES)
def case(request):
    found = CASES[request.param]
    for module in found.needs:
        pytest.importorskip(module)
    return found


@pytest.fixture(scope="module")
def engine(case):
    opened = case.open_engine()
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def session(case):
    return case.session()


def batch_of(case, batch, length, seed=0):
    """Prompts [batch, length], fewer where the engine can't do so many."""
    return prompts(min(batch, case.largest_batch or batch), length, case.vocabulary, seed)


def test_it_says_what_ran(engine):
    told = engine.identity
    assert all([told.engine, told.provider, told.dtype, told.weights, told.version])
    assert told.threads >= 1
    assert engine.max_length == CONTEXT


@pytest.mark.parametrize(("batch", "length"), [(1, 1), (1, 9), (3, 5)])
def test_greedy_tokens_are_those_of_full_passes(case, engine, session, batch, length):
    given = batch_of(case, batch, length)
    assert greedy(engine, given, GENERATED) == slow_greedy(session, given, GENERATED)


def test_forced_tokens_are_taken_and_logits_are_those_after_them(case, engine, session):
    given, forced = batch_of(case, 2, 7), batch_of(case, 2, 4, seed=1)
    engine.reset(len(given), 7 + 4)
    chosen = engine.prefill(given)
    for place in range(forced.shape[1] + 1):
        found = engine.logits()
        assert found.dtype == np.float32
        for row in range(len(given)):
            expected = slow_logits(session, [*given[row].tolist(), *forced[row, :place].tolist()])
            assert found.shape[1] == len(expected)
            np.testing.assert_allclose(found[row], expected, rtol=0, atol=case.tolerance * abs(expected).max())
        assert chosen.tolist() == found.argmax(axis=1).tolist()
        if place < forced.shape[1]:
            chosen = engine.step(forced[:, place])


def test_after_a_reset_nothing_of_before_is_left(case, engine):
    given = batch_of(case, 2, 6)
    first = greedy(engine, given, GENERATED)
    greedy(engine, batch_of(case, 1, 11, seed=2), 3)
    assert greedy(engine, given, GENERATED) == first


def test_a_batch_is_so_many_single_sequences(case, engine):
    given = batch_of(case, 3, 8, seed=3)
    alone = [greedy(engine, given[row : row + 1], GENERATED)[0] for row in range(len(given))]
    assert greedy(engine, given, GENERATED) == alone


def test_arguments_are_not_changed(case, engine):
    given = batch_of(case, 2, 5)
    before = given.copy()
    engine.reset(len(given), 8)
    chosen = engine.prefill(given)
    kept = chosen.copy()
    engine.step(chosen)
    assert (given == before).all()
    assert (chosen == kept).all()


def test_what_is_too_long_is_refused_before_any_work(engine):
    with pytest.raises(UsageError, match=f"context of {CONTEXT}"):
        engine.reset(1, CONTEXT + 1)
    engine.reset(1, CONTEXT)


def test_a_batch_that_it_cannot_do_is_refused(case, engine):
    if case.largest_batch is None:
        pytest.skip("it takes any batch")
    with pytest.raises(UsageError, match=f"batch of {case.largest_batch + 1}"):
        engine.reset(case.largest_batch + 1, 8)


def test_more_tokens_than_room_was_made_for_are_refused(case, engine):
    given = batch_of(case, 1, 4)
    engine.reset(1, 5)
    chosen = engine.step(engine.prefill(given))
    with pytest.raises(QevalError, match="room was made for"):
        engine.step(chosen)


def test_memory_is_told_in_bytes_and_the_cache_grows_with_the_batch(case, engine):
    def cache(batch):
        engine.reset(batch, 16)
        engine.prefill(batch_of(case, batch, 8))
        return engine.memory().cache_bytes

    one = cache(1)
    if one is None or case.largest_batch == 1:
        pytest.skip("it can't tell what its keys and values take, or takes one sequence at a time")
    assert cache(2) == 2 * one > 0


def test_compiling_is_told_apart_and_due_once_for_single_sequences_and_once_for_batches():
    model = tiny_llama(num_hidden_layers=1)
    compiled = CompiledEngine(model, head_of(model), Identity("c", "cpu", "fp32", "fp32", 1, "torch"), backend="eager")
    told = [compiled.compile_seconds]
    for batch, length in ((1, 4), (1, 9), (2, 4), (3, 7), (1, 6)):
        greedy(compiled, prompts(batch, length, 256), 3)
        told.append(compiled.compile_seconds)
    assert told[0] == 0
    assert [later > before for before, later in pairwise(told)] == [True, False, True, False, False]

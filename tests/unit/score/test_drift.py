"""An engine's tokens against its variant's reference: none differ where the two are one, and a wrong one is told."""

import numpy as np
import pytest
import scipy.special

from qeval.backends.replay import ReplaySession
from qeval.bench.engines.base import FreeRun, free_run
from qeval.bench.engines.drift import broken, drift, log_softmax_fp64, reference_logits
from qeval.bench.engines.replay import ReplayEngine
from qeval.errors import QevalError
from qeval.store.timings import Drift
from tests.fixtures.engines import prompts, slow_greedy, slow_logits

PROMPT = tuple(prompts(1, 9, 256)[0].tolist())
COUNT = 8


@pytest.fixture(scope="module")
def session():
    return ReplaySession(256)


def run_of(engine, at=None, plus=0.0):
    """Free runs of an engine whose second choice gets `plus` more at the token `at`."""

    def run(prompt, count):
        made = free_run(engine, prompt, count)
        if at is None or len(prompt) != len(PROMPT):
            return made
        logits = made.logits.copy()
        logits[at, np.argsort(logits[at])[-2]] += plus
        token = int(logits[at].argmax())
        rest = free_run(engine, [*prompt, *made.tokens[:at], token], count - at - 1)
        return FreeRun((*made.tokens[:at], token, *rest.tokens), np.concatenate([logits[: at + 1], rest.logits]))

    return run


def found(run, session, **changes):
    return drift(run, session, PROMPT, COUNT, rejoin=3, engine="e", variant="v", index=0, **changes)


def test_the_model_itself_never_leaves_its_own_tokens(session):
    same = found(run_of(ReplayEngine(256)), session)
    assert (same.equal_share, same.first_divergence, same.kl_nats, same.rejoined) == (1.0, None, None, None)
    assert broken([same]) is None


def test_reference_logits_are_those_of_full_passes(session):
    made = free_run(ReplayEngine(256), PROMPT, COUNT)
    assert [list(made.tokens)] == slow_greedy(session, np.asarray([PROMPT]), COUNT)
    logits = reference_logits(session, PROMPT, made.tokens)
    for place in range(COUNT):
        np.testing.assert_allclose(logits[place], slow_logits(session, [*PROMPT, *made.tokens[:place]]), atol=1e-5)


def test_one_other_choice_is_found_with_its_kl_and_margin_and_forced_back(session):
    at, plus = 3, 50.0
    run = run_of(ReplayEngine(256), at, plus)
    drifted = found(run, session)
    logits = reference_logits(session, PROMPT, run(PROMPT, COUNT).tokens)[at].astype(np.float64)
    first, second = np.argsort(logits)[::-1][:2]
    changed = logits.copy()
    changed[second] += plus
    ours, theirs = scipy.special.log_softmax(logits), scipy.special.log_softmax(changed)
    assert drifted.first_divergence == at
    assert drifted.kl_nats == pytest.approx(scipy.special.rel_entr(np.exp(ours), np.exp(theirs)).sum(), rel=1e-6)
    assert drifted.margin_nats == pytest.approx(ours[first] - ours[second], rel=1e-5)
    assert drifted.rejoined
    assert drifted.equal_share == pytest.approx((COUNT - 1) / COUNT)
    assert "token 3 of prompt 0" in broken([drifted])


def test_another_model_is_broken(session):
    assert broken([found(run_of(ReplayEngine(256)), ReplaySession(256, seed=5))]) is not None


def test_logits_that_are_no_numbers_are_an_error(session):
    run = run_of(ReplayEngine(256), 2, float("nan"))
    with pytest.raises(QevalError, match="not finite"):
        found(run, session)


def numbers(**changes):
    given = {"equal_share": 0.9, "first_divergence": 2, "kl_nats": 0.01, "margin_nats": 0.02, "rejoined": True}
    return Drift("e", "v", 0, 8, **given | changes, rejoin_tokens=3)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({}, None),
        ({"equal_share": 0.5}, "Only 70%"),
        ({"kl_nats": 0.6}, "no rounding"),
        ({"margin_nats": 2.5}, "no rounding"),
    ],
)
def test_what_rounding_does_not_explain_is_broken(changes, says):
    reason = broken([numbers(), numbers(**changes)])
    assert reason is None if says is None else says in reason


def test_log_softmax_is_scipys():
    row = np.linspace(-40, 90, 17, dtype=np.float32)
    np.testing.assert_allclose(log_softmax_fp64(row), scipy.special.log_softmax(row.astype(np.float64)))

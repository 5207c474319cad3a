"""What it costs that a model's questions can't share their examples: counted in the estimate, said in the plan."""

from types import SimpleNamespace

import pytest

from qeval.compare.plan import Plan
from qeval.tasks.harness import Question

EXAMPLES, OWN = tuple(range(400)), 6
QUESTIONS = [Question("s", item, 0, ((EXAMPLES + (1000 + item,) * OWN, (7,)),), 1, 5) for item in range(5)]
RUN_WHOLE = len(QUESTIONS) * (len(EXAMPLES) + OWN)
RUN_SHARED = len(EXAMPLES) + len(QUESTIONS) * OWN


def plan_of(shares_prefixes, *questions):
    """A plan of nothing but questions, on a backend that shares prefixes or not."""
    plan = object.__new__(Plan)
    suites = (SimpleNamespace(parts=lambda: [list(questions)]),) if questions else ()
    fields = {"suites": suites, "responses": (), "haystacks": ()}
    for name, value in {**fields, "backend": SimpleNamespace(shares_prefixes=shares_prefixes)}.items():
        object.__setattr__(plan, name, value)
    return plan


@pytest.mark.parametrize(("shares", "tokens"), [(True, RUN_SHARED), (False, RUN_WHOLE)])
def test_the_tokens_of_questions_are_those_that_are_run(shares, tokens):
    assert plan_of(shares, *QUESTIONS).asked_tokens == tokens


def test_the_plan_says_how_many_times_the_tokens_whole_questions_take():
    (said,) = plan_of(False, *QUESTIONS)._cost_of_whole_questions
    assert said.startswith(f"Questions run whole: {RUN_WHOLE / RUN_SHARED:.1f} times the tokens")
    assert plan_of(True, *QUESTIONS)._cost_of_whole_questions == []
    assert plan_of(False)._cost_of_whole_questions == []

"""How far it is from a run to a model's forward pass: a reader follows a score in seven calls."""

import inspect

import pytest

from qeval.backends.torch import TorchSession
from tests.fixtures.bench import Bench

MOST = 7


@pytest.fixture
def chains(monkeypatch):
    """The names of qeval's functions between `run` and each thing that a session was asked for."""
    found = {}

    def spy(name):
        original = getattr(TorchSession, name)

        def asked(self, *args, **options):
            chain = chain_to_run()
            if chain is not None:
                found.setdefault(name, set()).add((*chain, name))
            return original(self, *args, **options)

        monkeypatch.setattr(TorchSession, name, asked)

    for name in ("states", "prefill", "greedy"):
        spy(name)
    return found


def chain_to_run():
    names = []
    for frame in inspect.stack()[2:]:
        if frame.filename.endswith("compare/run.py") and frame.function == "run_comparison":
            return names[::-1]
        if "/qeval/" in frame.filename:
            names.append(frame.function)
    return None


def test_a_forward_pass_is_seven_calls_from_the_run(chains, tmp_path, monkeypatch):
    monkeypatch.setenv("QEVAL_HOME", str(tmp_path / "home"))
    drift = ("--drift-prompts", "4", "--drift-prompt-tokens", "16", "--drift-tokens", "8")
    assert Bench(tmp_path).compare("--quiet", *drift, methods="rtn:g32", tasks="kl,mmlu,drift") == 0
    assert set(chains) == {"states", "prefill", "greedy"}
    for asked in chains.values():
        assert max(map(len, asked)) <= MOST, max(asked, key=len)

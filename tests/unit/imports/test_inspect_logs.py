"""Logs that Inspect itself writes: each sample and epoch a score, graded as Inspect grades."""

import pytest

import qeval
from qeval.errors import UsageError
from qeval.store.rows import RowStore


def test_without_inspect_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "inspect_ai.log", None)
    (tmp_path / "a.eval").write_bytes(b"PK")
    with pytest.raises(UsageError, match=r"Reading a.eval takes inspect_ai; pip install 'qeval\[inspect\]'"):
        qeval.import_rows([f"baseline={tmp_path / 'a.eval'}"], out=tmp_path / "run")


@pytest.fixture
def logs(tmp_path, monkeypatch):
    """Two models' logs of one task of 6 samples and 2 epochs, by Inspect's own evaluation; what they say is made up."""
    inspect_ai = pytest.importorskip("inspect_ai", reason="reading Inspect's logs takes inspect_ai")
    from inspect_ai.dataset import Sample
    from inspect_ai.model import ModelOutput
    from inspect_ai.scorer import match
    from inspect_ai.solver import solver

    @solver
    def answer(right):
        async def solve(state, generate):  # no model is asked: counting a mock's tokens takes the net
            word = "yes" if int(state.sample_id[1:]) in right and state.epoch == 1 else "no"
            state.output = ModelOutput.from_content("mockllm/model", word)
            return state

        return solve

    monkeypatch.setenv("INSPECT_LOG_LEVEL", "error")
    monkeypatch.setenv("INSPECT_DISPLAY", "none")
    found = {}
    for name, right in (("fp16", {0, 1, 2, 4, 5}), ("awq", {0, 2, 5})):
        task = inspect_ai.Task(
            name="asked",
            dataset=[Sample(id=f"q{i}", input=f"Is it {i}?", target="yes") for i in range(6)],
            solver=answer(right),
            scorer=match(),
        )
        (log,) = inspect_ai.eval(task, model="mockllm/model", epochs=2, log_dir=str(tmp_path / name))
        found[name] = log
    return found


@pytest.mark.filterwarnings("ignore")
def test_scores_are_inspects_own(logs, tmp_path):
    files = [f"{name}={log.location}" for name, log in logs.items()]
    run = qeval.import_rows(files, out=tmp_path / "run")
    (score,) = run.record.scores
    assert (score.name, score.better, score.items) == ("asked_match", "higher", 6)
    for name, log in (("baseline", logs["fp16"]), ("awq", logs["awq"])):
        assert run.metric(name, "asked_match_score").value == pytest.approx(
            log.results.scores[0].metrics["accuracy"].value
        )
    assert RowStore(run.folder).read("scores").num_rows == 2 * 6 * 2

"""A board in MLflow and in Weights & Biases, through their own clients where these are installed."""

import json
import sys
from types import ModuleType, SimpleNamespace

import pytest

import qeval
from qeval.board.export import tracked_runs
from qeval.cli.app import run_program
from qeval.errors import QevalError
from tests.fixtures.runs import SEVEN, Shape, make_run, reseal


@pytest.fixture(scope="module")
def board(tmp_path_factory):
    run = make_run(tmp_path_factory.mktemp("runs") / "night1", Shape(variants=SEVEN[:2], windows=6, length=16))
    record = json.loads((run / "run.json").read_text())
    for each in (record, *record["variants"]):
        each["witness"] = "a" * 64
    reseal(run, record)
    folder = tmp_path_factory.mktemp("board")
    qeval.board([run], out=folder, accept=True)
    return folder


def test_each_variant_has_its_figures_with_intervals_and_the_token_hash(board):
    tracked = {run.name.rpartition("/")[2]: run for run in tracked_runs(board)}
    assert set(tracked) == {"baseline", *(each.name for each in SEVEN[:2])}
    own = tracked[SEVEN[0].name]
    assert own.metrics["kl_nats_low"] <= own.metrics["kl_nats"] <= own.metrics["kl_nats_high"]
    assert {"method", "bits_per_weight", "model", "protocol", "seed"} <= set(own.params)
    assert own.tags["qeval.accepted"] == "true" and own.tags["qeval.token_hash"]
    assert len({run.key for run in tracked.values()}) == 3


def test_mlflow_holds_every_run_once(board, tmp_path, monkeypatch, capfd):
    mlflow = pytest.importorskip("mlflow", reason="writing to MLflow takes mlflow-skinny")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "store").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri(None)
    for count in (3, 0):  # the second time nothing is new
        assert run_program(["board", "--out", str(board), "--export", "mlflow"]) == 0
        assert f"mlflow: {count} runs written" in capfd.readouterr().err
    client = mlflow.MlflowClient()
    runs = client.search_runs([client.get_experiment_by_name("qeval").experiment_id])
    by_name = {run.info.run_name: run.data for run in runs}
    for each in tracked_runs(board):
        data = by_name[each.name]
        assert data.metrics == pytest.approx(dict(each.metrics))
        assert data.params == {name: str(value) for name, value in each.params.items()}
        assert data.tags["qeval.token_hash"] == each.tags["qeval.token_hash"]


def test_wandb_has_a_run_a_variant_offline(board, tmp_path, monkeypatch, capfd):
    pytest.importorskip("wandb", reason="writing to Weights & Biases takes wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    assert run_program(["board", "--out", str(board), "--export", "wandb"]) == 0
    assert "wandb: 3 runs written" in capfd.readouterr().err
    folders = [path for path in (tmp_path / "wandb").iterdir() if path.name.startswith("offline-run-")]
    assert len(folders) == 3
    assert all(any(path.suffix == ".wandb" for path in folder.iterdir()) for folder in folders)


def stand_in(calls):
    """A module with what the export uses of wandb; it notes what it was called with."""

    def init(**given):
        return SimpleNamespace(log=lambda metrics: calls.append((given, metrics)), finish=lambda: None)

    module = ModuleType("wandb")
    module.init, module.Settings = init, SimpleNamespace
    return module


def test_wandb_is_given_ids_that_stay_the_same(board, monkeypatch):
    calls = []
    monkeypatch.setitem(sys.modules, "wandb", stand_in(calls))
    monkeypatch.setenv("WANDB_PROJECT", "ours")
    for _ in range(2):
        qeval.board(out=board, export="wandb")
    first, again = calls[:3], calls[3:]
    assert [given["id"] for given, _ in first] == [given["id"] for given, _ in again]
    given, metrics = first[0]
    assert (given["project"], given["resume"]) == ("ours", "allow")
    assert given["tags"][-1] == "accepted" and all(len(tag) <= 64 for tag in given["tags"])
    assert metrics == dict(tracked_runs(board)[0].metrics)


@pytest.mark.parametrize("tracker", ["mlflow", "wandb"])
def test_a_client_that_is_not_installed_is_one_sentence(board, tracker, monkeypatch, capfd, tmp_path):
    monkeypatch.setitem(sys.modules, tracker, None)
    assert run_program(["board", "--out", str(tmp_path / "new"), "--export", tracker]) == 2
    assert f"not installed: pip install 'qeval[{tracker}]'" in capfd.readouterr().err
    assert not list(tmp_path.iterdir())


def test_an_unknown_tracker_and_a_client_that_fails_are_told(board, monkeypatch, capfd):
    assert run_program(["board", "--out", str(board), "--export", "mlfow"]) == 2
    assert "nearest: mlflow" in capfd.readouterr().err

    def refuse(**_):
        raise ValueError("no such entity\nand more")

    module = stand_in([])
    module.init = refuse
    monkeypatch.setitem(sys.modules, "wandb", module)
    with pytest.raises(QevalError, match=r"--export wandb: its client failed \(no such entity\)"):
        qeval.board(out=board, export="wandb")

"""`--tasks drift`: continuations against transformers' `generate`, metrics against free runs and slow definitions."""

import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from qeval.backends.replay import ReplaySession
from qeval.backends.torch import TorchSession
from qeval.cli.app import run_program
from qeval.compare.settings import CalibrationChoice, CorpusChoice, ModelChoice, Settings
from qeval.compare.task_choice import TaskChoice
from qeval.config import parse_methods
from qeval.errors import BrokenRecordError, QevalError, UsageError
from qeval.report import build_report
from qeval.report.align import DriftRows
from qeval.report.measure_drift import REJOIN_TOKENS, drift_metrics
from qeval.score.drift import Continuation, DriftPart, drift_columns, part_states
from qeval.store.rows import RowStore
from qeval.tasks.drift import prompts_of
from tests.fixtures.bench import Bench, row_files
from tests.fixtures.families import tiny_family
from tests.fixtures.runs import reseal

COUNT = 24
PROMPTS = tuple(tuple(int(t) for t in row) for row in np.random.default_rng(7).integers(0, 256, size=(6, 12)))
FLAGS = ("--drift-prompts", "10", "--drift-prompt-tokens", "8", "--drift-tokens", "16")


def nudged(model, scale):
    """The same model with its matrices moved a little, as a quantizer moves them."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.add_(scale * parameter.std() * torch.randn(parameter.shape, generator=generator))
    return model


def generated(model, ids, count):
    """The tokens that transformers goes on with."""
    made = model.generate(torch.tensor([ids]), max_new_tokens=count, min_new_tokens=count, do_sample=False)
    return made[0, len(ids) :].tolist()


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Gemma2", "Granite"])
def test_continuations_are_those_of_transformers(family):
    model = tiny_family(family)
    said = TorchSession(model).greedy(PROMPTS, COUNT)
    assert said.tolist() == [generated(model, prompt, COUNT) for prompt in PROMPTS]


@pytest.fixture(scope="module")
def scored():
    """A model and a nudged one: the rows of the second along the continuations of the first."""
    base, other = tiny_family("Llama"), nudged(tiny_family("Llama"), 0.08)
    part = DriftPart(3, PROMPTS, COUNT)
    ours, theirs = TorchSession(base), TorchSession(other)
    tokens = ours.greedy(PROMPTS, COUNT)
    along = Continuation(tokens, part_states(ours, part, tokens, 100, lambda done: None))
    states = part_states(theirs, part, tokens, 100, lambda done: None)
    columns = drift_columns(ours.logits, along, theirs, states, part, {})
    return base, other, tokens, columns


def rows_of(columns):
    shape = len(PROMPTS), COUNT
    return DriftRows(
        *(np.asarray(columns[name]).reshape(shape) for name in ("token", "pred", "kl_nats", "margin_nats"))
    )


def test_a_free_run_leaves_where_the_rows_say_and_comes_back_when_they_say(scored):
    _, other, tokens, columns = scored
    rows, seen = rows_of(columns), 0
    for place, prompt in enumerate(PROMPTS):
        free, base = generated(other, prompt, COUNT), tokens[place].tolist()
        first = next((at for at in range(COUNT) if free[at] != base[at]), None)
        apart = np.flatnonzero(rows.pred[place] != rows.tokens[place])
        assert (int(apart[0]) if apart.size else None) == first
        if first is None or first + REJOIN_TOKENS >= COUNT:
            continue
        forced = generated(other, [*prompt, *base[: first + 1]], REJOIN_TOKENS)
        equal = rows.pred[place] == rows.tokens[place]
        assert equal[first + 1 : first + 1 + REJOIN_TOKENS].all() == (forced == base[first + 1 :][:REJOIN_TOKENS])
        seen += 1
    assert seen


def test_distances_are_those_of_the_distributions(scored):
    base, other, tokens, columns = scored
    rows = rows_of(columns)
    assert columns["prompt"].tolist()[::COUNT] == list(range(3, 3 + len(PROMPTS)))
    whole = torch.tensor([[*prompt, *said] for prompt, said in zip(PROMPTS, tokens.tolist(), strict=True)])
    with torch.no_grad():
        log_p, log_q = (torch.log_softmax(model(whole).logits.double(), dim=-1)[:, 11:-1] for model in (base, other))
    assert (rows.pred == log_q.argmax(-1).numpy()).all()
    np.testing.assert_allclose(rows.kl_nats, (log_p.exp() * (log_p - log_q)).sum(-1), atol=1e-5)
    said, wanted = (log_p.gather(-1, ids.unsqueeze(-1)).squeeze(-1) for ids in (log_q.argmax(-1), tokens))
    np.testing.assert_allclose(rows.margin_nats, wanted - said, atol=1e-5)
    assert (rows.margin_nats >= -1e-6).all()


def test_metrics_are_their_slow_definitions():
    rng = np.random.default_rng(5)
    tokens = rng.integers(0, 50, size=(40, 20))
    pred = np.where(rng.random(tokens.shape) < 0.06, tokens + 1, tokens)
    kl, margin = rng.exponential(size=(2, *tokens.shape))
    found = drift_metrics(DriftRows(tokens, pred, kl, margin), seed=0)
    firsts = [next((at for at in range(20) if p[at] != t[at]), 20) for p, t in zip(pred, tokens, strict=True)]
    left = [(prompt, at) for prompt, at in enumerate(firsts) if at < 20]
    back = [(pred[p, at + 1 : at + 9] == tokens[p, at + 1 : at + 9]).all() for p, at in left if at + 8 < 20]
    assert 0 < len(left) < 40
    assert found["drift_equal"].value == pytest.approx(np.mean(pred == tokens))
    assert (found["drift_equal"].n, found["drift_equal"].clusters) == (800, 40)
    assert found["drift_diverged"].value == pytest.approx(len(left) / 40)
    assert found["drift_first_tokens"].value == pytest.approx(np.mean(firsts))
    assert found["drift_kl_nats"].value == pytest.approx(np.mean([kl[place] for place in left]))
    assert found["drift_margin_nats"].value == pytest.approx(np.mean([margin[place] for place in left]))
    assert found["drift_rejoined"].value == pytest.approx(np.mean(back))
    assert found["drift_rejoined"].n == len(back)


def test_a_model_that_never_leaves_has_no_distance_there_and_a_broken_one_no_figure():
    same = np.arange(12).reshape(3, 4)
    found = drift_metrics(DriftRows(same, same, np.zeros((3, 4)), np.zeros((3, 4))), seed=0)
    assert (found["drift_equal"].value, found["drift_diverged"].value, found["drift_first_tokens"].value) == (1, 0, 4)
    assert found["drift_kl_nats"].value is None
    broken = drift_metrics(DriftRows(same, same, np.full((3, 4), np.nan), np.zeros((3, 4))), seed=0)
    assert {metric.non_finite for metric in broken.values()} == {12}


def test_a_session_that_can_not_generate_is_told():
    with pytest.raises(QevalError, match="leave drift out"):
        ReplaySession(8).greedy(PROMPTS, 2)


def test_a_continuation_beyond_the_context_or_a_rotary_limit_is_refused():
    session = TorchSession(tiny_family("Llama"))
    with pytest.raises(QevalError, match="longer than the context of 256"):
        session.greedy(PROMPTS, 256)
    session._rope_limit = 20
    with pytest.raises(QevalError, match="from 12 to 36 tokens crosses"):
        session.greedy(PROMPTS, COUNT)


def test_prompts_share_no_token_and_need_enough_of_them():
    found = prompts_of(range(100), 7, 14, None)
    assert len({token for prompt in found for token in prompt}) == 98
    with pytest.raises(UsageError, match="fewer than 8 prompts of 14"):
        prompts_of(range(100), 8, 14, None)
    with pytest.raises(UsageError, match="room for the BOS token alone"):
        prompts_of(range(100), 2, 1, 5)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    bench = Bench(tmp_path_factory.mktemp("drift"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QEVAL_HOME", str(bench.folder / "home"))
        assert bench.compare("--quiet", *FLAGS, tasks="drift", methods="rtn:g32,rtn:int8-channel") == 0
        yield bench


def test_a_run_of_continuations_alone_has_its_rows_its_metrics_and_its_section(place):
    report = place.report()
    assert report["drift"] | {"corpus_sha256": 0, "tokens_sha256": 0} == {
        "corpus": "corpus.txt", "corpus_sha256": 0, "tokens_sha256": 0, "prompts": 10, "prompt_tokens": 8,
        "generated": 16, "bos": False,
    }  # fmt: skip
    rows = RowStore(place.out).read("drift").to_pylist()
    assert len(rows) == 3 * 160
    for variant in report["variants"]:
        own = [row for row in rows if row["variant"] == variant["name"]]
        assert variant["metrics"]["drift_equal"]["value"] == pytest.approx(
            np.mean([row["pred"] == row["token"] for row in own])
        )
        assert variant["metrics"]["drift_equal"]["clusters"] == 10
    assert {row["kl_nats"] for row in rows if row["variant"] == "baseline"} == {None}
    text = (place.out / "report.md").read_text()
    assert (
        "10 prompts of 8 tokens of corpus.txt (no BOS), each continued greedily by the baseline with 16 tokens" in text
    )
    assert "| rtn:int8-channel |" in text.split("Greedy continuations against the baseline's")[1]
    assert 'id="drift"' in (place.out / "report.html").read_text()


def test_the_same_command_again_makes_nothing_anew_and_a_lost_part_is_made_as_it_was(place, tmp_path):
    out = shutil.copytree(place.out, tmp_path / "out")
    before = row_files(out)
    lost = sorted((out / "rows" / "drift").glob("*.parquet"))[1]
    lost.unlink()
    arguments = place.arguments(tasks="drift", methods="rtn:g32,rtn:int8-channel", out=str(out))
    assert run_program(["compare", *arguments, *FLAGS, "--quiet"]) == 0
    assert row_files(out) == before


def test_verify_derives_every_part(place, capfd):
    assert run_program(["verify", str(place.out), "--sample", "100", "--quiet", "--json"]) == 0
    told = json.loads(capfd.readouterr().out)
    assert [each["kind"] for each in told["derived"]] == ["drift"] * 6
    assert all(each["identical"] for each in told["derived"])


def test_rows_along_other_continuations_are_an_error(place, tmp_path):
    out = shutil.copytree(place.out, tmp_path / "out")
    store = RowStore(out)
    index = json.loads((out / "rows" / "index.json").read_text())
    for name in index["drift"]:
        table = pq.ParquetFile(out / "rows" / "drift" / name).read()
        columns = {column: table[column].to_pylist() for column in table.column_names}
        if columns["variant"][0] == "rtn:g32":
            columns["token"][5] += 1
            index["drift"][index["drift"].index(name)] = store.write("drift", "other", columns).name
            break
    (out / "rows" / "index.json").write_text(json.dumps(index))
    reseal(out)
    with pytest.raises(
        BrokenRecordError, match="'rtn:g32' was not scored along the baseline's continuations: 1 tokens"
    ):
        build_report(out)


def test_missing_rows_are_an_error(place, tmp_path):
    out = shutil.copytree(place.out, tmp_path / "out")
    index = json.loads((out / "rows" / "index.json").read_text())
    index["drift"].pop()
    (out / "rows" / "index.json").write_text(json.dumps(index))
    reseal(out)
    with pytest.raises(BrokenRecordError, match="rows along continuations, which are not one for each of 16 tokens"):
        build_report(out)


def settings(tmp_path, **given):
    return Settings(
        model=ModelChoice("x", stream=given.pop("stream", False)), recipes=tuple(parse_methods("rtn")), variants=(),
        tasks=("drift",), corpus=CorpusChoice(), questions=TaskChoice(), calibration=CalibrationChoice(), out=tmp_path,
        **given,
    )  # fmt: skip


def test_streaming_and_drift_exclude_one_another(tmp_path):
    assert settings(tmp_path).question_tasks == ()
    with pytest.raises(UsageError, match="leave one of them out"):
        settings(tmp_path, stream=True)


def test_prompts_that_do_not_fit_are_told_before_any_work(place, tmp_path, capfd):
    wrong = [["--drift-tokens", "505"], ["--drift-prompts", "5000"]]
    for flags, told in zip(wrong, ["longer than the model's context of 512", "fewer than 5000 prompts"], strict=True):
        arguments = place.arguments(tasks="drift", methods="rtn:g32", out=str(tmp_path / "out"))
        assert run_program(["compare", *arguments, *FLAGS, *flags, "--quiet"]) == 2
        assert told in capfd.readouterr().err

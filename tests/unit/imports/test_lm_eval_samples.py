"""Samples that lm-evaluation-harness itself writes, of every output type, become the run that qeval would have made."""

import json
import shutil

import numpy as np
import pytest
import yaml
from lm_eval import simple_evaluate
from lm_eval.loggers import EvaluationTracker
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

import qeval
from qeval.backends.torch import TorchSession
from qeval.errors import UsageError
from qeval.gate.judge import judge
from qeval.gate.policy import Policy
from qeval.imports.sample_columns import _lines, _read_choices, _read_lines
from qeval.report.run_rows import PairedRun
from qeval.score.choices import item_columns, score_questions
from qeval.store.rows import RowStore
from qeval.store.run import read_run, write_run
from qeval.tasks import harness, harness_tasks
from tests.fixtures.endings import ENDS, stories
from tests.fixtures.runs import reseal
from tests.fixtures.tiny import tiny_llama, tiny_tokenizer

DOCS = stories(40)
TASKS = {
    "ends": ENDS,
    "last": {"output_type": "loglikelihood", "doc_to_text": "start", "doc_to_target": "{{ends[0]}}"}
    | {"metric_list": [{"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False}]},
    "pages": {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "start"}
    | {"metric_list": [{"metric": "word_perplexity"}]},
    "written": {"output_type": "generate_until", "doc_to_text": "start", "doc_to_target": "{{ends[1]}}"}
    | {
        "generation_kwargs": {"until": ["."], "max_gen_toks": 3},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        "filter_list": [
            {"name": "strict", "filter": [{"function": "take_first"}]},
            {"name": "lenient", "filter": [{"function": "take_first"}, {"function": "lowercase"}]},
        ],
    },
}
RULES = [
    {"metric": "ends_acc_drop", "at_most": "2 points"},
    {"metric": "ends_flips", "at_most": "60 %"},
    {"metric": "ends_choice_kl_nats", "at_most": "0.05 nats"},
]


def policy(*rules):
    return Policy.model_validate({"name": "p", "rules": list(rules)})


def tokenizer():
    made = tiny_tokenizer()
    made.eos_token = made.pad_token = "~"
    return made


@pytest.fixture(scope="module")
def models():
    return {"baseline": tiny_llama(0), "near": tiny_llama(0, initializer_range=0.14), "far": tiny_llama(7)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory, models):
    """The harness's own output folders of three models: what `lm_eval --log_samples --output_path` writes."""
    root = tmp_path_factory.mktemp("lm_eval")
    (root / "rows.json").write_text("\n".join(json.dumps(row) for row in DOCS))
    data = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(root / "rows.json")}, "cache_dir": str(root / "cache")},
        "test_split": "test",
    }
    for name, config in TASKS.items():
        (root / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **data, **config}))
    manager = TaskManager(include_path=root, include_defaults=False)
    for name, model in models.items():
        tracker = EvaluationTracker(output_path=str(root / "out"))
        tracker.general_config_tracker.model_name_sanitized = name
        results = simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer(), batch_size=8), tasks=list(TASKS), task_manager=manager,
            bootstrap_iters=0,
        )  # fmt: skip
        samples = results.pop("samples")
        tracker.save_results_aggregated(results=results, samples=samples)
        for task, rows in samples.items():
            tracker.save_results_samples(task_name=task, samples=rows)
    return {"means": results["results"], "root": root} | {name: root / "out" / name for name in models}


@pytest.fixture(scope="module")
def imported(folders, tmp_path_factory):
    out = tmp_path_factory.mktemp("imported") / "run"
    qeval.import_rows([folders[name] for name in ("baseline", "near", "far")], out=out)
    return out


pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")


def test_every_output_type_and_filter_is_imported(imported):
    record = read_run(imported)
    assert [task.name for task in record.tasks] == ["ends"]
    assert {score.name: (score.better, score.unit) for score in record.scores} == {
        "last_perplexity": ("lower", "nats"),
        "pages_word_perplexity": ("lower", "nats"),
        "written_exact_match_strict": ("higher", "fraction"),
        "written_exact_match_lenient": ("higher", "fraction"),
    }
    assert record.imported.hashes == ["doc_hash", "prompt_hash", "target_hash"]
    assert [variant.name for variant in record.variants] == ["near", "far"]
    assert record.variants[0].size_bytes is None


def test_the_harnesss_files_of_choices_are_read_by_arrow(folders):
    (path,) = folders["near"].glob("samples_ends_*.jsonl")
    fast, slow = _read_choices(path, next(_lines(path))), _read_lines(path)
    for one, other in zip(fast, slow, strict=True):
        assert (one.filter, one.metrics, one.targets) == (other.filter, other.metrics, other.targets)
        assert (one.items == other.items).all()
        assert (one.loglikelihoods == other.loglikelihoods).all()
        assert one.hashes["prompt_hash"].tolist() == other.hashes["prompt_hash"].tolist()


def test_means_are_the_harnesss_own_figures(imported, folders):
    """Accuracy, and the perplexities, which the harness makes of all items together: exp of what is stored here."""
    run, theirs = qeval.load(imported), folders["means"]
    assert run.metric("far", "ends_acc").value == pytest.approx(theirs["ends"]["acc,none"])
    assert run.metric("far", "ends_acc_norm").value == pytest.approx(theirs["ends"]["acc_norm,none"])
    nats = run.metric("far", "last_perplexity_score").value
    assert np.exp(nats) == pytest.approx(theirs["last"]["perplexity,none"], rel=1e-6)
    nats = run.metric("far", "pages_word_perplexity_score").value
    assert np.exp(nats) == pytest.approx(theirs["pages"]["word_perplexity,none"], rel=1e-6)
    exact = run.metric("far", "written_exact_match_strict_score").value
    assert exact == theirs["written"]["exact_match,strict"]


def test_the_verdict_is_that_of_qevals_own_rows(imported, folders, models, tmp_path, monkeypatch):
    """The same models and questions, scored by qeval itself: every figure, bound and outcome is the same."""
    manager = TaskManager(include_path=folders["root"], include_defaults=False)
    monkeypatch.setattr(harness_tasks, "task_index", lambda: manager)
    suite = harness.load_suite(
        "ends", tokenizer(), max_length=256, bos="auto", shots=0, limit=None, folder=None, subjects=()
    )
    store = RowStore(tmp_path)
    backend = read_run(imported).variants[0].backend
    shards = []
    for name, model in models.items():
        scores = score_questions(TorchSession(model), suite.questions, 2000, lambda done: None)
        columns = item_columns(suite, suite.questions, scores, name, backend)
        shards.append(store.write("items", name, columns))
    store.keep_only({"tokens": [], "items": shards, "drift": [], "scores": []})
    write_run(tmp_path, read_run(imported).model_copy(update={"scores": []}))
    reseal(tmp_path)

    mine, foreign = (judge(folder, policy(*RULES)) for folder in (tmp_path, imported))
    assert [v.outcome for v in mine.variants] == [v.outcome for v in foreign.variants]
    assert mine.exit_code == foreign.exit_code
    for own, other in zip(mine.variants, foreign.variants, strict=True):
        for rule, same in zip(own.rules, other.rules, strict=True):
            assert (rule.outcome, rule.n, rule.clusters) == (same.outcome, same.n, same.clusters)
            assert (rule.value, rule.low, rule.high) == pytest.approx((same.value, same.low, same.high), abs=1e-4)
    assert len({rule.outcome for v in mine.variants for rule in v.rules}) > 1  # the rules tell something apart


def test_samples_that_python_wrote_with_numbers_for_texts_are_read_alike(folders, imported, tmp_path):
    """Not in the form of the harness's files: log-likelihoods as numbers, targets as indices, no list of metrics."""
    for name in ("baseline", "near"):
        (tmp_path / name).mkdir()
        (path,) = folders[name].glob("samples_ends_*.jsonl")
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        for line in lines:
            line["filtered_resps"] = [[float(ll), greedy == "True"] for ll, greedy in line["filtered_resps"]]
            line["target"] = int(line["target"])
            del line["metrics"]
        (tmp_path / name / "samples_ends.jsonl").write_text("\n".join(map(json.dumps, lines)))
    run = qeval.import_rows([tmp_path / "baseline", tmp_path / "near"], out=tmp_path / "run")
    both = [PairedRun(folder) for folder in (run.folder, imported)]
    rows = [each.items(each.record.tasks[0], each.variant("near")) for each in both]
    assert rows[0].choices == pytest.approx(rows[1].choices, abs=1e-9)
    assert (rows[0].gold == rows[1].gold).all()


def test_right_choices_may_be_told_by_their_text(folders, tmp_path):
    for name in ("baseline", "far"):
        (tmp_path / name).mkdir()
        (path,) = folders[name].glob("samples_ends_*.jsonl")
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        for line in lines:
            line["target"] = line["doc"]["ends"][line["doc"]["right"]]
        (tmp_path / name / path.name).write_text("\n".join(map(json.dumps, lines)))
    run = qeval.import_rows([tmp_path / "baseline", tmp_path / "far"], out=tmp_path / "run")
    assert run.questions("far")["gold"].tolist() == [DOCS[int(item)]["right"] for item in run.questions("far")["item"]]


@pytest.fixture
def edited(folders, tmp_path):
    """Import after the second model's samples of `ends` were edited, line by line; `edit` may return None to drop."""

    def run(edit, **more):
        for name in ("baseline", "near"):
            (tmp_path / name).mkdir()
            (path,) = folders[name].glob("samples_ends_*.jsonl")
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            if name == "near":
                lines = [new for place, line in enumerate(lines) for new in edit(place, line)]
            (tmp_path / name / path.name).write_text("\n".join(map(json.dumps, lines)))
        return qeval.import_rows([tmp_path / "baseline", tmp_path / "near"], out=tmp_path / "run", **more)

    return run


@pytest.mark.parametrize("name", ["doc_hash", "prompt_hash", "target_hash"])
def test_another_prompt_on_one_side_is_refused_and_the_hash_named(edited, name):
    with pytest.raises(UsageError, match=rf"the {name} differs in 1 of 40 items of 'ends', the first 3 of 'ends' \("):
        edited(lambda place, line: [line | ({name: "0" * 64} if place == 3 else {})])


def test_missing_items_are_named_and_counted(edited):
    with pytest.raises(
        UsageError, match=r"2 of 40 items of 'ends' are missing for 'near' \(10 of 'ends', 4 of 'ends'\)"
    ):
        edited(lambda place, line: [] if place in (4, 10) else [line])


def test_doubled_items_are_named_and_counted(edited):
    with pytest.raises(UsageError, match=r"1 items of 'ends' are doubled for 'near' \(7 of 'ends'\)"):
        edited(lambda place, line: [line, line] if place == 7 else [line])


def test_a_metric_of_no_known_direction_must_be_said(edited, tmp_path):
    def odd(place, line):
        return [line | {"metrics": ["oddness"], "oddness": line["acc"]}]

    with pytest.raises(
        UsageError, match=r"Whether more of 'oddness' .* isn't known; say --higher-is-better or --lower"
    ):
        edited(odd)
    shutil.rmtree(tmp_path / "baseline")
    shutil.rmtree(tmp_path / "near")
    with pytest.raises(UsageError, match="'near' has no rows of 'ends', which others have"):
        edited(odd, higher_is_better=True)


def test_samples_of_two_tasks_under_one_name_are_refused(folders, tmp_path):
    (ends,) = folders["near"].glob("samples_ends_*.jsonl")
    (other,) = folders["baseline"].glob("samples_ends_*.jsonl")
    (tmp_path / "near").mkdir()
    (tmp_path / "more").mkdir()
    shutil.copy(ends, tmp_path / "near" / "samples_ends.jsonl")
    lines = [json.loads(line) | {"doc_hash": "f" * 64} for line in ends.read_text().splitlines()]
    (tmp_path / "more" / "samples_ends.jsonl").write_text("\n".join(map(json.dumps, lines)))
    files = [f"baseline={other}", f"near={tmp_path / 'near'}", f"near={tmp_path / 'more'}"]
    with pytest.raises(UsageError, match=r"are of two tasks under one name: item 0 of 'ends' .* has the doc_hash"):
        qeval.import_rows(files, out=tmp_path / "run")


def test_torn_files_and_others_are_refused(tmp_path, folders):
    good = folders["baseline"]
    (tmp_path / "samples_a.jsonl").write_text('{"doc_id": 1')
    with pytest.raises(UsageError, match="line 1, is torn"):
        qeval.import_rows([good, tmp_path / "samples_a.jsonl"], out=tmp_path / "run")
    (tmp_path / "samples_a.jsonl").write_text('{"a": 1}')
    with pytest.raises(UsageError, match="line 1, is no sample of lm-eval's"):
        qeval.import_rows([good, tmp_path / "samples_a.jsonl"], out=tmp_path / "run")
    (tmp_path / "samples_a.jsonl").write_text("")
    with pytest.raises(UsageError, match="holds no sample"):
        qeval.import_rows([good, tmp_path / "samples_a.jsonl"], out=tmp_path / "run")


def test_metrics_of_a_whole_corpus_beside_others_are_named(folders, tmp_path):
    files = []
    for name in ("baseline", "near"):
        (path,) = folders[name].glob("samples_ends_*.jsonl")
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        for line in lines:  # as lm-eval keeps BLEU's: what it is made of at the end
            line |= {"metrics": [*line["metrics"], "bleu"], "bleu": [["a reference"], "an answer"]}
        files.append(tmp_path / f"{name}" / "samples_ends.jsonl")
        files[-1].parent.mkdir()
        files[-1].write_text("\n".join(map(json.dumps, lines)))
    run = qeval.import_rows(files, out=tmp_path / "run")
    (note,) = [each for each in run.report.warnings if "left out" in each]
    assert note.startswith("ends: bleu left out, since lm-eval has no value of it for each item")
    plain = qeval.import_rows([folders["baseline"], folders["near"]], out=tmp_path / "plain")
    assert not [each for each in plain.report.warnings if "left out" in each]

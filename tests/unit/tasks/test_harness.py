"""Any other task of lm-evaluation-harness: read from its YAML, rendered by it, scored as its own `hf` model does."""

import json

import pytest
import yaml
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from qeval.backends.torch import TorchSession
from qeval.errors import UsageError
from qeval.score.choices import item_columns, score_questions
from qeval.tasks import harness, harness_tasks
from tests.fixtures.endings import ENDS, stories
from tests.fixtures.tiny import tiny_llama, tiny_tokenizer

ROWS = stories(12)
TASKS = {
    "tiny_ends": ENDS,
    "tiny_drawn": ENDS | {"num_fewshot": 2, "fewshot_split": "train"},
    "tiny_starts": ENDS  # every choice is a context of its own, and the continuation is shared
    | {
        "doc_to_text": "right",
        "doc_to_choice": "{{[start + ends[0], start + ends[1], start + ends[2]]}}",
        "doc_to_target": " then.",
    },
    "tiny_written": {"output_type": "generate_until", "doc_to_text": "start", "doc_to_target": "right"},
}


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    """The harness knows TASKS and nothing else; their data are json files."""
    (tmp_path / "rows.json").write_text("\n".join(json.dumps(row) for row in ROWS))
    files = {"train": str(tmp_path / "rows.json"), "test": str(tmp_path / "rows.json")}
    data = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": files, "cache_dir": str(tmp_path / "cache")},
        "test_split": "test",
    }
    for name, config in TASKS.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **data, **config}))
    manager = TaskManager(include_path=tmp_path, include_defaults=False)
    monkeypatch.setattr(harness_tasks, "task_index", lambda: manager)


def load(name, **changes):
    made = tiny_tokenizer()
    made.eos_token = "~"
    arguments = {"max_length": 256, "bos": "auto", "shots": 5, "limit": 4, "folder": None, "subjects": ()}
    return harness.load_suite(name, made, **(arguments | changes))


@pytest.mark.parametrize("name", ["tiny_ends", "tiny_drawn", "tiny_starts"])
def test_scores_and_judgements_are_the_harnesss_own(tasks, name):
    model = tiny_llama()
    suite = load(name)
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = "~"
    reference = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1)
    task = harness_tasks.task_index().load([name])["tasks"][name]
    task.set_fewshot_seed(1234)  # simple_evaluate's default
    task.build_all_requests(limit=4)
    expected = reference.loglikelihood(task.instances, disable_tqdm=True)
    scores = score_questions(TorchSession(model), suite.questions, 100, lambda done: None)
    assert [ll for found in scores for ll, _ in found] == pytest.approx([ll for ll, _ in expected], abs=1e-4)
    columns = item_columns(suite, suite.questions, scores, "baseline", "torch")
    for index, doc in enumerate(ROWS[:4]):
        judged = task.process_results(doc, expected[index * 3 : index * 3 + 3])
        assert (columns["acc"][index], columns["acc_norm"][index]) == (judged["acc"], judged["acc_norm"])
        assert columns["gold"][index] == doc["right"]
    assert (suite.info.source, suite.info.choices, suite.info.items) == ("hub", 3, 4)
    assert suite.info.title == f"{name} {2 if name == 'tiny_drawn' else 0}-shot"


def test_drawn_examples_are_the_same_every_time(tasks):
    assert load("tiny_drawn").questions == load("tiny_drawn").questions
    assert load("tiny_drawn").questions[0].shots == 2


def test_drawn_examples_are_the_same_for_every_tokenizer_that_a_task_is_encoded_with(tasks):
    data, tokenizer = harness.load_task("tiny_drawn", shots=5, folder=None, subjects=()), tiny_tokenizer()
    tokenizer.eos_token = "~"
    once, again = (harness.encode_task(data, tokenizer, max_length=256, bos="auto", limit=4) for _ in range(2))
    assert once.questions == again.questions


def test_what_cannot_be_scored_is_refused(tasks):
    with pytest.raises(UsageError, match="Task 'tiny_written' asks for generate_until"):
        load("tiny_written")
    with pytest.raises(UsageError, match="Unknown task 'tiny_end'; nearest: tiny_ends"):
        load("tiny_end")
    with pytest.raises(UsageError, match="Question 0 of tiny_drawn takes more tokens than the model's context of 30"):
        load("tiny_drawn", max_length=30)

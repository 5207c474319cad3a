"""`qeval compare` on tasks without choices, end to end: rows, report, gate, card, explain, and every refusal."""

import json
from pathlib import Path

import pytest
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, AutoTokenizer

from qeval.cli.app import run_program
from qeval.gate.judge import judge
from qeval.gate.policy import policy_from
from qeval.report import build_report
from qeval.report.card.results import metadata
from qeval.report.card.section import card_section
from qeval.report.explain import build_explanation
from qeval.results import load_run
from qeval.stats.flips import mcnemar
from qeval.store.rows import RowStore
from qeval.store.run import read_run
from tests.fixtures.bench import Bench, row_files
from tests.fixtures.chat import TEMPLATE, set_template
from tests.fixtures.sums import LAST_WORDS, SUMS, TEXTS, sums, write_task

FLEXIBLE = "tiny_sums_exact_match_flexible_extract"
STRICT = "tiny_sums_exact_match_strict_match"
VARIANT = "rtn:int2-g32"
ITEMS = 10


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """One run of three tasks; half of the sums' right answers are what the baseline says."""
    place = Bench(tmp_path_factory.mktemp("tasks"))
    tokenizer = AutoTokenizer.from_pretrained(place.model)
    tokenizer.eos_token = "~"
    tokenizer.save_pretrained(place.model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QEVAL_HOME", str(place.folder / "home"))
        write_task(place.folder, "tiny_sums", SUMS, ITEMS)
        assert compare(place, "tiny_sums", out=str(place.folder / "first")) == 0
        said = {row["item"]: row["answer"] for row in scores_of(place.folder / "first", FLEXIBLE)}
        data = sums(ITEMS)
        for item in range(0, ITEMS, 2):
            data[item]["answer"] = f"#### {said[str(item)]}"
        for name, config in (("tiny_sums", SUMS), ("tiny_words", LAST_WORDS), ("tiny_texts", TEXTS)):
            write_task(place.folder, name, config, ITEMS)
        (place.folder / "sums.json").write_text("\n".join(json.dumps(row) for row in data))
        assert compare(place, "tiny_sums", "tiny_words", "tiny_texts") == 0
        yield place


def compare(place: Bench, *names: str, **changed: str | None) -> int:
    tasks = ",".join(str(place.folder / f"{name}.yaml") for name in names)
    return place.compare("--quiet", "--offline", **{"tasks": tasks, "methods": VARIANT, "corpus": None, **changed})


def scores_of(out: Path, score: str, variant: str = "baseline"):
    return [
        row for row in RowStore(out).read("scores").to_pylist() if (row["task"], row["variant"]) == (score, variant)
    ]


def test_each_item_keeps_its_answer_text_and_its_scores_as_lm_eval_gives_them(bench):
    model = AutoModelForCausalLM.from_pretrained(bench.model, dtype=torch.float32)
    lm = HFLM(pretrained=model, tokenizer=AutoTokenizer.from_pretrained(bench.model), batch_size=1)
    (task,) = TaskManager(include_defaults=False).load([str(bench.folder / "tiny_sums.yaml")])["tasks"].values()
    task.build_all_requests()
    texts = lm.generate_until(task.instances, disable_tqdm=True)
    for instance, text in zip(task.instances, texts, strict=True):
        instance.resps.append(text)
    task.apply_filters()
    for score, name in ((FLEXIBLE, "flexible-extract"), (STRICT, "strict-match")):
        found = {int(row["item"]): row for row in scores_of(bench.out, score)}
        for place, (instance, text) in enumerate(zip(task.instances, texts, strict=True)):
            left = instance.filtered_resps[name]
            assert (found[place]["response"], found[place]["answer"]) == (text, left)
            assert found[place]["score"] == task.process_results(instance.doc, [left])["exact_match"]


def test_the_report_pairs_scores_and_counts_flips(bench):
    report = build_report(bench.out)
    assert [score.name for score in report.scores] == [
        STRICT, FLEXIBLE, "tiny_words_perplexity", "tiny_words", "tiny_texts_word_perplexity",
        "tiny_texts_bits_per_byte",
    ]  # fmt: skip
    assert [score.unit for score in report.scores] == ["fraction", "fraction", "nats", "fraction", "nats", "nats"]
    assert report.metrics_asked == ["tiny_sums", "tiny_words", "tiny_texts"]
    before, after = (
        {row["item"]: row["score"] for row in scores_of(bench.out, FLEXIBLE, name)} for name in ("baseline", VARIANT)
    )
    (variant,) = report.variants
    down = sum(before[item] > after[item] for item in before)
    up = sum(before[item] < after[item] for item in before)
    assert down > 0
    assert variant.metrics[f"{FLEXIBLE}_right_to_wrong"].value == down / ITEMS
    assert variant.metrics[f"{FLEXIBLE}_flips"].value == (down + up) / ITEMS
    flips = variant.score_flips[FLEXIBLE]
    assert (flips.right_to_wrong, flips.wrong_to_right) == (down, up)
    assert (flips.p, flips.p_adjusted) == (mcnemar(down, up),) * 2
    cut = [row["is_cut"] for row in scores_of(bench.out, FLEXIBLE, VARIANT)]
    assert variant.metrics[f"{FLEXIBLE}_cut"].value == sum(cut) / ITEMS
    assert sum(cut) > 0
    assert "tiny_words_perplexity" not in variant.score_flips
    page = (bench.out / "report.html").read_text()
    assert "greedy answers of at most 24 tokens" in page
    assert "Tasks by score" in page


def test_scores_are_a_table_with_both_sides_texts(bench):
    table = load_run(bench.out).scores(VARIANT)
    own = table[table["score"] == FLEXIBLE].set_index("item")
    for row in scores_of(bench.out, FLEXIBLE, VARIANT):
        found = own.loc[row["item"]]
        assert (found["value"], found["answer"], found["response"]) == (row["score"], row["answer"], row["response"])
    for row in scores_of(bench.out, FLEXIBLE):
        assert own.loc[row["item"]]["baseline_response"] == row["response"]


def test_gates_bound_the_loss_of_a_score(bench):
    def verdict(**rule):
        return judge(bench.out, policy_from({"name": "p", "rules": [rule]}, "p"))

    assert verdict(metric=f"{FLEXIBLE}_acc_drop", at_most="1 points").exit_code == 1
    assert verdict(metric=f"{FLEXIBLE}_flips", at_most="100 %").exit_code == 0
    assert verdict(metric="tiny_texts_word_perplexity_score_loss", at_most="100 units").exit_code == 0
    broken = verdict(metric="tiny_sums_acc_drop", at_most="1 points")
    assert broken.exit_code == 3
    assert f"limit one of {STRICT}, {FLEXIBLE}" in str(broken.variants[0])


def test_explain_shows_both_texts_of_an_answer_that_flipped(bench, capsys):
    explanation = build_explanation(bench.out, VARIANT)
    (flexible,) = [each for each in explanation.answers if each.name == FLEXIBLE]
    first = flexible.changed[0]
    assert first.went == "right_to_wrong"
    before, after = (
        {row["item"]: row for row in scores_of(bench.out, FLEXIBLE, name)} for name in ("baseline", VARIANT)
    )
    assert (first.baseline_response, first.variant_response) == (
        before[first.item]["response"], after[first.item]["response"],
    )  # fmt: skip
    assert first.question == f"Q: {sums(ITEMS)[int(first.item)]['question']}\nA:"
    assert run_program(["explain", str(bench.out), VARIANT]) == 0
    assert f"{flexible.flips.right_to_wrong} of {ITEMS} answers went from right to wrong" in capsys.readouterr().out


def test_the_card_holds_scores_and_flips(bench):
    report = build_report(bench.out)
    section = card_section(report, {})
    assert "### tiny" in section
    assert "answers that flipped" in section
    kinds = [each.metric_type for each in metadata(report, report.variants).eval_results or []]
    assert kinds.count("flips") == 3


def test_a_finished_run_scores_nothing_again_and_another_judgement_scores_anew(bench):
    before = row_files(bench.out)
    assert compare(bench, "tiny_sums", "tiny_words", "tiny_texts") == 0
    assert row_files(bench.out) == before
    write_task(bench.folder, "tiny_strict", SUMS | {"task": "tiny_sums", "filter_list": SUMS["filter_list"][:1]}, ITEMS)
    out = bench.folder / "strict"
    assert compare(bench, "tiny_strict", out=str(out)) == 0
    assert not {Path(name).name for name in before if "parquet" in name} & {
        path.name for path in out.rglob("*.parquet")
    }


def test_prompts_under_the_chat_template_are_recorded_with_it(bench, tmp_path, capsys):
    assert compare_chat(bench, tmp_path) == 2
    assert "has no chat template" in capsys.readouterr().err
    set_template(bench.model, TEMPLATE)
    try:
        assert compare_chat(bench, tmp_path, system_instruction="Be brief.") == 0
    finally:
        set_template(bench.model, None)
    task = read_run(tmp_path).scores[0].task
    assert task is not None
    assert (len(task.chat_template or ""), task.multiturn, task.system) == (64, True, "Be brief.")
    assert read_run(tmp_path).witness != read_run(bench.out).witness


def compare_chat(place: Bench, out: Path, **changed: str) -> int:
    tasks = str(place.folder / "tiny_sums.yaml")
    flags = place.arguments(tasks=tasks, methods=VARIANT, corpus=None, out=str(out), **changed)
    return run_program(["compare", *flags, "--quiet", "--offline", "--apply-chat-template"])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"backend": "torch,ort"}, "generates answers, which the backend torch does alone"),
        ({"fewshot_as_multiturn": "false"}, "--fewshot-as-multiturn is for --apply-chat-template"),
        ({"fewshot_as_multiturn": "maybe"}, "maybe"),
    ],
)
def test_what_does_not_fit_together_is_refused(bench, tmp_path, capsys, flags, words):
    assert compare(bench, "tiny_sums", out=str(tmp_path / "none"), **flags) == 2
    assert words in capsys.readouterr().err


def test_streaming_and_early_stops_are_refused_where_answers_are_generated(bench, tmp_path, capsys):
    flags = bench.arguments(tasks=str(bench.folder / "tiny_sums.yaml"), methods=VARIANT, corpus=None, out=str(tmp_path))
    assert run_program(["compare", *flags, "--offline", "--stream"]) == 2
    assert "would read every layer for each" in capsys.readouterr().err

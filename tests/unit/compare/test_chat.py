"""`--corpus chat`: the baseline's answers against transformers, what is scored of them, and every refusal."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qeval.backends.generation import Generation
from qeval.errors import QevalError
from qeval.gate.bounded_metrics import Figures
from qeval.gate.policy import policy_from
from qeval.gate.sequential import Drawn, look
from qeval.report import build_report
from qeval.report.card.results import metadata
from qeval.report.card.section import card_section
from qeval.report.run_rows import PairedRun
from qeval.store.rows import RowStore
from qeval.store.run import read_run
from qeval.store.texts import read_texts
from tests.fixtures.bench import Bench, refusing, row_differences
from tests.fixtures.chat import PROMPTS, TEMPLATE, THINKING, chat_flags, set_template, write_prompts
from tests.fixtures.runs import make_run

TOKENS = 12


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """A model with a chat template, and prompts; one run of chat and a text lies in `out`."""
    place = Bench(tmp_path_factory.mktemp("chat"))
    set_template(place.model, TEMPLATE)
    write_prompts(place.folder / "prompts.jsonl")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QEVAL_HOME", str(place.folder / "home"))
        flags = flags_of(place, corpus=f"chat,{place.corpus}", tasks="kl,ppl,drift", window="64")
        assert place.compare("--quiet", **flags, drift_prompts="3", drift_tokens="6") == 0
        yield place


@pytest.fixture(scope="module")
def alone(bench):
    """The folder of a run of chat alone."""
    assert bench.compare("--quiet", **flags_of(bench), out=str(bench.folder / "alone")) == 0
    return bench.folder / "alone"


def flags_of(bench: Bench, **changed: str | None) -> dict[str, str | None]:
    return chat_flags(bench.folder / "prompts.jsonl", **changed)


def rows_of(out: Path, variant: str) -> list[dict[str, Any]]:
    return [row for row in RowStore(out).read("tokens").to_pylist() if row["variant"] == variant]


def chat_of(out: Path) -> Any:
    chat = read_run(out).protocol.chat
    assert chat is not None
    return chat


def test_the_answers_are_those_of_transformers_and_their_tokens_alone_are_scored(bench):
    model = AutoModelForCausalLM.from_pretrained(bench.model, dtype=torch.float32).requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(bench.model)
    texts = [f"<user>{PROMPTS[0]['messages'][0]['content']};<assistant>", "<user>Was ist 2+2?;<assistant>"]
    for window, text in enumerate(texts):
        asked = tokenizer(text, return_tensors="pt")["input_ids"]
        whole = model.generate(asked, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False)[0]
        log_p = torch.log_softmax(model(whole[None]).logits[0].double(), dim=-1)

        first = asked.shape[1]
        rows = [row for row in rows_of(bench.out, "baseline") if row["window"] == window]
        scored = {row["position"]: row for row in rows if row["nll"] is not None}
        assert sorted(scored) == list(range(first, first + TOKENS))
        for place, row in scored.items():
            assert row["token"] == whole[place]
            assert row["nll"] == pytest.approx(-float(log_p[place - 1, whole[place]]), abs=1e-4)
        theirs = [row for row in rows_of(bench.out, "rtn:g32") if row["window"] == window]
        compared = sorted(row["position"] for row in theirs if row["kl_nats"] is not None)
        assert compared == list(range(first - 1, first + TOKENS - 1))


def test_a_second_turn_is_asked_with_the_first_answer_and_both_are_one_cluster(bench):
    answers = [answer for answer in chat_of(bench.out).answers if answer.prompt == 2]
    assert len(answers) == 2
    texts = read_texts(bench.out)
    first, second = (texts.window(answer.window) for answer in answers)
    said = "".join(first.texts[answers[0].first :]).strip()
    asked = "".join(second.texts[: answers[1].first])
    assert asked == f"<user>Add 1 and 1;<assistant>{said};<user>And 5?;<assistant>"
    assert bench.report()["variants"][0]["metrics"]["chat_kl_nats"]["clusters"] == len(PROMPTS)


def test_chat_stands_beside_the_text(bench):
    report = build_report(bench.out)
    (variant,) = report.variants
    assert list(variant.by_corpus) == ["chat", "corpus.txt", "macro"]
    assert variant.by_corpus["chat"]["kl_nats"] == variant.metrics["chat_kl_nats"]
    rows = [row for row in rows_of(bench.out, "rtn:g32") if row["window"] < 5 and row["kl_nats"] is not None]
    assert variant.metrics["chat_kl_nats"].value == pytest.approx(sum(row["kl_nats"] for row in rows) / len(rows))
    kinds = {group.name: group.metrics["kl_nats"].n for group in variant.chat if group.by == "kind"}
    assert kinds == {"greeting": TOKENS, "sum": 3 * TOKENS, "other": TOKENS}
    page = (bench.out / "report.md").read_text(encoding="utf-8")
    assert "## Chat" in page
    assert "5 of 5 answers reached the limit of 12 tokens" in page


def test_gates_and_cards_have_the_answers_alone(bench):
    run, report = PairedRun(bench.out), build_report(bench.out)
    (variant,) = report.variants
    figures = Figures(run, run.variant("rtn:g32"))
    for metric in ("chat_kl_nats", "chat_top1_agreement"):
        figure = figures.of(metric)
        assert figure.value == pytest.approx(variant.metrics[metric].value)
        assert (figure.clusters, figure.bounded.mean.clusters) == ("conversations", len(PROMPTS))
    assert figures.of("chat_ppl_increase").value == pytest.approx(variant.metrics["chat_ppl_ratio"].value - 1)
    assert figures.of("kl_nats").value != figures.of("chat_kl_nats").value

    results = {each.metric_name: each for each in metadata(report, [variant]).eval_results}
    shown = results["KL, nats, on the baseline's answers, rtn:g32"]
    assert (shown.dataset_type, shown.metric_value) == ("chat", variant.metrics["chat_kl_nats"].value)
    assert "### Chat" in card_section(report, [])


def test_a_gate_that_may_stop_early_draws_answers_alone_or_refuses(bench, alone):
    rules = [{"metric": metric, "at_most": "0.5 nats"} for metric in ("chat_kl_nats", "kl_nats")]
    policy = policy_from({"name": "p", "rules": rules}, "p")
    both, answers = PairedRun(bench.out), PairedRun(alone)
    windows = tuple(range(answers.protocol.windows))
    conversations = dict(zip(windows, (0, 1, 2, 2, 4), strict=True))
    drawn = Drawn(windows, len(windows), {}, {}, conversations)
    of_answers, of_all = look(answers, answers.done[0], policy, drawn)
    assert (of_answers.outcome, of_answers.value) == (of_all.outcome, of_all.value)
    refused, _ = look(both, both.done[0], policy, Drawn(tuple(range(9)), 9, {}, {}, {n: n for n in range(9)}))
    assert refused.outcome == "broken"
    assert "draw from --corpus chat alone" in refused.why


def test_a_run_without_answers_has_no_such_figure(tmp_path):
    run = PairedRun(make_run(tmp_path))
    with pytest.raises(QevalError, match="run it again with --corpus chat"):
        Figures(run, run.done[0]).of("chat_kl_nats")


def test_continuations_are_of_the_prompts_under_the_template(bench):
    drift = read_run(bench.out).drift
    assert (drift.corpus, drift.prompts, drift.prompt_tokens, drift.generated) == ("chat", 3, 30, 6)
    rows = RowStore(bench.out).read("drift").to_pylist()
    answers = {row["window"]: [] for row in rows_of(bench.out, "baseline")}
    for row in rows_of(bench.out, "baseline"):
        if row["nll"] is not None:
            answers[row["window"]].append(row["token"])
    said = [row["token"] for row in rows if row["variant"] == "baseline" and row["prompt"] == 1]
    assert said == answers[1][:6]  # greedy answers begin as greedy continuations do


def test_answers_are_generated_once(bench, alone, tmp_path, monkeypatch):
    monkeypatch.setattr(Generation, "run", lambda *_, **__: pytest.fail("an answer was generated again"))
    assert bench.compare("--quiet", **flags_of(bench), out=str(tmp_path / "again")) == 0
    assert row_differences(tmp_path / "again", alone) == []


def test_samples_go_by_the_seed_and_batches_change_none(bench, tmp_path, monkeypatch):
    found = []
    for name, seed, batch in (("a", "0", "4096"), ("b", "0", "40"), ("c", "1", "40")):
        monkeypatch.setenv("QEVAL_HOME", str(tmp_path / f"home-{name}"))
        flags = flags_of(bench, chat_temperature="0.9", seed=seed, batch_tokens=batch, tasks="ppl")
        assert bench.compare("--quiet", **flags, out=str(tmp_path / name)) == 0
        found.append([row["token"] for row in rows_of(tmp_path / name, "baseline")])
    assert found[0] == found[1] != found[2]


def test_the_template_is_part_of_the_token_hash(bench, alone, tmp_path):
    """The same tokens under a template of other text are other prompts: what it does elsewhere may differ."""
    template = tmp_path / "mine.jinja"
    template.write_text(TEMPLATE + "{# no change #}", encoding="utf-8")
    assert bench.compare("--quiet", **flags_of(bench, template=str(template)), out=str(tmp_path / "mine")) == 0
    own, mine = read_run(alone), read_run(tmp_path / "mine")
    assert own.protocol.chat.answers == mine.protocol.chat.answers
    assert own.witness != mine.witness
    assert own.protocol.tokens_sha256 != mine.protocol.tokens_sha256
    assert mine.protocol.chat.template == "mine.jinja"


def test_thinking_is_told_apart_by_the_templates_markers(bench, tmp_path):
    template = tmp_path / "thinks.jinja"
    template.write_text(THINKING, encoding="utf-8")
    assert bench.compare("--quiet", **flags_of(bench, template=str(template)), out=str(tmp_path / "out")) == 0
    for answer in chat_of(tmp_path / "out").answers:
        assert answer.final == answer.first + TOKENS  # none of these answers ends its thinking


def test_an_answer_ends_with_its_stop_token(bench, tmp_path):
    """The template ends a turn with the EOS that the tokenizer names: the token that the model says fourth."""
    rows = [row for row in rows_of(bench.out, "baseline") if row["window"] == 0 and row["nll"] is not None]
    tokens = [row["token"] for row in sorted(rows, key=lambda row: row["position"])]
    folder = Bench(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folder.model)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(tokens[3])
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder.model)
    assert folder.compare("--quiet", **flags_of(bench), out=str(folder.out)) == 0
    answer = chat_of(folder.out).answers[0]
    assert answer.ended
    said = [row for row in rows_of(folder.out, "baseline") if row["window"] == 0 and row["nll"] is not None]
    assert len(said) == tokens.index(tokens[3]) + 1


NO_TOOL = {"messages": PROMPTS[0]["messages"], "tools": [{"type": "function", "function": {"parameters": {}}}]}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([json.dumps(PROMPTS[0]), '{"messages": ['], r"prompts\.jsonl, line 2 is not valid JSON"),
        ([json.dumps({"prompt": "hi"})], r"prompts\.jsonl, line 1 holds no prompt"),
        ([json.dumps(PROMPTS[0]), json.dumps(NO_TOOL)], r"line 2: tool 1 is none: its function has no name"),
        ([json.dumps({"messages": [{"role": "user", "content": "x" * 600}]})], r"line 1 is 618 tokens long under"),
        ([], r"'.*prompts\.jsonl' is empty"),
    ],
)
def test_prompts_that_are_none_are_refused(bench, tmp_path, capfd, lines, message):
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    refused = refusing(bench, tmp_path / "out", capfd)
    assert re.search(message, refused(**flags_of(bench, prompts=str(path))))


@pytest.mark.parametrize(
    ("more", "changed", "message"),
    [
        ((), {"window": "64"}, "has a window for each answer, whatever its length; leave --window out"),
        (("--stream",), {}, "--stream would read every layer for each"),
        ((), {"corpus": "pydoc"}, "are for --corpus chat"),
        ((), {"prompts": "absent.jsonl"}, "--prompts absent.jsonl: no such file"),
        ((), {"template": "absent.jinja"}, "--template absent.jinja: no such file"),
        ((), {"chat_tokens": "500"}, "has no room for an answer of 500"),
    ],
)
def test_what_chat_can_not_do_is_refused(bench, tmp_path, capfd, more, changed, message):
    refused = refusing(bench, tmp_path / "out", capfd)
    assert message in refused(*more, **flags_of(bench, **changed))


def test_a_model_without_a_template_is_refused_and_one_from_a_file_helps(tmp_path, bench, capfd, monkeypatch):
    monkeypatch.setenv("QEVAL_HOME", str(tmp_path / "home"))
    plain = Bench(tmp_path)
    refused = refusing(plain, tmp_path / "no", capfd)
    assert "has no chat template" in refused(**flags_of(bench))
    template = tmp_path / "mine.jinja"
    template.write_text("{% for m in messages %}{{ m.nothing.at_all }}{% endfor %}", encoding="utf-8")
    assert "--template mine.jinja can't be used for" in refused(**flags_of(bench, template=str(template)))
    template.write_text(TEMPLATE, encoding="utf-8")
    assert plain.compare("--quiet", **flags_of(bench, template=str(template))) == 0


def test_tools_that_no_template_takes_and_languages_in_bytes_are_told(bench, tmp_path):
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
    rows = (
        {"language": "zh", "messages": [{"role": "user", "content": "你好吗"}]},
        {"messages": PROMPTS[0]["messages"], "tools": tools},
    )
    prompts, template = write_prompts(tmp_path / "p.jsonl", rows), tmp_path / "plain.jinja"
    template.write_text(TEMPLATE.replace("{% if tools %}{{ tools | tojson }}{% endif %}", ""), encoding="utf-8")
    out = tmp_path / "out"
    flags = flags_of(bench, prompts=str(prompts), template=str(template), out=str(out))
    assert bench.compare("--quiet", **flags) == 0
    notes = " ".join(build_report(out).notes)
    assert "prompts with tools are left out (1 of them)" in notes
    assert "breaks characters of zh (100 %)" in notes

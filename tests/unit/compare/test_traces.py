"""`--tasks reasoning` and `grammar` on a tiny model: against a plain loop, against sampled calls, every refusal."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qeval.cli.app import run_program
from qeval.compare.answers import Answerer
from qeval.errors import BrokenRecordError
from qeval.gate.bounded_metrics import Figures
from qeval.report import build_report
from qeval.report.card.results import metadata
from qeval.report.card.section import card_section
from qeval.report.run_rows import PairedRun
from qeval.report.trace_rows import pair_traces, trace_rows
from qeval.store.rows import RowStore
from qeval.store.run import read_run
from tests.fixtures.chat import set_template
from tests.fixtures.traces import HEAD, TEMPLATE, THINKING, WIDTH, call_prompt, save_caller, write_lines

QUESTIONS = [
    {"question": "1 + 1?", "answer": "7"},
    {"question": "2?", "answer": "12"},
    {"question": "x", "answer": "3"},
]
LIMIT, CALL_LIMIT, CALLS = 24, 16, 20
PROMPTS = [call_prompt("Add 1"), call_prompt("Hey"), {"messages": [{"role": "user", "content": "No tools"}]}]


class Place:
    """A folder with a model, questions and prompts, and `qeval compare` on them."""

    def __init__(self, folder: Path, template: str) -> None:
        self.folder, self.model = folder, save_caller(folder / "model", template)
        self.questions = write_lines(folder / "q.jsonl", QUESTIONS)
        self.prompts = write_lines(folder / "p.jsonl", PROMPTS)

    def compare(self, tasks: str, *more: str, out: str = "out") -> int:
        return run_program(
            ["compare", "--model", str(self.model), "--methods", "rtn:int3-g32", "--tasks", tasks, "--device", "cpu",
             "--offline", "--quiet", "--threads", "1", "--out", str(self.folder / out), *more]
        )  # fmt: skip

    def rows(self, out: str, variant: str) -> list[dict[str, Any]]:
        return [row for row in RowStore(self.folder / out).read("traces").to_pylist() if row["variant"] == variant]


@pytest.fixture(scope="module")
def thoughts(tmp_path_factory):
    """A run of chains of thought of a model whose template begins to think."""
    place = Place(tmp_path_factory.mktemp("thoughts"), THINKING)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QEVAL_HOME", str(place.folder / "home"))
        more = ("--reasoning-questions", str(place.questions), "--reasoning-tokens", str(LIMIT))
        assert place.compare("reasoning", *more) == 0
        yield place


@pytest.fixture(scope="module")
def calls(tmp_path_factory):
    """A run of calls of functions, many a prompt."""
    pytest.importorskip("llguidance", reason="masks of grammars take llguidance")
    place = Place(tmp_path_factory.mktemp("calls"), TEMPLATE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QEVAL_HOME", str(place.folder / "home"))
        more = ("--prompts", str(place.prompts), "--chat-tokens", str(CALL_LIMIT), "--grammar-calls", str(CALLS))
        assert place.compare("grammar", *more) == 0
        yield place


def test_every_row_is_that_of_a_plain_loop(thoughts):
    model = AutoModelForCausalLM.from_pretrained(thoughts.model, dtype=torch.float32).requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(thoughts.model)
    (end,), eos = tokenizer.encode("</think>", add_special_tokens=False), tokenizer.eos_token_id
    doubt = [tokenizer.encode(text, add_special_tokens=False)[0] for text in ("Wait", " Wait", "Hmm")]
    for item, question in enumerate(QUESTIONS):
        text = f"<user>{question['question']}\n\nReason step by step, and end with: The answer is ...;<think>"
        ids = tokenizer.encode(text, add_special_tokens=False)
        chain: list[int] = []
        while len(chain) < LIMIT and (not chain or chain[-1] not in (end, eos)):
            chain.append(int(model(torch.tensor([ids + chain])).logits[0, -1].argmax()))
        closed = end in chain
        chain = [token for token in chain if token != eos]
        cue = "\n\nThe answer is" if closed else "\n</think>\n\nThe answer is"
        forced = [
            *(("chain", token) for token in chain),
            *((None, token) for token in tokenizer.encode(cue, add_special_tokens=False)),
            *(("answer", token) for token in tokenizer.encode(" " + question["answer"], add_special_tokens=False)),
        ]
        rows = iter([row for row in thoughts.rows("out", "baseline") if row["item"] == item])
        for piece, token in forced:
            p = torch.softmax(model(torch.tensor([ids])).logits[0, -1].double(), -1)
            ids.append(token)
            if piece is None:
                continue
            row = next(rows)
            assert (row["part"], row["token"], row["pred"]) == (piece, token, int(p.argmax()))
            assert row["matches"] == (token == int(p.argmax()))
            assert row["log_p"] == pytest.approx(math.log(p[token]), abs=1e-4)
            assert row["stop_p"] == pytest.approx(float(p[end] + p[eos]), abs=1e-5)
            assert row["doubt_p"] == pytest.approx(float(p[doubt].sum()), abs=1e-5)
            assert row["leak_p"] is None
            assert row["kl_nats"] is None
        last = next(rows)
        after = tokenizer.decode([int(model(torch.tensor([ids])).logits[0, -1].argmax())])
        assert (last["part"], last["token"], last["matches"]) == ("after", -1, not after[:1].isalnum())
        assert next(rows, None) is None


def test_the_report_the_gate_and_the_card_have_the_chains(thoughts):
    run, report = PairedRun(thoughts.folder / "out"), build_report(thoughts.folder / "out")
    (variant,) = report.variants
    theirs = thoughts.rows("out", "rtn:int3-g32")
    kl = [row["kl_nats"] for row in theirs if row["part"] == "chain"]
    assert variant.metrics["reasoning_kl_nats"].value == pytest.approx(sum(kl) / len(kl))
    assert variant.metrics["reasoning_kl_nats"].clusters == len(QUESTIONS)
    figure = Figures(run, run.variant("rtn:int3-g32")).of("reasoning_kl_nats")
    assert figure.value == pytest.approx(variant.metrics["reasoning_kl_nats"].value)
    assert report.reasoning.doubt == ["Wait", "Hmm"]
    page = (thoughts.folder / "out" / "report.md").read_text(encoding="utf-8")
    assert "## Replayed reasoning" in page
    assert "Wait and Hmm at a token" in page
    assert "### Reasoning and calls of functions" in card_section(report, [])
    assert "reasoning_flips" in json.dumps(metadata(report, list(report.variants)).to_dict())


def test_the_right_answer_stands_behind_the_baselines_own_words_where_it_gives_it(thoughts, monkeypatch):
    """Of two answers "hm</think> It is 12." the second is right; the first question's is asked for."""
    tokenizer = AutoTokenizer.from_pretrained(thoughts.model)
    chain, final = (tokenizer.encode(text, add_special_tokens=False) for text in ("hm</think>", " It is 12."))
    said = (*chain, *final, tokenizer.eos_token_id)
    monkeypatch.setattr(Answerer, "answers", lambda self, prompts, progress: [said for _ in prompts])
    more = ("--reasoning-questions", str(thoughts.questions), "--reasoning-tokens", "50", "--limit", "2")
    assert thoughts.compare("reasoning", *more, out="own") == 0

    record = read_run(thoughts.folder / "own").reasoning
    assert record.in_own_words == 1
    assert [(trace.tokens, trace.ended) for trace in record.traces] == [(len(chain), True)] * 2
    model = AutoModelForCausalLM.from_pretrained(thoughts.model, dtype=torch.float32).requires_grad_(False)
    before = {0: (*chain, *tokenizer.encode("\n\nThe answer is", add_special_tokens=False)), 1: (*chain, *final[:7])}
    for item, answer in ((0, " 7"), (1, "12")):
        rows = [row for row in thoughts.rows("own", "baseline") if (row["item"], row["part"]) == (item, "answer")]
        assert tokenizer.decode([row["token"] for row in rows]) == answer
        asked = f"<user>{QUESTIONS[item]['question']}\n\nReason step by step, and end with: The answer is ...;<think>"
        ids = [*tokenizer.encode(asked, add_special_tokens=False), *before[item]]
        log_p = torch.log_softmax(model(torch.tensor([ids])).logits[0, -1].double(), -1)
        assert rows[0]["log_p"] == pytest.approx(float(log_p[rows[0]["token"]]), abs=1e-4)


def test_without_markers_the_chain_is_the_answer(thoughts):
    set_template(thoughts.model, TEMPLATE)
    more = ("--reasoning-questions", str(thoughts.questions), "--reasoning-tokens", "6", "--limit", "1")
    assert thoughts.compare("reasoning", *more, out="plain") == 0
    set_template(thoughts.model, THINKING)
    record = read_run(thoughts.folder / "plain").reasoning
    assert (record.thinks, record.questions) == (False, 1)
    assert not any("limit" in note for note in build_report(thoughts.folder / "plain").notes)


def test_a_run_is_verified_from_its_record(thoughts):
    assert run_program(["verify", str(thoughts.folder / "out"), "--quiet"]) == 0


def test_the_rate_of_valid_calls_is_that_of_a_thousand_sampled_ones(calls):
    """Sampled without a grammar, judged by Python's own reader of JSON."""
    model = AutoModelForCausalLM.from_pretrained(calls.model, dtype=torch.float32).requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(calls.model)
    record = read_run(calls.folder / "out").grammar
    assert (record.opening, record.prompts, record.prompts_left_out) == ("<call>", 2, 1)
    torch.manual_seed(1)
    valid = []
    for prompt in PROMPTS[:2]:
        text = tokenizer.apply_chat_template(
            prompt["messages"], tools=prompt["tools"], tokenize=False, add_generation_prompt=True
        )
        asked = tokenizer(text + "<call>", return_tensors="pt", add_special_tokens=False)
        valid += [is_valid(tokenizer.decode(each)) for each in sampled(model, asked["input_ids"], 500)]
    rate = sum(valid) / len(valid)

    metric = build_report(calls.folder / "out").baseline.metrics["grammar_valid"]
    spread = 1.96 * math.sqrt(rate * (1 - rate) / len(valid))
    assert 0.05 < rate < 0.95
    assert metric.low - spread < rate < metric.high + spread
    assert metric.n == CALLS * 2


def sampled(model: Any, asked: torch.Tensor, count: int) -> torch.Tensor:
    """Sample what a prompt goes on with, [count, tokens]: no token looks further back than at the one before."""
    following = torch.softmax(model(torch.arange(WIDTH)[:, None]).logits[:, -1].double(), -1)
    said = asked[:, -1:].expand(count, -1)
    for _ in range(CALL_LIMIT):
        said = torch.cat([said, torch.multinomial(following[said[:, -1]], 1)], dim=1)
    return said[:, 1:]


def is_valid(text: str) -> bool:
    """Whether a text begins with a call as its schema has it."""
    try:
        call, _ = json.JSONDecoder().raw_decode(text)
    except ValueError:
        return False
    return (
        isinstance(call, dict)
        and list(call) == ["name", "arguments"]
        and call["name"] == "add"
        and list(call["arguments"]) == ["n"]
        and type(call["arguments"]["n"]) is int
    )


def test_every_sampled_call_is_valid_and_calls_differ(calls):
    tokenizer = AutoTokenizer.from_pretrained(calls.model)
    texts: dict[tuple[int, int], list[int]] = {}
    for row in calls.rows("out", "baseline"):
        texts.setdefault((row["item"], row["draw"]), []).append((row["position"], row["token"]))
    said = {key: tokenizer.decode([token for _, token in sorted(rows)]) for key, rows in texts.items()}
    ended = {(trace.item, trace.draw): trace.ended for trace in read_run(calls.folder / "out").grammar.traces}
    assert all(is_valid(text) for key, text in said.items() if ended[key])
    assert len({text for (item, _), text in said.items() if item == 0}) > 10
    assert all(text.startswith(HEAD) for text in said.values())


def test_the_report_has_the_leak_of_every_model(calls):
    report = build_report(calls.folder / "out")
    (variant,) = report.variants
    leaks = [row["leak_p"] for row in calls.rows("out", "rtn:int3-g32")]
    assert variant.metrics["grammar_leak"].value == pytest.approx(sum(leaks) / len(leaks))
    assert set(variant.metrics) == {"grammar_leak", "grammar_valid", "grammar_valid_diff", "grammar_valid_own"}
    assert "## Grammar leak" in (calls.folder / "out" / "report.md").read_text(encoding="utf-8")
    assert any("1 prompts are left out" in note for note in report.notes)


def test_rows_that_lack_or_are_other_are_named(thoughts):
    run = PairedRun(thoughts.folder / "out")
    table = RowStore(thoughts.folder / "out").read("traces")
    base = table.filter([name == "baseline" for name in table["variant"].to_pylist()])
    with pytest.raises(BrokenRecordError, match=r"'v' has .* rows along the traces of reasoning"):
        trace_rows(base.slice(1), "reasoning", run.record.reasoning, "v")
    rows = run.baseline_traces("reasoning")
    other = trace_rows(base, "reasoning", run.record.reasoning, "v")
    other.tokens[3] += 1
    with pytest.raises(BrokenRecordError, match="'v' was not scored along the baseline's traces"):
        pair_traces(other, rows, "reasoning", "v")


@pytest.mark.parametrize(
    ("tasks", "flags", "reason"),
    [
        ("kl", ("--reasoning-tokens", "5"), "--reasoning-questions and --reasoning-tokens are for --tasks reasoning"),
        ("kl", ("--grammar-calls", "5"), "--grammar-calls is for --tasks grammar"),
        ("kl", ("--chat-tokens", "5"), "for --corpus chat"),
        ("reasoning", ("--reasoning-tokens", "0"), "--reasoning-tokens"),
        ("reasoning", ("--reasoning-tokens", "2000"), "q.jsonl, line 1 takes .* the model's context holds 1,024"),
        ("reasoning", ("--stream",), "--tasks reasoning generates one token after another"),
        ("grammar", ("--prompts", "q.jsonl"), "q.jsonl, line 1 holds no prompt"),
        ("grammar", ("--prompts", "plain.jsonl"), "No prompt of plain.jsonl has tools"),
        ("grammar", ("--prompts", "frog.jsonl"), "frog.jsonl, line 1: the parameters of its tools are no JSON Schema"),
        ("grammar", ("--prompts", "none.jsonl"), "none.jsonl, line 1: tool 1 is none"),
        ("grammar", ("--prompts", "p.jsonl", "--chat-tokens", "1000"), "p.jsonl, line 1 is .* no room for a call"),
        ("grammar", ("--template", "plain.jinja"), "takes no tools"),
    ],
)
def test_bad_input_is_refused(thoughts, monkeypatch, capsys, tasks, flags, reason):
    if tasks == "grammar":
        pytest.importorskip("llguidance", reason="masks of grammars take llguidance")
    monkeypatch.chdir(thoughts.folder)
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    tool["function"]["parameters"]["properties"] = {"x": {"type": "frog"}}
    write_lines(thoughts.folder / "frog.jsonl", [call_prompt("x", tools=[tool])])
    write_lines(thoughts.folder / "none.jsonl", [call_prompt("x", tools=[{"type": "function"}])])
    write_lines(thoughts.folder / "plain.jsonl", PROMPTS[2:])
    (thoughts.folder / "plain.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    more = ("--reasoning-questions", "q.jsonl") if tasks == "reasoning" else ()
    assert thoughts.compare(tasks, *more, *flags, out="bad") == 2
    assert_said(capsys.readouterr().err, reason)


def test_a_model_without_a_template_is_refused(thoughts, capsys):
    set_template(thoughts.model, None)
    assert thoughts.compare("reasoning", "--reasoning-questions", str(thoughts.questions), out="bad") == 2
    set_template(thoughts.model, THINKING)
    assert_said(capsys.readouterr().err, "has no chat template")


def assert_said(text: str, reason: str) -> None:
    assert re.search(reason, " ".join(text.split())), text

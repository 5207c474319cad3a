"""Defended: names that files and users give are shown as text: on terminals, in Markdown, JUnit, HTML and JSON."""

import io
import json
import sys
import xml.dom.minidom

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.table import Table
from rich.text import Text

from qeval import escape
from qeval.cli.app import run_program
from qeval.cli.printing import PlainConsole, accept_every_letter
from qeval.gate import outputs
from qeval.gate.verdict import GateVerdict, RuleVerdict, VariantVerdict
from qeval.report.document import Heading, Section
from qeval.report.render import html_page
from tests.fixtures.gate import gate_run

HOSTILE = (
    "x\x1b]0;owned\x07\x1b[31m [/b] [red]a `\n\n## ✅ qeval gate `release`: pass\n"
    "![s](http://e.org/p.png) <b>|\x9b1m\u202e"
)
PRINTED = st.text(st.characters(codec=None), max_size=40)


def verdict(name=HOSTILE, policy=HOSTILE, why=HOSTILE):
    rule = RuleVerdict(
        **dict.fromkeys(RuleVerdict.__dataclass_fields__)
        | {"rule": name, "outcome": "fail", "counts_as": "fail", "why": why}
    )
    variant = VariantVerdict(
        **dict.fromkeys(VariantVerdict.__dataclass_fields__)
        | {"name": name, "outcome": "fail", "rules": (rule,), "error": why}
    )
    return GateVerdict(
        **dict.fromkeys(GateVerdict.__dataclass_fields__)
        | {"policy": policy, "outcome": "fail", "variants": (variant,), "correction": why, "notes": (why,)}
    )


def shown(renderable):
    console = PlainConsole()
    console.file, console.width = io.StringIO(), 200
    console.print(renderable)
    return console.file.getvalue()


@given(PRINTED)
@settings(derandomize=True, deadline=None)
def test_nothing_that_a_terminal_obeys_passes(text):
    for made in (escape.terminal(text), escape.visible(text), escape.xml(text), escape.escape_markdown(text)):
        assert not set(made) & {chr(c) for c in (*range(9), 11, 12, *range(14, 32), *range(127, 160))}
    assert "\n" not in escape.escape_markdown(text)
    assert "\n" not in escape.visible(text)
    escape.terminal(text).encode()


@given(PRINTED)
@settings(derandomize=True, deadline=None)
def test_printed_json_reads_back(text):
    written = json.dumps({"a": text}, ensure_ascii=False)
    for encoding in ("utf-8", "latin-1", "ascii"):
        printed = escape.json_text(written, encoding)
        printed.encode(encoding)
        assert json.loads(printed) == {"a": text}


@pytest.mark.parametrize(
    "renderable", [HOSTILE, Text(HOSTILE), [HOSTILE], Table(HOSTILE, title=HOSTILE, caption=HOSTILE)]
)
def test_a_console_takes_names_as_text(renderable):
    if isinstance(renderable, Table):
        renderable.add_row(HOSTILE)
    said = shown(renderable)
    assert "\x1b" not in said
    assert "\x9b" not in said
    assert "\x07" not in said


def test_brackets_are_no_markup():
    assert shown("nightly [beta] [/b] :smile:") == "nightly [beta] [/b] :smile:\n"


def test_a_name_forges_no_verdict_in_markdown():
    lines = outputs.verdict_markdown(verdict()).splitlines()
    assert [line for line in lines if line.startswith("##")] == [lines[0], lines[2]]
    assert lines[0].startswith("## ❌")
    assert not any(line.startswith(("![", "## ✅")) for line in lines)
    assert "<b>" not in "\n".join(line for line in lines if "`" not in line)


@pytest.mark.parametrize(
    "text",
    ["# pass", "## pass", "> pass", "- pass", "+ pass", "1. pass", "---", "===", "[a]: http://e.org", "~~~", "* pass"],
)
def test_a_sentence_opens_no_block_of_markdown(text):
    made = escape.escape_markdown(text)
    assert made != text
    assert made.replace("\\", "") == text


@pytest.mark.parametrize(
    "text", ["plain", "−0.2 [−0.3, −0.1]", "3.5 times", "+3.1 %", "a_b", "int4-g128", "~/run", "1.50"]
)
def test_figures_stay_as_they_are(text):
    assert escape.escape_markdown(text) == text


@pytest.mark.parametrize("text", ["a`b", "``", "`", "a", "", "x`\n## y"])
def test_a_code_span_ends_where_it_should(text):
    made = escape.code_span(text)
    fence = made[: len(made) - len(made.lstrip("`"))]
    assert made.endswith(fence)
    assert fence not in made[len(fence) : -len(fence)].split()
    assert "\n" not in made


def test_a_code_block_is_not_ended_by_its_text():
    lines = escape.code_block("a\n```\n# pass\n````", "sh").splitlines()
    assert lines[0] == "`````sh"
    assert lines[-1] == "`````"


def test_junit_is_xml_whatever_the_names_hold(tmp_path):
    outputs.write_junit(verdict(name=HOSTILE + "\x00\ufffe\ud800"), tmp_path / "g.xml")
    document = xml.dom.minidom.parse(str(tmp_path / "g.xml"))
    assert len(document.getElementsByTagName("testcase")) == 2


def test_pages_hold_no_control_characters_and_no_tags_of_names():
    heading = Heading(HOSTILE, (HOSTILE,), HOSTILE)
    section = Section("summary", HOSTILE, (HOSTILE,), warnings=(HOSTILE,), notes=(HOSTILE,))
    for template in ("report.html.j2", "report.md.j2"):
        made = html_page(template, heading, [section])
        assert not set(made) & set("\x1b\x07\x9b\u202e")
        assert "<b>" not in made


def test_values_in_messages_are_cut():
    bomb = ["lol"] * 9
    for _ in range(30):
        bomb = [bomb] * 9
    for value in (bomb, {"a": bomb}, "x" * 10**7, 10**5000, [["y" * 10**6]] * 9):
        assert len(escape.cut(value)) <= 80


@pytest.mark.parametrize("title", ["v1 [/v2]", "nightly [beta]", "esc \x1b[31m", "two\nlines"])
def test_a_policys_name_costs_no_verdict(tmp_path, capfd, title):
    (tmp_path / "p.yaml").write_text(
        f"name: {json.dumps(title)}\nrules:\n  - metric: kl_nats\n    at_most: 5 nats\n", encoding="utf-8"
    )
    out = gate_run(tmp_path)
    assert run_program(["gate", str(out), "--policy", str(tmp_path / "p.yaml")]) == 0
    heard = capfd.readouterr().out
    assert escape.visible(title) in heard
    assert "\x1b" not in heard


def test_an_error_of_a_path_with_escapes_and_brackets_is_one_plain_line(tmp_path, capfd):
    assert run_program(["report-of", str(tmp_path / "[/b]\x1b[31m")]) == 2
    assert run_program(["card", str(tmp_path / "[/b]\x1b[31m")]) == 2
    heard = capfd.readouterr().err
    assert "\x1b[31m" not in heard.replace("\x1b[31merror:", "")
    assert "[/b]" in heard


class Terminal(io.TextIOWrapper):
    """A stream of an encoding, as a Windows console or an old locale has it."""

    def __init__(self, encoding):
        super().__init__(io.BytesIO(), encoding=encoding, errors="strict")


@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "cp1252"])
def test_a_terminal_that_is_not_utf_8_gets_a_table(tmp_path, monkeypatch, encoding):
    out = gate_run(tmp_path)
    (tmp_path / "p.yaml").write_text(
        "name: Zürich 東京\nrules:\n  - metric: kl_nats\n    at_most: 5 nats\n", encoding="utf-8"
    )
    stream = Terminal(encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    for flags in ([], ["--json"]):
        assert run_program(["gate", str(out), "--policy", str(tmp_path / "p.yaml"), *flags]) == 0
    stream.flush()
    said = stream.buffer.getvalue().decode(encoding)
    assert "kl_nats at most 5 nats" in said
    assert json.loads(said[said.index("{") :])["policy"] == "Zürich 東京"


def test_our_own_signs_have_plain_letters():
    stream = Terminal("ascii")
    accept_every_letter(stream)
    stream.write("−0.2 – [0.1…] ≤ ✅ é")
    stream.flush()
    assert stream.buffer.getvalue() == b"-0.2 - [0.1...] <= + ?"

"""A verdict as a table, as JSON, as JUnit XML and as Markdown for a pull request."""

import json
from dataclasses import asdict
from pathlib import Path

from junitparser import Error, Failure, JUnitXml, Skipped, TestCase, TestSuite
from rich.table import Table
from rich.text import Text

from qeval import escape
from qeval.files.atomic import output_file
from qeval.gate.verdict import VERDICT_SCHEMA_VERSION, GateOutcome, GateVerdict, RuleVerdict, VariantVerdict

_STYLES: dict[GateOutcome, str] = {"pass": "green", "fail": "red", "inconclusive": "yellow", "broken": "bold red"}
_SIGNS: dict[GateOutcome, str] = {"pass": "✅", "fail": "❌", "inconclusive": "❔", "broken": "💥"}


def verdict_table(verdict: GateVerdict) -> Table:
    """Return one row a rule, with the reason in words."""
    title = Text(escape.visible(f"gate '{verdict.policy}': {verdict.outcome}"))
    terminal = Table(title=title, title_justify="left", show_lines=False)
    terminal.add_column("variant", no_wrap=True)
    terminal.add_column("rule", no_wrap=True)
    terminal.add_column("verdict", no_wrap=True)
    terminal.add_column("why", overflow="fold")
    for variant in verdict.variants:
        terminal.add_section()
        terminal.add_row(_text(variant.name), "", _coloured(variant.outcome), _text(variant.error or "all rules"))
        for rule in variant.rules:
            terminal.add_row("", _text(rule.rule), _coloured(rule.outcome, outcome_text(rule)), _text(rule.why))
    return terminal


def outcome_text(rule: RuleVerdict) -> str:
    """Return a rule's outcome, and what the policy takes an inconclusive one for."""
    if rule.counts_as == rule.outcome:
        return rule.outcome
    return f"{rule.outcome} (counts as {rule.counts_as})"


def verdict_json(verdict: GateVerdict) -> str:
    """Return the verdict as JSON; figures are shares, nats, factors and bytes."""
    data = {"schema_version": VERDICT_SCHEMA_VERSION, "exit_code": verdict.exit_code, **asdict(verdict)}
    return json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def verdict_markdown(verdict: GateVerdict) -> str:
    """Return a summary for a pull request."""
    policy = escape.code_span(verdict.policy)
    lines = [f"## {_SIGNS[verdict.outcome]} qeval gate {policy}: {verdict.outcome}", ""]
    for variant in verdict.variants:
        lines += [f"### {_SIGNS[variant.outcome]} {escape.code_span(variant.name)}: {variant.outcome}", ""]
        lines += [escape.escape_markdown(variant.error), ""] if variant.error else []
        lines += _rows(variant)
    lines += [*(f"{escape.escape_markdown(note)}\n" for note in (verdict.correction, *verdict.notes))]
    return "\n".join(lines)


def append_markdown(verdict: GateVerdict, path: Path) -> None:
    """Add the summary at the end of a file that others write to as well (`$GITHUB_STEP_SUMMARY`)."""
    with path.open("a", encoding="utf-8") as file:
        file.write(verdict_markdown(verdict) + "\n")


def write_junit(verdict: GateVerdict, path: Path) -> None:
    """Write JUnit XML: a suite a variant, a case a rule; an inconclusive one is skipped where it counts as a pass."""
    document = JUnitXml(escape.xml(f"qeval gate {verdict.policy}"))
    for variant in verdict.variants:
        name = escape.xml(variant.name)
        suite = TestSuite(name)
        for rule in variant.rules:
            suite.add_testcase(_case(rule, name))
        if variant.error:
            case = TestCase("variant", name)
            kind = Failure if variant.outcome == "fail" else Error
            case.result = [kind(escape.xml(variant.error), variant.outcome)]
            suite.add_testcase(case)
        for place, note in enumerate(verdict.notes):
            suite.add_property(f"note {place + 1}", escape.xml(note))
        document.add_testsuite(suite)
    with output_file(path) as part:
        document.write(str(part))


def _case(rule: RuleVerdict, variant: str) -> TestCase:
    case, why = TestCase(escape.xml(rule.rule), variant), escape.xml(rule.why)
    if rule.counts_as == "pass" and rule.outcome != "pass":
        case.result = [Skipped(why, rule.outcome)]
    elif rule.outcome == "broken":
        case.result = [Error(why, rule.outcome)]
    elif rule.outcome != "pass":
        case.result = [Failure(why, rule.outcome)]
    case.system_out = why
    return case


def _rows(variant: VariantVerdict) -> list[str]:
    if not variant.rules:
        return []
    cells = [
        f"| {escape.code_span(rule.rule, in_table=True)} | {_SIGNS[rule.outcome]} {outcome_text(rule)} | "
        f"{escape.escape_markdown(rule.why)} |"
        for rule in variant.rules
    ]
    return ["| rule | verdict | why |", "|---|---|---|", *cells, ""]


def _text(text: str) -> Text:
    """Return text on one line, so that no name looks like another row."""
    return Text(escape.visible(text))


def _coloured(outcome: GateOutcome, text: str | None = None) -> Text:
    return Text(text or outcome, style=_STYLES[outcome])

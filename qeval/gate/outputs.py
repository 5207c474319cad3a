"""A verdict as a table, as JSON, as JUnit XML and as Markdown for a pull request."""

import json
from dataclasses import asdict
from pathlib import Path

from junitparser import Error, Failure, JUnitXml, Skipped, TestCase, TestSuite
from rich.table import Table
from rich.text import Text

from qeval.gate.verdict import SCHEMA_VERSION, GateVerdict, Outcome, RuleVerdict, VariantVerdict
from qeval.store.atomic import atomic_path

_STYLES: dict[Outcome, str] = {"pass": "green", "fail": "red", "inconclusive": "yellow", "broken": "bold red"}
_SIGNS: dict[Outcome, str] = {"pass": "✅", "fail": "❌", "inconclusive": "❔", "broken": "💥"}


def table(verdict: GateVerdict) -> Table:
    """One row a rule, with the reason in words."""
    made = Table(title=f"gate '{verdict.policy}': {verdict.outcome}", title_justify="left", show_lines=False)
    made.add_column("variant", no_wrap=True)
    made.add_column("rule", no_wrap=True)
    made.add_column("verdict", no_wrap=True)
    made.add_column("why", overflow="fold")
    for variant in verdict.variants:
        made.add_section()
        made.add_row(Text(variant.name), "", _coloured(variant.outcome), Text(variant.error or "all rules"))
        for rule in variant.rules:
            made.add_row("", rule.rule, _coloured(rule.outcome, told(rule)), Text(rule.why))
    return made


def told(rule: RuleVerdict) -> str:
    """A rule's outcome, and what the policy takes an inconclusive one for."""
    if rule.counts_as == rule.outcome:
        return rule.outcome
    return f"{rule.outcome} (counts as {rule.counts_as})"


def as_json(verdict: GateVerdict) -> str:
    """The verdict as JSON; figures are shares, nats, factors and bytes."""
    data = {"schema_version": SCHEMA_VERSION, "exit_code": verdict.exit_code, **asdict(verdict)}
    return json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def markdown(verdict: GateVerdict) -> str:
    """A summary for a pull request."""
    lines = [f"## {_SIGNS[verdict.outcome]} qeval gate `{verdict.policy}`: {verdict.outcome}", ""]
    for variant in verdict.variants:
        lines += [f"### {_SIGNS[variant.outcome]} `{variant.name}`: {variant.outcome}", ""]
        lines += [variant.error, ""] if variant.error else []
        lines += _rows(variant)
    lines += [*(f"{note}\n" for note in (verdict.correction, *verdict.notes))]
    return "\n".join(lines)


def append_markdown(verdict: GateVerdict, path: Path) -> None:
    """Add the summary at the end of a file that others write to as well (`$GITHUB_STEP_SUMMARY`)."""
    with path.open("a", encoding="utf-8") as file:
        file.write(markdown(verdict) + "\n")


def write_junit(verdict: GateVerdict, path: Path) -> None:
    """JUnit XML: a suite a variant, a case a rule; an inconclusive one is skipped where it counts as a pass."""
    document = JUnitXml(f"qeval gate {verdict.policy}")
    for variant in verdict.variants:
        suite = TestSuite(variant.name)
        for rule in variant.rules:
            suite.add_testcase(_case(rule, variant.name))
        if variant.error:
            case = TestCase("variant", variant.name)
            case.result = [Error(variant.error, "broken")]
            suite.add_testcase(case)
        document.add_testsuite(suite)
    with atomic_path(path) as part:
        document.write(str(part))


def _case(rule: RuleVerdict, variant: str) -> TestCase:
    case = TestCase(rule.rule, variant)
    if rule.counts_as == "pass" and rule.outcome != "pass":
        case.result = [Skipped(rule.why, rule.outcome)]
    elif rule.outcome == "broken":
        case.result = [Error(rule.why, rule.outcome)]
    elif rule.outcome != "pass":
        case.result = [Failure(rule.why, rule.outcome)]
    case.system_out = rule.why
    return case


def _rows(variant: VariantVerdict) -> list[str]:
    if not variant.rules:
        return []
    cells = [f"| `{rule.rule}` | {_SIGNS[rule.outcome]} {told(rule)} | {_cell(rule.why)} |" for rule in variant.rules]
    return ["| rule | verdict | why |", "|---|---|---|", *cells, ""]


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _coloured(outcome: Outcome, text: str | None = None) -> Text:
    return Text(text or outcome, style=_STYLES[outcome])

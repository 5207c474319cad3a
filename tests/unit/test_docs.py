"""The documentation: generated pages are current, links lead somewhere, and commands use flags that exist."""

import json
import re
import shlex
from pathlib import Path

import pytest
import typer

from docs import generate, notebook
from qeval.cli.app import app
from qeval.gate.policy import load_policy
from qeval.jobs.conformance import CHECKS
from qeval.models.families import FAMILIES

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES = [page for page in PAGES if "_build" not in page.parts]
ROOT_COMMAND = typer.main.get_command(app)
COMMANDS = {
    name: {flag for parameter in command.params for flag in (*parameter.opts, *parameter.secondary_opts)} | {"--help"}
    for name, command in ROOT_COMMAND.commands.items()
}
COMMANDS["sweep"] |= COMMANDS["compare"]  # it passes them on
_BLOCK = re.compile(r"^(?:    |\t)\S[^\n]*$|^```(?:text|sh|bash)?\n(.*?)^```", re.M | re.S)
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
README_LINES = 140


def _name(page):
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("name", generate.PAGES)
def test_a_generated_page_is_what_the_code_says(name):
    written = (generate.REFERENCE / name).read_text(encoding="utf-8")
    assert written == generate.PAGES[name](), "run `python -m docs.generate`"


def test_a_new_flag_reaches_the_page(monkeypatch):
    command = ROOT_COMMAND.commands["verify"]
    (sample,) = [parameter for parameter in command.params if parameter.name == "sample"]
    monkeypatch.setattr(sample, "help", "A|B is *new*")
    monkeypatch.setattr(generate.typer.main, "get_command", lambda _: ROOT_COMMAND)
    assert r"A\|B is \*new\*" in generate.cli_page()


def test_the_notebooks_figures_are_those_on_its_page():
    stored = notebook.read()
    figures = dict(notebook.figures(stored))
    assert len(figures) == 2
    for name, image in figures.items():
        assert (notebook.NOTEBOOK.with_suffix("") / name).read_bytes() == image
        assert f"notebook/{name}" in notebook.page(stored)


def test_a_notebooks_cells_share_names_and_keep_what_they_print_and_show():
    cells = [
        {"cell_type": "markdown", "source": ["# Title"]},
        {"cell_type": "code", "source": ["x = 2\n", "print(x)\n", "x + 1"]},
        {"cell_type": "code", "source": ["import pandas\n", "pandas.DataFrame({'a': [x]})"]},
        {"cell_type": "code", "source": ["import matplotlib.figure\n", "matplotlib.figure.Figure()"]},
    ]
    notebook.execute({"cells": cells})
    page = notebook.page({"cells": cells})
    assert page.startswith("# Title\n\n```python\nx = 2\n")
    assert "```text\n2\n```\n\n```text\n3\n```" in page
    assert "<td>2</td>" in page
    assert "<style" not in page
    assert "notebook/figure-3.png" in page


def test_the_families_record_is_of_every_family_and_check():
    record = json.loads(generate.FAMILIES_RECORD.read_text(encoding="utf-8"))
    assert list(record) == list(FAMILIES)
    for name, cells in record.items():
        assert list(cells) == list(CHECKS), name
        assert {cell["status"] for cell in cells.values()} == {"works"}, name


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_relative_links_lead_somewhere(page):
    for target in _LINK.findall(_without_code(page.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{_name(page)} links to {target}"
        assert ROOT in file.parents, f"{_name(page)} links out of the repository: {target}"
        if anchor:
            assert anchor in _anchors(file), f"{_name(page)} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_commands_use_flags_that_exist(page):
    for line in _command_lines(page.read_text(encoding="utf-8")):
        words = shlex.split(line, comments=True)
        if len(words) < 2 or words[1] not in COMMANDS:
            assert line.startswith(("qeval COMMAND", "qeval models | methods")), f"{_name(page)}: {line}"
            continue
        unknown = {word.partition("=")[0].strip("[]") for word in words[2:] if word.strip("[").startswith("--")}
        assert unknown <= COMMANDS[words[1]], f"{_name(page)}: {line}"


def test_commands_are_looked_at():
    """The check above sees indented commands and fenced ones, and knows a flag that does not exist."""
    lines = list(_command_lines("a\n\n    qeval gate RUN --polcy x  # why\n\n```text\nqeval verify RUN\n```\n"))
    assert lines == ["qeval gate RUN --polcy x  # why", "qeval verify RUN"]
    assert "--polcy" not in COMMANDS["gate"]
    assert "--policy" in COMMANDS["gate"]
    assert sum(len(list(_command_lines(page.read_text(encoding="utf-8")))) for page in PAGES) > 40


def test_the_example_policy_is_one(tmp_path):
    guide = (ROOT / "docs/guides/gates.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"^```yaml\n(.*?)^```", guide, re.M | re.S)
    (tmp_path / "policy.yaml").write_text(example, encoding="utf-8")
    assert len(load_policy(tmp_path / "policy.yaml").rules) == 4


def test_the_readmes_table_is_the_demo_reports():
    report = json.loads((ROOT / "reports/demo/report.json").read_text(encoding="utf-8"))
    models = {"FP16 baseline": report["baseline"]} | {each["name"]: each for each in report["variants"]}
    rows = re.findall(r"^\| (FP16 baseline|rtn|awq|mixed) \| (\d.*) \|$", (ROOT / "README.md").read_text(), re.M)
    assert [name for name, _ in rows] == ["FP16 baseline", "rtn", "awq", "mixed"]
    for name, cells in rows:
        bits, size, *estimates = cells.split(" | ")
        assert _rounds_to(models[name]["bits_per_weight"], bits)
        assert _rounds_to(models[name]["size_bytes"] / 1e6, size.removesuffix(" MB"))
        for metric, cell in zip(("kl_nats", "top1_agreement", "ppl", "mmlu_acc"), estimates, strict=True):
            if cell != "–":
                found, scale = models[name]["metrics"][metric], 100 if "%" in cell else 1
                values = [found[key] * scale for key in ("value", "low", "high")]
                assert all(map(_rounds_to, values, re.findall(r"[\d.]+", cell))), f"{name}: {metric}"


def _rounds_to(value, text):
    return f"{value:.{len(text.partition('.')[2])}f}" == text


def test_every_package_and_module_is_in_the_architecture():
    page = (ROOT / "docs/development/architecture.md").read_text(encoding="utf-8")
    names = {f"{path.name}/" for path in (ROOT / "qeval").iterdir() if (path / "__init__.py").exists()}
    names |= {path.stem for path in (ROOT / "qeval").glob("[!_]*.py")}
    assert {name for name in names if f"`{name}`" not in page} == set()


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= README_LINES


def _without_code(text):
    return re.sub(r"```.*?^```|`[^`\n]*`", "", text, flags=re.M | re.S)


def _anchors(page):
    """The anchors of a page's headings, as GitHub and MyST make them."""
    headings = re.findall(r"^#+ (.*)$", _without_fences(page.read_text(encoding="utf-8")), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def _without_fences(text):
    return re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)


def _command_lines(text):
    for match in _BLOCK.finditer(text):
        lines = (match[1] or match[0]).splitlines()
        yield from (line.strip() for line in lines if line.strip().startswith("qeval "))

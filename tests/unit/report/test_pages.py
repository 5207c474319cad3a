"""The files of a report: complete, self-contained, escaped, the same bytes each time, and made without torch."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from rich.console import Console

from qeval.report import build_report, formatting, report_json, style, summary_table
from qeval.report.document import Table, TableCell
from qeval.report.render import render
from tests.fixtures.runs import SEVEN, Made, Shape, make_run, reseal

SMALL = Shape(variants=SEVEN, windows=12, length=32)


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    return render(make_run(tmp_path_factory.mktemp("run"), SMALL))


@pytest.fixture(scope="module")
def html(rendered):
    return rendered.html.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def markdown(rendered):
    return rendered.markdown.read_text(encoding="utf-8")


class Outline(HTMLParser):
    """The tags, ids and attributes of a page, and whether its tags nest."""

    VOID = frozenset({"meta", "link", "img", "br", "hr", "input"})

    def __init__(self, text):
        super().__init__()
        self.stack, self.ids, self.tags, self.links = [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.tags.append((tag, found))
        self.ids += [found["id"]] if "id" in found else []
        self.links += [found[key] for key in ("href", "src", "xlink:href") if key in found]
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.stack.pop()

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag


def test_all_files_are_there(rendered):
    names = {path.name for path in rendered.plots}
    stems = ("quality-size", "kl-distribution", "perplexity", "mmlu-categories", "layers-1-mixed")
    assert {f"{stem}.{kind}" for stem in stems for kind in ("png", "svg")} <= names
    for path in rendered.plots:
        start = path.read_bytes()[:8]
        assert start == b"\x89PNG\r\n\x1a\n" if path.suffix == ".png" else start.startswith(b"<?xml")
    assert rendered.json.read_text(encoding="utf-8") == report_json(build_report(rendered.json.parent))


def test_a_second_rendering_gives_the_same_bytes(rendered):
    files = [rendered.json, rendered.markdown, rendered.html, *rendered.plots]
    before = [path.read_bytes() for path in files]
    again = render(rendered.json.parent)
    assert again == rendered
    assert [path.read_bytes() for path in files] == before
    assert not list(rendered.json.parent.rglob(".*"))  # no temporary file is left


def test_html_is_well_formed_and_needs_nothing_else(html):
    page = Outline(html)
    assert page.stack == []
    assert len(page.ids) == len(set(page.ids))
    outward = {link for link in page.links if not link.startswith(("#", "data:image/png;base64,"))}
    assert outward == set()
    assert {link[1:] for link in page.links if link.startswith("#")} <= set(page.ids)
    assert not {"link", "img", "iframe"} & {tag for tag, _ in page.tags}
    assert [found for tag, found in page.tags if tag == "script"] == [{}]  # one, and it loads nothing
    assert not re.search(r"@import|url\((?!#)", html)


def test_html_is_accessible(html):
    page = Outline(html)
    tags = [tag for tag, _ in page.tags]
    assert tags.count("caption") == tags.count("table") > 8
    figures = [found for _, found in page.tags if found.get("role") == "img"]
    assert len(figures) == tags.count("svg") == tags.count("figure") > 4
    assert all(len(found["aria-label"]) > 40 for found in figures)
    scrolling = [found for _, found in page.tags if found.get("class") == "scroll"]
    assert len(scrolling) == tags.count("table")
    assert all(found.get("tabindex") == "0" and found["aria-label"] for found in scrolling)
    assert ("html", {"lang": "en"}) in page.tags
    assert "prefers-color-scheme: dark" in html


def test_tables_of_rows_can_be_sorted_and_filtered_in_the_page_itself(html, markdown):
    page = Outline(html)
    live = [found for tag, found in page.tags if tag == "table" and found.get("class") == "live"]
    assert len(live) == 5  # answers, categories, subjects, tokens, layers
    assert sum("data-filter" in found for tag, found in page.tags if tag == "th") == 7
    script = re.search(r"<script>(.*?)</script>", html, re.DOTALL)[1]
    assert not re.search(r"https?:|fetch|import\b|XMLHttp|eval|innerHTML", script)
    assert 'id="rows"' in html
    assert "live" not in markdown


def test_every_number_of_the_overview_stands_in_both_pages(rendered, html, markdown):
    report = build_report(rendered.json.parent)
    for variant in report.variants:
        for name in ("kl_nats", "ppl", "mmlu_acc"):
            assert formatting.value_text(variant.metrics[name]) in html
            assert formatting.metric_text(variant.metrics[name]) in markdown


@pytest.mark.parametrize(
    "part",
    [
        "95 %, bootstrap clustered by window or subject", "kl_abs_modelopt", "Pareto", "Right → wrong",
        "int4-g128 + int8-g128", "per channel", "Q4_1", "Social sciences", "High school geography",
        "Peak memory", "qeval compare --model demo", "What quantization lost".lower(), "Calibration",
    ],
)  # fmt: skip
def test_both_pages_hold(part, html, markdown):
    assert part in html
    assert part in markdown


def test_an_offline_sample_is_never_called_mmlu(html, markdown):
    for text in (html, markdown):
        shown = re.sub(r'id="[^"]*"|href="[^"]*"|aria-labelledby="[^"]*"|\(plots/[^)]*\)', "", text)
        named = re.findall(r"MMLU[^<|.,;]{0,14}", shown)
        assert named
        assert all(name.startswith("MMLU-style sample") for name in named)


def test_markdown_tables_have_as_many_cells_in_every_row(markdown):
    for block in re.findall(r"(?:^\|.*\|\n)+", markdown, flags=re.MULTILINE):
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}
        assert len(widths) == 1
    assert markdown.count("](plots/") >= 5


def test_names_are_escaped(tmp_path):
    evil = Made('<script>"x"|y', "rtn", "int4-g128", "block 128", 4.13, 0.1)
    run = make_run(tmp_path, replace(SMALL, variants=(SEVEN[2], evil)))
    files = render(run)
    html, markdown = (path.read_text(encoding="utf-8") for path in (files.html, files.markdown))
    assert "<script>&quot;x" not in html
    assert '<script>"x' not in html
    assert html.count("<script") == 1
    assert "&lt;script&gt;" in html
    assert "<script" not in markdown
    assert r"\|y" in markdown
    assert Outline(html).stack == []


def test_chance_failures_and_broken_numbers_are_shown(tmp_path):
    def edit(name, columns):
        bad = [float("nan"), *columns["kl_nats"][1:]]
        return columns | {"kl_nats": bad} if name == "awq" else columns

    run = make_run(tmp_path, replace(SMALL, skill=0.0, edits={"tokens": edit}))
    record = json.loads((run / "run.json").read_text())
    record["variants"][3] |= {"status": "failed", "error": "Out of memory."}
    record["warnings"] = ["Two windows were short."]
    reseal(run, record)
    files = render(run)
    for path in (files.html, files.markdown):
        text = path.read_text(encoding="utf-8")
        assert "cannot be told from guessing" in text
        assert "at chance" in text
        assert "rtn failed and was not scored: Out of memory." in text
        assert "awq is broken and was not ranked" in text
        assert "not finite (1 of 384)" in text
        assert "Two windows were short." in text
        assert not re.search(r"\bnan\b", re.sub(r"<svg.*?</svg>", "", text, flags=re.DOTALL))


@pytest.mark.parametrize("metrics", [("kl",), ("ppl",), ("mmlu",), ("kl", "ppl")])
def test_any_part_of_the_metrics_makes_a_page(tmp_path, metrics):
    files = render(make_run(tmp_path, replace(SMALL, variants=SEVEN[2:4], metrics=metrics)))
    html = files.html.read_text(encoding="utf-8")
    assert Outline(html).stack == []
    assert ('id="perplexity"' in html) == ("ppl" in metrics)
    assert ('id="kl"' in html) == ("kl" in metrics)
    assert ('id="task-mmlu"' in html) == ("mmlu" in metrics)


def test_variants_equal_to_the_baseline_and_far_from_it_are_drawn(tmp_path):
    def edit(name, columns):
        if name == "baseline":
            return columns
        alike = name == "awq"
        nll = [None if old is None else old if alike else 60.0 for old in columns["nll"]]
        kl = [0.0 if alike else 58.0] * len(nll)
        return columns | {"kl_nats": kl, "reverse_kl_nats": kl, "nll": nll}

    run = make_run(tmp_path, replace(SMALL, variants=SEVEN[2:4], edits={"tokens": edit}))
    text = render(run).html.read_text(encoding="utf-8")
    assert "awq lost least: KL 0 [0, 0] nats" in text


def test_a_run_without_any_finished_variant_still_makes_a_page(tmp_path):
    run = make_run(tmp_path, replace(SMALL, variants=()))
    text = render(run).html.read_text(encoding="utf-8")
    assert "0 quantized variants" in text
    assert 'id="rows"' not in text
    assert "<script" not in text  # nothing to sort


def test_terminal_table_has_a_line_for_every_model(rendered):
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    console.print(summary_table(build_report(rendered.json.parent)))
    text = console.export_text()
    console.file.close()
    for made in (*SEVEN, Made("FP16 baseline", "", "", "", 16, 0)):
        assert made.name in text
    assert re.search(r"\[\d\.\d+, \d\.\d+\]", text)  # brackets are not taken for markup


def test_a_table_refuses_rows_that_do_not_fit():
    with pytest.raises(ValueError, match="2 cells in 1 columns"):
        Table("odd", ("one",), ((TableCell("a"), TableCell("b")),))


def test_reports_need_no_torch():
    code = "import sys, qeval.report; sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'lm_eval')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_two_dozen_variants_are_told_apart_by_colour_with_marker_or_line():
    places = range(24)
    assert len({(style.colour(place), style.marker(place)) for place in places}) == len(places)
    assert len({(style.colour(place), style.dash(place)) for place in places}) == len(places)

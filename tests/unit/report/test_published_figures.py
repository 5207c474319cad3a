"""A baseline beside published figures: those of its own protocol judge it, others say what differs."""

import pytest

from qeval.report import build_report
from qeval.report.card import write_card
from qeval.report.model import Metric
from qeval.report.published_figures import (
    CheckRun,
    FigureRow,
    published_figures,
    published_table,
    published_warnings,
    read_check_runs,
)
from tests.fixtures.runs import SEVEN, Shape, make_run

SMALL = Shape(variants=SEVEN[:1], windows=6, length=16)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("run"), SMALL)


@pytest.fixture(scope="module")
def report(run):
    return build_report(run)


def figure(value, **tolerance):
    return Metric(value=value, low=value - 0.1, high=value + 0.1, unit="ppl", better="lower", n=100, clusters=10)


def llama(report, **protocol):
    """The report as if it were of Llama-2-7B on all of WikiText-2, as GPTQ counts."""
    said = {
        "corpus": "wikitext2", "window": 2048, "stride": 2048, "windows": 141, "windows_available": 141,
        "convention": "gptq-2048", "bos_policy": "auto",
    } | protocol  # fmt: skip
    model = report.model.model_copy(update={"hub_id": "meta-llama/Llama-2-7b-hf", "source": "hub", "name": "mine"})
    metrics = {**report.baseline.metrics, "ppl_gptq_2048": figure(5.47)}
    return report.model_copy(
        update={
            "model": model,
            "protocol": report.protocol.model_copy(update=said),
            "baseline": report.baseline.model_copy(update={"metrics": metrics}),
        }
    )


def measured(report, value):
    metrics = {**report.baseline.metrics, "ppl_gptq_2048": figure(value)}
    return report.model_copy(update={"baseline": report.baseline.model_copy(update={"metrics": metrics})})


def by_id(report):
    return {each.row.id: each for each in published_figures(report)}


def test_a_figure_of_the_same_protocol_agrees_or_is_off(report):
    near = by_id(llama(report))["llama-2-7b-2048"]
    assert (near.verdict, near.differences, near.deviation) == ("agrees", (), 0.0)
    assert published_warnings(llama(report)) == []
    far = measured(llama(report), 5.6)
    assert by_id(far)["llama-2-7b-2048"].verdict == "off"
    (warning,) = published_warnings(far)
    assert "Perplexity (gptq-2048) is 5.600 [5.500, 5.700] here and 5.47 in AWQ (arXiv 2306.00978), table 4" in warning
    assert "(2023-06, trust A); 0.016 is allowed" in warning


@pytest.mark.parametrize(
    ("changed", "differs"),
    [
        ({"window": 1024, "stride": 1024}, ("windows of 1024, published 2048", "stride 1024, published 2048")),
        ({"bos_policy": "never"}, ("--bos never, published auto",)),
        ({"windows": 16}, ("16 of 141 windows, published 141",)),
        ({"convention": "token-mean"}, ("convention token-mean, published gptq-2048",)),
    ],
)
def test_a_figure_of_another_protocol_judges_nothing_and_says_what_differs(report, changed, differs):
    other = measured(llama(report, **changed), 9.0)
    found = by_id(other)["llama-2-7b-2048"]
    assert (found.verdict, found.differences) == ("another protocol", differs)
    assert published_warnings(other) == []


def test_other_texts_and_models_have_no_published_figure(report):
    assert published_table(report) is None  # the demo on another text
    assert published_figures(llama(report, corpus="pydoc")) == []
    assert "llama-2-7b-mmlu-0shot" not in by_id(llama(report)) or report.tasks


def test_accuracy_of_fewer_questions_and_other_shots_is_of_another_protocol(report):
    (task,) = report.tasks
    own = llama(report).model_copy(
        update={"tasks": [task.model_copy(update={"record": task.record.model_copy(update={"source": "hub"})})]}
    )
    found = by_id(own)["llama-2-7b-mmlu-0shot"]
    assert found.differences == (f"{task.record.shots} shots, published 0", f"{task.record.items} of 14,042 questions")


def test_the_page_the_card_and_the_report_name_what_is_off(run, report, monkeypatch):
    ppl = report.baseline.metrics["ppl"].value
    row = FigureRow(id="a", of="baseline", metric="ppl", value=2 * ppl, relative=0.01)
    known = CheckRun.model_validate(
        {
            "model": report.model.name, "source": "A page", "date": "2024-05", "trust": "B", "rows": [row],
            "corpus": {"file": report.protocol.corpus}, "window": report.protocol.window,
            "stride": report.protocol.stride, "bos": report.protocol.bos_policy or "auto",
            "max_windows": report.protocol.windows, "convention": report.protocol.convention,
        }
    )  # fmt: skip
    monkeypatch.setattr("qeval.report.published_figures._shipped_runs", lambda: (known,))
    assert any("off a published figure" in each for each in build_report(run).warnings)
    card = write_card(run).card.read_text()
    assert "### The baseline beside published figures" in card and "A page (2024-05, trust B)" in card
    assert "is off a published figure of the same protocol" in card


def test_each_published_figure_has_a_source_and_a_trust():
    for each in read_check_runs():
        assert each.source and each.trust in "ABC"

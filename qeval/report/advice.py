"""Advice on one variant of a run: what its loss comes from, told with numbers, and what each treatment gained.

The causes are measured on calibration text, the gains on windows that neither the run nor the choice of treatments saw.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from qeval.files.atomic import write_text
from qeval.report import formatting
from qeval.report.diff.model import Verdict
from qeval.report.document import NOTHING, Heading, Section, Table, TableCell, metric_cell
from qeval.report.model import Metric
from qeval.report.render import html_page

FindingKind = Literal[
    "activation outliers", "salient columns", "key outliers", "value outliers", "sensitive head", "sensitive group"
]
TREATMENTS: Mapping[FindingKind, str] = {
    "activation outliers": "SmoothQuant, or a rotation",
    "salient columns": "AWQ",
    "key outliers": "keys by channel, or rotated",
    "value outliers": "values by channel, or rotated",
    "sensitive head": "the head at 8 bits",
    "sensitive group": "a mix that gives it 8 bits",
}


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Finding(_Part):
    """One cause of loss: a statistic above its threshold, and the share of the loss that it bears on.

    `share` is of the KLs of all parts, each alone, summed.
    """

    kind: FindingKind
    where: str
    statistic: str
    value: float
    threshold: float
    share: float

    @property
    def treatment(self) -> str:
        """The treatment in words."""
        return TREATMENTS[self.kind]


class TreatmentResult(_Part):
    """One treated variant on held-out windows.

    `gain_nats`: how much lower its KL is than the variant's, paired token by token; `p_adjusted` after Holm over all
    treatments. A treatment that could not be made or scored has an error instead.
    """

    name: str
    finding: FindingKind
    bits_per_weight: float | None = None
    kl_nats: Metric | None = None
    gain_nats: Metric | None = None
    p_adjusted: float | None = None
    verdict: Verdict = "not resolved"
    error: str | None = None


class Advice(_Part):
    """All that `qeval advise --json` prints.

    `parts`: the KL in nats of each part of the variant alone, on calibration text. `kl_nats` and `bits_per_weight` are
    the variant's own on the held-out windows; without a finding nothing is measured there.
    """

    advice_version: Literal[1] = 1
    model: str
    variant: str
    calibration: str
    positions: int
    parts: dict[str, float]
    findings: list[Finding]
    results: list[TreatmentResult] = []
    protocol: str | None = None
    windows: int | None = None
    kl_nats: Metric | None = None
    bits_per_weight: float | None = None
    notes: list[str] = []


def write_advice(advice: Advice, out: Path) -> Path:
    """Write advice.json, advice.md and advice.html; return the page's path."""
    section = Section(
        id="advice",
        title="Causes and treatments",
        sentences=tuple(advice_sentences(advice)),
        tables=tuple(advice_tables(advice)),
        notes=tuple(advice.notes),
    )
    gains = (f"gains: {advice.windows} held-out windows of {advice.protocol}",) if advice.protocol else ()
    facts = (f"causes: {advice.positions:,} positions of {advice.calibration}", *gains)
    heading = Heading(f"{advice.model}: what {advice.variant} loses by", facts)
    write_text(out / "advice.json", advice.model_dump_json(indent=2) + "\n")
    write_text(out / "advice.md", html_page("report.md.j2", heading, [section]))
    write_text(out / "advice.html", html_page("report.html.j2", heading, [section]))
    return out / "advice.html"


def advice_tables(advice: Advice) -> list[Table]:
    """Return the parts, the findings and the treatments, each as a table."""
    total = sum(advice.parts.values())
    parts = tuple(
        (TableCell(name), TableCell(f"{kl:.4g}"), TableCell(_percent(kl / total if total else 0.0)))
        for name, kl in advice.parts.items()
    )
    tables = [Table("KL of each part alone", ("Part", "KL, nats", "Share"), parts)]
    if advice.findings:
        tables.append(_findings_table(advice.findings))
    if advice.results:
        tables.append(_results_table(advice))
    return tables


def advice_sentences(advice: Advice) -> list[str]:
    """Return the findings and what their treatments gained, a sentence each."""
    if not advice.findings:
        return [
            f"No statistic of {advice.variant} is above its threshold, so no treatment is proposed; more bits or "
            "smaller blocks are what is left."
        ]
    sentences = [
        f"{each.kind.capitalize()} ({each.where}): {each.statistic} {each.value:.3g}, threshold {each.threshold:.3g}; "
        f"it bears on {_percent(each.share)} of the loss. Treatment: {each.treatment}."
        for each in advice.findings
    ]
    return sentences + [_result_sentence(each) for each in advice.results]


def _result_sentence(result: TreatmentResult) -> str:
    if result.gain_nats is None:
        return f"{result.name} was not measured: {result.error}"
    gain = formatting.metric_text(result.gain_nats)
    words = {"better": "it helps", "worse": "it harms", "the same": "it changes nothing"}
    return f"{result.name} lowers KL by {gain} nats: {words.get(result.verdict, 'that is not resolved')}."


def _findings_table(findings: Sequence[Finding]) -> Table:
    rows = tuple(
        (
            TableCell(each.kind),
            TableCell(each.where),
            TableCell(each.statistic),
            TableCell(f"{each.value:.3g}"),
            TableCell(f"{each.threshold:.3g}"),
            TableCell(_percent(each.share)),
            TableCell(each.treatment),
        )
        for each in findings
    )
    columns = ("Cause", "Where", "Statistic", "Value", "Threshold", "Share of the loss", "Treatment")
    return Table("Causes, the largest share first", columns, rows)


def _results_table(advice: Advice) -> Table:
    own = (TableCell(advice.variant), NOTHING, _bits(advice.bits_per_weight), metric_cell(advice.kl_nats))
    rows = [(*own, NOTHING, NOTHING, NOTHING)]
    for each in advice.results:
        p_value = NOTHING if each.p_adjusted is None else TableCell(f"{each.p_adjusted:.2g}")
        rows.append(
            (
                TableCell(each.name),
                TableCell(each.finding),
                _bits(each.bits_per_weight),
                metric_cell(each.kl_nats),
                metric_cell(each.gain_nats, signed=True),
                p_value,
                TableCell(each.error or each.verdict),
            )
        )
    columns = ("Variant", "Treats", "Bits per weight", "KL, nats", "Gain, nats", "p, adjusted", "Verdict")
    note = (
        "Gain: the variant's KL less the treatment's, paired token by token on windows that the run did not score. "
        "Brackets hold 95 % intervals, clustered by window; p is after Holm over the treatments."
    )
    return Table("Treatments on held-out windows", columns, tuple(rows), note)


def _bits(value: float | None) -> TableCell:
    return NOTHING if value is None else TableCell(f"{value:.2f}")


def _percent(share: float) -> str:
    return f"{share:.0%}"

"""The section itself, in Markdown: tables in the layout of Model Optimizer's benchmark page, plots, the command.

That page (examples/windows/Benchmark.md) has a table each for MMLU, perplexity and KL-divergence: the first two with
one row a model and one column a precision, the third with one row a variant. Its 'KL-divergence' is `kl_abs_modelopt`
here, which stands in a column of its own beside the true one.
"""

from collections.abc import Iterator, Sequence

from qeval import escape
from qeval.errors import QevalError
from qeval.report import Report, formatting
from qeval.report.card.markers import BEGIN, END
from qeval.report.card.plots import FOLDER, Pair
from qeval.report.card.results import model_name
from qeval.report.chat import answer_metrics
from qeval.report.document import TableCell
from qeval.report.measure_items import at_chance as is_at_chance
from qeval.report.model import Metric, Task, VariantReport
from qeval.report.published_figures import published_table
from qeval.report.sections import intervals_sentence, provenance
from qeval.report.summary import summary
from qeval.report.tables import baseline_name, perplexities
from qeval.report.traces import trace_metrics
from qeval.store.run import ScoreRecord

_PROVENANCE = (
    "Model",
    "Weights, sha256",
    "Types",
    "Protocol",
    "Corpus, sha256",
    "Token ids, sha256",
    "Calibration",
    "Machine",
    "Software",
)


def card_section(report: Report, plots: Sequence[Pair]) -> str:
    """Return the text between the markers, without them, its lines ended by newlines.

    Raises:
        QevalError: a name or the command holds a marker, which would end the section early.
    """
    text = "\n" + "\n\n".join(_blocks(report, plots)) + "\n\n"
    for marker in (BEGIN, END):
        if marker in text:
            raise QevalError(f"The card would hold the line {marker} inside its section; rename what is called so.")
    return text


def _blocks(report: Report, plots: Sequence[Pair]) -> Iterator[str]:
    yield "## What quantization lost"
    yield from (f"> **Note.** {escape.escape_markdown(note)}" for note in (*report.warnings, *report.notes))
    yield "\n".join(f"- {escape.escape_markdown(sentence)}" for sentence in summary(report))
    yield from (_picture(pair) for pair in plots)
    if report.model.source != "imported":
        yield _table(("Variant", "Bits/weight", "Size", "Saved", "Status"), _sizes(report))

    for task in report.tasks:
        yield f"### {escape.escape_markdown(task.record.title)}"
        yield _table(*_accuracy(report, task))
        if task.baseline_at_chance:
            yield (
                f"The baseline's accuracy cannot be told from guessing ({formatting.percent(task.chance)}), so neither "
                "can a loss of it."
            )

    for score in report.scores:
        yield f"### {escape.escape_markdown(score.title)}"
        yield _table(*_score(report, score))

    if "ppl" in report.baseline.metrics:
        for name, title in perplexities(report).items():
            yield f"### {escape.escape_markdown(title)}"
            yield _table(*_perplexity(report, name))
    if any("kl_nats" in v.metrics for v in report.variants):
        yield "### KL-divergence"
        yield _table(*_kl(report))
        yield (
            "`kl_abs_modelopt` is the sum of p·\\|log p − log q\\|, what Model Optimizer's benchmark page prints as "
            "KL-divergence; compare it with that page and with nothing else."
        )

    if shown := answer_metrics(report):
        yield "### Chat"
        rows = [[v.name, *(_text(v.metrics.get(name)) for name in shown)] for v in _shown(report)]
        yield _table(("Variant", *shown.values()), rows)

    if traced := trace_metrics(report):
        yield "### Reasoning and calls of functions"
        rows = [[v.name, *(_text(v.metrics.get(name)) for name in traced)] for v in _shown(report)]
        yield _table(("Variant", *traced.values()), rows)

    if published := published_table(report):
        yield f"### {published.caption}"
        yield _table(published.columns, [[_cell_text(cell) for cell in row] for row in published.rows])

    yield escape.escape_markdown(intervals_sentence(report))
    yield "### How to measure it again"
    command = report.provenance.command
    yield escape.code_block(command, "python" if command.startswith("qeval.") else "sh")
    facts = dict(provenance(report))
    yield "\n".join(f"- {key}: {escape.escape_markdown(facts[key])}" for key in _PROVENANCE if key in facts)


def _picture(pair: Pair) -> str:
    """Return a plot that follows the reader's light or dark page; the alternative says what it shows."""
    alt = pair.alt.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;").replace("\n", " ")
    return (
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{FOLDER}/{pair.name}-dark.svg">'
        f'<img alt="{alt}" src="{FOLDER}/{pair.name}-light.svg" width="{pair.width}"></picture>'
    )


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, [":---"] * len(columns), *rows]
    cells = [[text if text == ":---" else escape.escape_markdown(text) or " " for text in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def _shown(report: Report) -> list[VariantReport]:
    """Return the variants that have a column: all but the noise floor."""
    return [v for v in report.variants if v.role == "variant"]


def _sizes(report: Report) -> list[list[str]]:
    base = report.baseline
    first = [
        baseline_name(report),
        formatting.bits(base.bits_per_weight),
        formatting.size(base.size_bytes),
        formatting.MISSING,
        "done",
    ]
    rest = [
        [
            v.name,
            formatting.bits(v.bits_per_weight),
            formatting.size(v.size_bytes),
            formatting.percent(v.saving),
            v.status,
        ]
        for v in _shown(report)
    ]
    return [first, *rest]


def _accuracy(report: Report, task: Task) -> tuple[list[str], list[list[str]]]:
    name = f"{task.record.name}_acc"
    columns = ["Model", baseline_name(report), *(v.name for v in _shown(report))]
    metrics = [report.baseline.metrics.get(name), *(v.metrics.get(name) for v in _shown(report))]
    rows = [[model_name(report), *(_accuracy_text(metric, task) for metric in metrics)]]
    differences = [v.metrics.get(f"{name}_diff") for v in _shown(report)]
    rows.append(["difference, paired", formatting.MISSING, *(_text(metric, signed=True) for metric in differences)])
    flips = [v.metrics.get(f"{task.record.name}_flips") for v in _shown(report)]
    rows.append(["answers that flipped", formatting.MISSING, *(_text(metric) for metric in flips)])
    return columns, rows


def _score(report: Report, score: ScoreRecord) -> tuple[list[str], list[list[str]]]:
    columns = ["Model", baseline_name(report), *(v.name for v in _shown(report))]
    name = f"{score.name}_score"
    means = [_text(m) for m in (report.baseline.metrics.get(name), *_each(report, name))]
    differences = [_text(m, signed=True) for m in _each(report, f"{name}_diff")]
    rows = [[model_name(report), *means], ["difference, paired", formatting.MISSING, *differences]]
    if any(score.name in v.score_flips for v in _shown(report)):
        flips = [_text(m) for m in _each(report, f"{score.name}_flips")]
        rows.append(["answers that flipped", formatting.MISSING, *flips])
    return columns, rows


def _accuracy_text(metric: Metric | None, task: Task) -> str:
    return _text(metric) + (" (at chance)" if metric and is_at_chance(metric, task.chance) else "")


def _perplexity(report: Report, name: str) -> tuple[list[str], list[list[str]]]:
    columns = ["Model", baseline_name(report), *(v.name for v in _shown(report))]
    rows = [[model_name(report), *(_text(m) for m in (report.baseline.metrics.get(name), *_each(report, name)))]]
    if name == "ppl":
        rows.append(["ratio, paired", formatting.MISSING, *(_text(metric) for metric in _each(report, "ppl_ratio"))])
    return columns, rows


def _each(report: Report, name: str) -> list[Metric | None]:
    return [v.metrics.get(name) for v in _shown(report)]


def _kl(report: Report) -> tuple[list[str], list[list[str]]]:
    columns = [
        "Model", "Quantization Method", "Quantization Granularity", "KL-divergence (nats)", "kl_abs_modelopt (nats)",
        "Inference Backend",
    ]  # fmt: skip
    rows = [[model_name(report), baseline_name(report), "-", "0", "0", report.baseline.backend or formatting.MISSING]]
    for v in report.variants:
        if "kl_lower_bound_nats" in v.metrics:
            continue
        method = f"{v.name} (noise floor: the baseline against itself)" if v.role == "floor" else v.name
        cells = [method, v.granularity or "-"]
        rows.append(
            [model_name(report), *cells, *(_text(v.metrics.get(m)) for m in ("kl_nats", "kl_abs_modelopt")), v.backend]
        )
    return columns, rows


def _cell_text(cell: TableCell) -> str:
    return " ".join(filter(None, (cell.text, cell.interval)))


def _text(metric: Metric | None, *, signed: bool = False) -> str:
    return formatting.MISSING if metric is None else formatting.metric_text(metric, signed=signed)

"""A benchmark's tables as plain records: what summary.json and the CSV files hold, each value with its interval."""

import csv
from collections.abc import Sequence
from io import StringIO
from typing import Any

from qeval.report.bench.rows import FIGURES, MeasuredRow
from qeval.report.bench.summary import Summary
from qeval.report.model import Metric

Record = dict[str, str | int | float | bool | None]

BENCH_SCHEMA_VERSION = 1


def records_by_table(summary: Summary) -> dict[str, list[Record]]:
    """Return every table by its file's stem, one record a row."""
    return {
        "engines": _engines(summary),
        "speeds": [_speed(summary, row) for row in summary.rows],
        "savings": _savings(summary),
        "memory": [_memory(summary, row) for row in summary.rows],
        "correctness": _correct(summary),
    }


def bench_json(summary: Summary) -> dict[str, Any]:
    """Return all of summary.json."""
    base = None if summary.base is None else summary.base._asdict()
    record = summary.record.model_dump(mode="json", include={"command", "model", "environment", "settings", "seed"})
    return {"schema_version": BENCH_SCHEMA_VERSION, **record, "base": base, **records_by_table(summary)}


def as_csv(records: Sequence[Record]) -> str:
    """Return records with the same keys as a CSV file; an undefined value is an empty cell."""
    text = StringIO()
    writer = csv.DictWriter(text, list(records[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()


def _engines(summary: Summary) -> list[Record]:
    return [dict(vars(each)) for each in summary.record.opened]


def _speed(summary: Summary, row: MeasuredRow) -> Record:
    """Return a row's speed; a broken model's is left out: its tokens are not the model's, so it says nothing."""
    broken = summary.broken(row.system)
    figures = {} if broken else row.figures
    record = _where(row) | {
        "generated": row.generated or None,
        "repeats": row.repeats or None,
        "outcome": "broken" if broken else row.cell.outcome,
        "reason": row.cell.reason,
    }
    for name in (*FIGURES, "energy_joules"):
        record |= _flat(name, figures.get(name))
    for latency in ("prompt", "whole", "wall"):
        record |= _flat(f"{latency}_times_base", None if broken else summary.against_base(row, latency))
    return record


def _savings(summary: Summary) -> list[Record]:
    return [
        _where(saving.row)
        | {
            "generated": saving.row.generated,
            "base_engine": saving.base.engine,
            "base_variant": saving.base.variant,
            "memory_saving": saving.memory,
        }
        | _flat("speedup", saving.speed_up)
        for saving in summary.savings
    ]


def _memory(summary: Summary, row: MeasuredRow) -> Record:
    opened = summary.opened.get(row.system)
    return _where(row) | {
        "disk_bytes": None if opened is None else opened.disk_bytes,
        "weights_bytes": None if opened is None else opened.weights_bytes,
        "peak_prompt_bytes": row.cell.peak_prompt_bytes,
        "peak_generate_bytes": row.cell.peak_generate_bytes,
        "cache_bytes": row.cell.cache_bytes,
    }


def _correct(summary: Summary) -> list[Record]:
    records = []
    for each in summary.correct.values():
        record: Record = each.system._asdict()
        record |= {"prompts": each.prompts, "tokens": each.tokens, "broken": each.broken}
        record |= _flat("equal", each.equal)
        record |= {"diverged": each.diverged, "first_divergence": each.first_divergence}
        record |= _flat("kl_nats", each.kl_nats)
        record |= {"margin_nats": each.margin_nats, "rejoined": each.rejoined, "rejoin_tokens": each.rejoin_tokens}
        records.append(record)
    return records


def _where(row: MeasuredRow) -> Record:
    cell = row.cell
    return {"engine": cell.engine, "variant": cell.variant, "batch": cell.batch, "prompt": cell.prompt}


def _flat(name: str, metric: Metric | None) -> Record:
    ends = (None, None, None) if metric is None else (metric.value, metric.low, metric.high)
    return dict(zip((name, f"{name}_low", f"{name}_high"), ends, strict=True))

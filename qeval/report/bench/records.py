"""A benchmark's tables as plain records: what summary.json and the CSV files hold, each value beside its interval."""

import csv
from collections.abc import Sequence
from io import StringIO
from typing import Any

from qeval.report.bench.rows import FIGURES, Row
from qeval.report.bench.summary import Summary
from qeval.report.model import Metric

Record = dict[str, str | int | float | bool | None]

SCHEMA_VERSION = 1


def tables(found: Summary) -> dict[str, list[Record]]:
    """Every table by its file's stem, one record a row."""
    return {
        "engines": _engines(found),
        "speeds": [_speed(found, row) for row in found.rows],
        "savings": _savings(found),
        "memory": [_memory(found, row) for row in found.rows],
        "correctness": _correct(found),
    }


def as_json(found: Summary) -> dict[str, Any]:
    """All of summary.json."""
    base = None if found.base is None else found.base._asdict()
    kept = found.record.model_dump(mode="json", include={"command", "model", "environment", "settings", "seed"})
    return {"schema_version": SCHEMA_VERSION, **kept, "base": base, **tables(found)}


def as_csv(records: Sequence[Record]) -> str:
    """Records with the same keys as a CSV file; an undefined value is an empty cell."""
    text = StringIO()
    writer = csv.DictWriter(text, list(records[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()


def _engines(found: Summary) -> list[Record]:
    return [dict(vars(each)) for each in found.record.opened]


def _speed(found: Summary, row: Row) -> Record:
    """A broken model's figures are left out: its tokens are not the model's, so their speed says nothing."""
    broken = found.broken(row.system)
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
        record |= _flat(f"{latency}_times_base", None if broken else found.against_base(row, latency))
    return record


def _savings(found: Summary) -> list[Record]:
    return [
        _where(saving.row)
        | {
            "generated": saving.row.generated,
            "base_engine": saving.base.engine,
            "base_variant": saving.base.variant,
            "memory_saving": saving.memory,
        }
        | _flat("speedup", saving.speed_up)
        for saving in found.savings
    ]


def _memory(found: Summary, row: Row) -> Record:
    opened = found.opened.get(row.system)
    return _where(row) | {
        "disk_bytes": None if opened is None else opened.disk_bytes,
        "weights_bytes": None if opened is None else opened.weights_bytes,
        "peak_prompt_bytes": row.cell.peak_prompt_bytes,
        "peak_generate_bytes": row.cell.peak_generate_bytes,
        "cache_bytes": row.cell.cache_bytes,
    }


def _correct(found: Summary) -> list[Record]:
    records = []
    for each in found.correct.values():
        record: Record = each.system._asdict()
        record |= {"prompts": each.prompts, "tokens": each.tokens, "broken": each.broken}
        record |= _flat("equal", each.equal)
        record |= {"diverged": each.diverged, "first_divergence": each.first_divergence}
        record |= _flat("kl_nats", each.kl_nats)
        record |= {"margin_nats": each.margin_nats, "rejoined": each.rejoined, "rejoin_tokens": each.rejoin_tokens}
        records.append(record)
    return records


def _where(row: Row) -> Record:
    cell = row.cell
    return {"engine": cell.engine, "variant": cell.variant, "batch": cell.batch, "prompt": cell.prompt}


def _flat(name: str, metric: Metric | None) -> Record:
    ends = (None, None, None) if metric is None else (metric.value, metric.low, metric.high)
    return dict(zip((name, f"{name}_low", f"{name}_high"), ends, strict=True))

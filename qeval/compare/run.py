"""`compare`: make the variants, score the baseline and each of them on the same tokens, render the report."""

import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from qeval.calibrate.sensitivity import EVERY, LENGTH, SAMPLES
from qeval.compare.environment import describe_environment, peak_rss_bytes
from qeval.compare.estimate import Cost, cost, flops_per_second
from qeval.compare.prepare import Plan
from qeval.compare.record import failed_record, variant_record
from qeval.compare.scoring import Scorer, Work, score
from qeval.compare.texts import keep_texts
from qeval.compare.variants import Entry, Workshop
from qeval.config import BASELINE
from qeval.errors import QevalError, UsageError
from qeval.paths import home
from qeval.progress import Progress
from qeval.score.choices import shared_tokens
from qeval.store.atomic import write_text
from qeval.store.rows import Kind, RowStore
from qeval.store.run import CalibrationRecord, RunRecord, VariantRecord
from qeval.store.states import StateStore
from qeval.store.variants import read_manifest


def run(plan: Plan, progress: Progress) -> RunRecord:
    """Do what is planned and is not done yet; the record is written to OUT/run.json, the rows to OUT/rows.

    A variant that fails is told in its record; the others are scored all the same.
    """
    started, clock = datetime.now(UTC), time.perf_counter()
    entries = _make(plan, progress)
    work = _work(plan, progress)
    before = time.perf_counter()
    records = score(work, _scorer(plan, BASELINE, plan.baseline_key, None))
    baseline_seconds = time.perf_counter() - before
    variants = [_scored(plan, work, entry, records) for entry in entries]
    work.rows.keep_only(records)
    keep_texts(plan.settings.out, plan.loaded.tokenizer, plan.shards, plan.suites)
    record = RunRecord(
        run_version=1,
        command=plan.settings.command,
        started=started.isoformat(timespec="seconds"),
        finished=datetime.now(UTC).isoformat(timespec="seconds"),
        seconds=time.perf_counter() - clock,
        peak_rss_bytes=peak_rss_bytes(),
        seed=plan.settings.seed,
        model=plan.model,
        baseline_label=_baseline_label(plan),
        baseline_size_bytes=plan.shape.parameters * plan.source.float_bits // 8,
        baseline_bits_per_weight=float(plan.source.float_bits),
        baseline_seconds=baseline_seconds,
        protocol=plan.protocol,
        tasks=list(plan.tasks),
        calibration=_calibration(plan),
        variants=variants,
        environment=describe_environment(plan.settings.model.device),
        metrics=list(plan.settings.tasks),
        warnings=list(progress.warnings),
    )
    write_text(plan.settings.out / "run.json", record.model_dump_json(indent=1) + "\n")
    return record


def estimate(plan: Plan) -> Cost:
    """What the whole run costs from nothing; what the cache and OUT hold already is not taken off."""
    shape, models = plan.shape, 1 + len(plan.settings.recipes) + len(plan.given)
    scored = sum(len(window.kl_positions) for shard in plan.shards for window in shard.windows)
    asked = sum(shared_tokens(part) for suite in plan.suites for part in suite.parts())
    items = sum(suite.info.items for suite in plan.suites)
    flops = models * shape.forward_flops(plan.corpus_tokens + asked, 2 * scored + items)
    if any(recipe.calibrated for recipe in plan.settings.recipes):
        flops += 2 * shape.forward_flops(plan.settings.calibration.samples * plan.settings.calibration.length, 0)
    groups = len(plan.source.description.groups)
    for recipe in plan.settings.recipes:
        if recipe.mixed and recipe.importance == "measured":
            tokens = SAMPLES * LENGTH
            flops += groups * shape.forward_flops(tokens // 2, tokens // EVERY)
    dtype = next(plan.loaded.model.parameters()).dtype
    return cost(flops, flops_per_second(plan.settings.model.device, dtype), shape)


def _make(plan: Plan, progress: Progress) -> list[Entry]:
    """The variants in the order asked for; the calibration's statistics are let go when the last is made."""
    workshop = Workshop(plan.source, plan.calibration, plan.settings.seed, progress)
    return [*(workshop.entry(recipe) for recipe in plan.settings.recipes), *plan.given]


def _work(plan: Plan, progress: Progress) -> Work:
    return Work(
        shards=plan.shards,
        corpus=plan.protocol.corpus if plan.protocol else "",
        suites=plan.suites,
        rows=RowStore(plan.settings.out),
        states=StateStore(home() / "states" / plan.baseline_key, progress.warn),
        baseline_key=plan.baseline_key,
        batch_tokens=plan.batch_tokens,
        progress=progress,
    )


def _scorer(plan: Plan, name: str, key: str, folder: Path | None) -> Scorer:
    return Scorer(plan.backend, name, f"{plan.baseline_key}-{key}", folder, plan.backend.head.logits)


def _scored(plan: Plan, work: Work, entry: Entry, records: dict[Kind, list[Path]]) -> VariantRecord:
    """One variant's rows added to `records`, and its own record."""
    backend = plan.backend.name
    if entry.folder is None:
        return failed_record(entry.name, entry.method, backend, entry.error or "it could not be made")
    manifest = read_manifest(entry.folder)
    start = time.perf_counter()
    try:
        done = score(work, _scorer(plan, entry.name, manifest.key, entry.folder))
    except UsageError:
        raise
    except (QevalError, RuntimeError) as error:  # torch tells of lacking memory by a RuntimeError
        work.progress.warn(f"{entry.name} failed: {error}")
        return failed_record(entry.name, entry.method, backend, str(error))
    for kind, paths in done.items():
        records[kind] += paths
    return variant_record(entry.name, backend, manifest, time.perf_counter() - start)


def _baseline_label(plan: Plan) -> str:
    names = {"float16": "FP16", "bfloat16": "BF16", "float32": "FP32"}
    weights, compute = plan.model.weight_dtype, plan.model.compute_dtype
    return f"{names.get(weights, weights)} weights computed in {names.get(compute, compute).lower()}"


def _calibration(plan: Plan) -> CalibrationRecord | None:
    if not any(recipe.calibrated for recipe in plan.settings.recipes):
        return None
    return CalibrationRecord.model_validate(plan.calibration().record)


def failed(variants: Sequence[VariantRecord]) -> list[str]:
    """The names of the variants that failed."""
    return [variant.name for variant in variants if variant.status == "failed"]

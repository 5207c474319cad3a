"""`compare`: make the variants, score the baseline and each of them on the same tokens, render the report."""

import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from qeval.backends.stream.backend import StreamBackend
from qeval.calibrate.sensitivity import EVERY, LENGTH, SAMPLES
from qeval.compare.candidates import Contender, baseline_of, contenders, states_folder
from qeval.compare.environment import describe_environment, peak_rss_bytes
from qeval.compare.estimate import PROGRAM_BYTES, Cost, cost, flops_per_second
from qeval.compare.prepare import Plan
from qeval.compare.scoring import Kept, Scorer, Work, score
from qeval.compare.stream import StreamWorkshop
from qeval.compare.texts import keep_texts
from qeval.compare.variants import Entry, Workshop
from qeval.errors import QevalError, UsageError
from qeval.progress import Progress
from qeval.score.choices import shared_tokens
from qeval.store.atomic import write_text
from qeval.store.rows import Kind, RowStore
from qeval.store.run import CalibrationRecord, RunRecord, VariantRecord


def run(plan: Plan, progress: Progress) -> RunRecord:
    """Do what is planned and is not done yet; the record is written to OUT/run.json, the rows to OUT/rows.

    A variant that fails is told in its record; the others are scored all the same.
    """
    started, clock = datetime.now(UTC), time.perf_counter()
    entries = _make(plan, progress)
    baseline = baseline_of(plan, progress)
    work = _work(plan, baseline, progress)
    before = time.perf_counter()
    records = score(work, Scorer(baseline.candidate))
    baseline_seconds = time.perf_counter() - before
    variants = [_scored(work, each, records) for each in contenders(plan, entries, baseline, progress)]
    work.rows.keep_only(records)
    if not failed(variants):
        shutil.rmtree(states_folder(plan.settings.out), ignore_errors=True)
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
    shape, models = plan.shape, plan.models
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
    found = cost(flops, flops_per_second(plan.settings.model.device, dtype), shape)
    if isinstance(plan.backend, StreamBackend):
        return replace(found, peak_bytes=plan.backend.budget.total + PROGRAM_BYTES)
    return found


def _make(plan: Plan, progress: Progress) -> list[Entry]:
    """The variants in the order asked for; the calibration's statistics are let go when the last is made."""
    backend, seed = plan.backend, plan.settings.seed
    if isinstance(backend, StreamBackend):
        workshop: Workshop = StreamWorkshop(plan.source, backend.made, seed, progress)
    else:
        workshop = Workshop(plan.source, plan.calibration, seed, progress)
    return [*(workshop.entry(recipe) for recipe in plan.settings.recipes), *plan.given]


def _work(plan: Plan, baseline: Kept, progress: Progress) -> Work:
    return Work(
        shards=plan.shards,
        corpus=plan.protocol.corpus if plan.protocol else "",
        suites=plan.suites,
        rows=RowStore(plan.settings.out),
        baseline=baseline,
        batch_tokens=plan.batch_tokens,
        progress=progress,
    )


def _scored(work: Work, contender: Contender, records: dict[Kind, list[Path]]) -> VariantRecord:
    """One model's rows added to `records`, and its own record."""
    if contender.error is not None:
        return contender.failed(contender.error)
    start = time.perf_counter()
    try:
        done = score(work, contender.scorer())
    except UsageError:
        raise
    except (QevalError, RuntimeError) as error:  # torch tells of lacking memory by a RuntimeError
        work.progress.warn(f"{contender.name} failed: {error}")
        return contender.failed(str(error))
    for kind, paths in done.items():
        records[kind] += paths
    return contender.record(time.perf_counter() - start)


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

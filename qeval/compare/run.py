"""`compare`: make the variants, score the baseline and each of them on the same tokens, render the report."""

import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from uuid import uuid4

from qeval.backends.stream.backend import StreamBackend
from qeval.calibrate.sensitivity import EVERY, LENGTH, SAMPLES
from qeval.compare.candidates import baseline_of, contenders, states_folder
from qeval.compare.crew import all_threads, helped, wait_for
from qeval.compare.environment import describe_environment, peak_rss_bytes
from qeval.compare.estimate import PROGRAM_BYTES, Cost, cost, flops_per_second
from qeval.compare.prepare import Plan
from qeval.compare.remake import identity_of, settings_json
from qeval.compare.scoring import Scorer, Work
from qeval.compare.standing import Model, Scored, score_all, work_of
from qeval.compare.texts import keep_texts
from qeval.compare.variants import Entry
from qeval.compare.witness import witness_of
from qeval.paths import home
from qeval.progress import Progress
from qeval.score.choices import shared_tokens
from qeval.store.atomic import sweep, write_text
from qeval.store.ledger import Ledger, joined
from qeval.store.rows import KINDS
from qeval.store.run import CalibrationRecord, RunRecord, VariantRecord

_CACHES = ("variants", "states", "hashes", "onnx")
"""Folders of the cache that processes write into; the models' removes its own leftovers."""


@contextmanager
def membership(plan: Plan, progress: Progress, *, shared: bool = True) -> Iterator[Ledger]:
    """This process as one that works on the run in the plan's folder; it lasts until the report is written.

    Another command of the same settings joins it; one of other settings waits, and so does every other command where
    the run is not `shared`. What killed processes left in the folder and in the cache is removed first.
    """
    out = plan.settings.out
    for folder in (out, *(home() / name for name in _CACHES)):
        sweep(folder)
    settings = identity_of(plan.settings) if shared else uuid4().hex
    with joined(out, settings, plan.settings.command, progress.warn, waiting=progress.tell) as ledger:
        yield ledger


def run(plan: Plan, progress: Progress, ledger: Ledger) -> RunRecord:
    """Do what is planned and is not done yet; the record is written to OUT/run.json, the rows to OUT/rows.

    A variant that fails is told in its record; the others are scored all the same. What other processes of the run are
    at is waited for in the end.
    """
    started, clock = datetime.now(UTC), time.perf_counter()
    for warning in set(plan.warnings) - set(progress.warnings):
        progress.warn(warning)
    _tell_overlap(plan, progress)
    baseline = baseline_of(plan, progress)
    work = work_of(plan, baseline, ledger, progress)
    first = Scored(work, lambda: Scorer(baseline.candidate))
    with helped(plan.settings, ledger.crew, progress) as helpers:
        entries = _make(plan, progress)
        helpers.tell(entries)
        models = [Model(work, each) for each in contenders(plan, entries, baseline, progress)]
        wait_for(helpers, work, first, models)
        first.score(wait=False)
        score_all(first, models, work)
    witness = witness_of(plan.shards, plan.suites, plan.protocol, plan.drift)
    variants = [model.record().model_copy(update={"witness": witness}) for model in models]
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
        baseline_seconds=first.seconds,
        protocol=plan.protocol,
        tasks=list(plan.tasks),
        calibration=_calibration(plan),
        variants=variants,
        environment=describe_environment(plan.settings.model.device),
        metrics=list(plan.settings.tasks),
        warnings=list(progress.warnings),
        drift=plan.drift,
        settings=None if plan.is_drawn else settings_json(plan.settings),
        witness=witness,
    )
    _write(plan, work, [first, *(model.scored for model in models)], record)
    return record


def estimate(plan: Plan) -> Cost:
    """What the whole run costs from nothing; what the cache and OUT hold already is not taken off."""
    shape, models = plan.shape, plan.models
    scored = sum(len(window.kl_positions) for shard in plan.shards for window in shard.windows)
    asked = sum(shared_tokens(part) for suite in plan.suites for part in suite.parts())
    items = sum(suite.info.items for suite in plan.suites)
    along, said = sum(part.tokens for part in plan.parts), sum(len(part.prompts) * part.count for part in plan.parts)
    flops = models * shape.forward_flops(plan.corpus_tokens + asked + along, 2 * (scored + said) + items)
    flops += shape.forward_flops(along, said)  # of generating
    if any(recipe.calibrated for recipe in plan.settings.recipes):
        flops += 2 * shape.forward_flops(plan.settings.calibration.samples * plan.settings.calibration.length, 0)
    groups = len(plan.source.description.units)
    for recipe in plan.settings.recipes:
        if recipe.uses_gptq:
            flops += 3 * shape.forward_flops(plan.settings.calibration.samples * plan.settings.calibration.length, 0)
        if recipe.mixed and recipe.importance == "measured":
            tokens = SAMPLES * LENGTH
            flops += groups * shape.forward_flops(tokens // 2, tokens // EVERY)
        if recipe.mixed and recipe.importance == "fisher":
            flops += 9 * shape.forward_flops(SAMPLES * LENGTH, SAMPLES * LENGTH)
    dtype = next(plan.loaded.model.parameters()).dtype
    found = cost(flops, flops_per_second(plan.settings.model.device, dtype), shape)
    if isinstance(plan.backend, StreamBackend):
        return replace(found, peak_bytes=plan.backend.budget.total + PROGRAM_BYTES)
    return found


def _make(plan: Plan, progress: Progress) -> list[Entry]:
    """The variants in the order asked for; the calibration's statistics are let go when the last is made."""
    with all_threads(plan.settings), plan.workshop(progress) as workshop:
        return [*(workshop.entry(recipe) for recipe in plan.settings.recipes), *plan.given]


def _write(plan: Plan, work: Work, scored: Sequence[Scored], record: RunRecord) -> None:
    """The index of rows, the texts and the record, as one: others of the run write theirs before or after."""
    out = plan.settings.out
    with work.ledger.alone("record"):
        work.rows.keep_only({kind: [path for each in scored for path in each.paths(kind)] for kind in KINDS})
        keep_texts(out, plan.loaded.tokenizer, plan.shards, plan.suites)
        write_text(out / "run.json", record.model_dump_json(indent=1) + "\n")
    if not failed(record.variants) and not work.ledger.others:
        shutil.rmtree(states_folder(out), ignore_errors=True)


def _baseline_label(plan: Plan) -> str:
    names = {"float16": "FP16", "bfloat16": "BF16", "float32": "FP32"}
    weights, compute = plan.model.weight_dtype, plan.model.compute_dtype
    return f"{names.get(weights, weights)} weights computed in {names.get(compute, compute).lower()}"


def _tell_overlap(plan: Plan, progress: Progress) -> None:
    """Say before the work what will be void after it."""
    seen = _calibration(plan)
    if seen and seen.overlap and seen.overlap.shared_tokens:
        progress.tell(
            f"note: {seen.overlap.shared_tokens:,} of {seen.overlap.tokens:,} scored tokens stand in the calibration "
            f"text '{seen.source}' too, so variants that are calibrated on it will be void."
        )
    for each in plan.given:
        if each.overlap and each.overlap.shared_tokens:
            progress.tell(
                f"note: {each.name} was calibrated on text that holds at least {each.overlap.shared_tokens:,} of "
                f"{each.overlap.tokens:,} scored tokens too, so it will be void."
            )


def _calibration(plan: Plan) -> CalibrationRecord | None:
    if not any(recipe.calibrated for recipe in plan.settings.recipes):
        return None
    return CalibrationRecord.model_validate({**plan.calibration().record, "overlap": plan.overlap()})


def failed(variants: Sequence[VariantRecord]) -> list[str]:
    """The names of the variants that failed."""
    return [variant.name for variant in variants if variant.status == "failed"]

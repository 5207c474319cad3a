"""`compare`: make the variants, score the baseline and each of them on the same tokens, render the report."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from uuid import uuid4

from qeval.compare.cost import PROGRAM_BYTES, Cost, cost, flops_per_second
from qeval.compare.environment import describe_environment, peak_rss_bytes
from qeval.compare.plan import Plan
from qeval.compare.run_models import baseline_model, score_all, scored_models, states_folder, work_of
from qeval.compare.scored_models import ScoredModel
from qeval.compare.served_models import served_models
from qeval.compare.settings import Settings
from qeval.compare.settings_json import identity_of, settings_json
from qeval.compare.variants import VariantEntry
from qeval.compare.workers import all_threads, helped, share_of_worker, wait_for
from qeval.config import BASELINE
from qeval.errors import QevalError
from qeval.files.atomic import remove_abandoned
from qeval.models.checkpoint.weights import read_entries, weight_files, weights_sha256
from qeval.paths import home
from qeval.progress import Progress
from qeval.quantize.sensitivity import EVERY, SENSITIVITY_LENGTH, SENSITIVITY_SAMPLES
from qeval.recipe_parts import names_of_parts
from qeval.report.align import TOKEN_COLUMNS, item_rows, select, token_rows
from qeval.report.soundness import NO_BASELINE, impossible_answers, impossible_tokens
from qeval.score.jobs import Work
from qeval.score.responses import score_records
from qeval.score.texts import keep_texts
from qeval.store.attempts import attempt, begin, finish, withdraw
from qeval.store.chain import chain_of, copy_manifests
from qeval.store.ledger import Ledger, join_ledger
from qeval.store.out import remove_records
from qeval.store.rows import ROW_KINDS, concat
from qeval.store.run import RUN_VERSION, CalibrationRecord, RunRecord, VariantRecord, write_run
from qeval.store.variants import MANIFEST, read_manifest
from qeval.tasks.harness_tasks import title_of_task

_CACHES = ("variants", "states", "answers", "hashes", "onnx")
"""Folders of the cache that processes write into; the models' removes its own leftovers."""


@contextmanager
def membership(plan: Plan, progress: Progress, *, shared: bool = True) -> Iterator[Ledger]:
    """This process as one that works on the run in the plan's folder; it lasts until the report is written.

    Another command of the same settings joins it; one of other settings waits, and so does every other command where
    the run is not `shared`. What killed processes left in the folder and in the cache is removed first, and at the end
    what workers left that were killed meanwhile.
    """
    out = plan.settings.out
    _remove_abandoned(out)
    settings, command = identity_of(plan.settings) if shared else uuid4().hex, plan.settings.command
    has_entered = False
    try:
        with attempt(out, command), join_ledger(out, settings, command, progress.warn, waiting=progress.tell) as ledger:
            has_entered = True
            begin(out, command)  # again: who was waited for may have taken the mark for one that was left behind
            yield ledger
    finally:
        if not has_entered:
            withdraw(out)
        _remove_abandoned(out)


def _remove_abandoned(out: Path) -> None:
    """Remove the temporary files of dead processes from OUT and from the cache."""
    for folder in (out, *(home() / name for name in _CACHES)):
        remove_abandoned(folder)


def run_comparison(plan: Plan, progress: Progress, ledger: Ledger) -> RunRecord:
    """Do what is planned and is not done yet; the record is written to OUT/run.json, the rows to OUT/rows.

    A variant that fails is told in its record; the others are scored all the same. What other processes of the run are
    at is waited for in the end.
    """
    started, clock = datetime.now(UTC), time.perf_counter()
    for warning in set(plan.warnings) - set(progress.warnings):
        progress.warn(warning)
    _note_overlap(plan, progress)
    baseline = baseline_model(plan, progress)
    work = work_of(plan, baseline, ledger, progress, share_of_worker(plan.settings))
    with helped(plan, ledger.command_id, progress) as helpers:
        entries = _make(plan, progress)
        helpers.tell(entries)
        models = [*scored_models(plan, entries, baseline, progress), *served_models(plan)]
        wait_for(helpers, work, [baseline, *models])
        baseline.score(work, wait=False)
        is_scored = not baseline.is_open
        if is_scored:
            _check_baseline(plan, baseline)
        score_all(baseline, models, work)
    if not is_scored:  # another process finished it meanwhile
        _check_baseline(plan, baseline)
    _check_unchanged(plan)
    witness = plan.token_hash
    alone = {entry.part_of: entry.name for entry in entries if entry.part_of}
    variants = [_with_parts(model.record(), plan.settings, alone, witness) for model in models]
    record = RunRecord(
        run_version=RUN_VERSION,
        command=plan.settings.command,
        started=started.isoformat(timespec="seconds"),
        finished=datetime.now(UTC).isoformat(timespec="seconds"),
        seconds=time.perf_counter() - clock,
        peak_rss_bytes=peak_rss_bytes(),
        seed=plan.settings.seed,
        model=plan.model,
        baseline_label=_baseline_label(plan),
        baseline_size_bytes=plan.baseline_size_bytes,
        baseline_bits_per_weight=float(plan.source.float_bits),
        baseline_seconds=baseline.seconds,
        protocol=plan.protocol,
        tasks=list(plan.tasks),
        scores=score_records(plan.responses, [path for each in [baseline, *models] for path in each.paths("scores")]),
        calibration=_calibration(plan),
        variants=variants,
        environment=describe_environment(plan.settings.model.device),
        metrics=[title_of_task(task) for task in plan.settings.tasks],
        warnings=list(progress.warnings),
        drift=plan.drift,
        reasoning=plan.traces.reasoning,
        grammar=plan.traces.grammar,
        needle=plan.needle,
        settings=None if plan.is_drawn or plan.memory else settings_json(plan.settings),
        witness=witness,
    )
    return _write(plan, work, [baseline, *models], record, _manifests(entries))


def _with_parts(record: VariantRecord, settings: Settings, alone: Mapping[str, str], witness: str) -> VariantRecord:
    """Return the record with what it was asked, whether it is a part of others, and which variants are parts of it.

    `alone` names the weights alone of variants from elsewhere, by the variant.
    """
    recipe = next((each for each in settings.recipes if each.name == record.name), None)
    parts = {"weights": alone[record.name]} if record.name in alone else {}
    parts |= {} if recipe is None else names_of_parts(recipe, settings.every_recipe)
    is_part = any(each.name == record.name for each in settings.parts)
    return record.model_copy(update={"witness": witness, "parts": parts, **({"role": "part"} if is_part else {})})


def estimate(plan: Plan) -> Cost:
    """Estimate what the whole run costs from nothing; what the cache and OUT hold already is not taken off."""
    shape, models = plan.shape, plan.models
    scored = sum(len(window.kl_positions) for shard in plan.shards for window in shard.windows)
    items = sum(suite.info.items for suite in plan.suites)
    along, said = sum(part.tokens for part in plan.parts), sum(len(part.prompts) * part.count for part in plan.parts)
    flops = models * shape.forward_flops(plan.corpus_tokens + plan.asked_tokens + along, 2 * (scored + said) + items)
    flops += shape.forward_flops(along, said)  # of generating
    flops += models * shape.forward_flops(plan.generated_tokens, plan.generated_tokens)
    forced = [part.shard for part in plan.traces.parts]
    states = sum(len(window.kl_positions) for shard in forced for window in shard.windows)
    flops += models * shape.forward_flops(sum(shard.tokens for shard in forced), 2 * states)
    if any(recipe.calibrated for recipe in plan.settings.every_recipe):
        flops += 2 * shape.forward_flops(plan.settings.calibration.samples * plan.settings.calibration.length, 0)
    groups = len(plan.source.description.units)
    for recipe in plan.settings.every_recipe:
        if recipe.quant_method.rounding == "sequential":
            flops += 3 * shape.forward_flops(plan.settings.calibration.samples * plan.settings.calibration.length, 0)
        if recipe.quant_method.mixes and recipe.importance == "measured":
            tokens = SENSITIVITY_SAMPLES * SENSITIVITY_LENGTH
            flops += len(recipe.trial_grids) * groups * shape.forward_flops(tokens // 2, tokens // EVERY)
        if recipe.quant_method.mixes and recipe.importance == "fisher":
            flops += (8 + len(recipe.trial_grids)) * shape.forward_flops(
                SENSITIVITY_SAMPLES * SENSITIVITY_LENGTH, SENSITIVITY_SAMPLES * SENSITIVITY_LENGTH
            )
    dtype = next(plan.loaded.model.parameters()).dtype
    device = plan.source.device
    found = cost(flops, flops_per_second(str(device), dtype), shape, on_gpu=device.type == "cuda")
    if limit := plan.backend.memory_limit:
        return replace(found, peak_bytes=limit + PROGRAM_BYTES, gpu_bytes=limit if device.type == "cuda" else 0)
    return found


def _make(plan: Plan, progress: Progress) -> list[VariantEntry]:
    """Return the variants in the order asked for; the calibration's statistics are let go when the last is made."""
    with all_threads(plan.settings), plan.workshop(progress) as workshop:
        return [*(workshop.entry(recipe) for recipe in plan.settings.every_recipe), *plan.given]


def _check_baseline(plan: Plan, baseline: ScoredModel) -> None:
    """Refuse a baseline that can be no model: with it everything agrees.

    Raises:
        QevalError: it says why.
    """
    reasons = []
    if tokens := baseline.paths("tokens"):
        rows = token_rows(select(concat("tokens", tokens, TOKEN_COLUMNS), BASELINE, None), BASELINE)
        reasons.append(impossible_tokens(rows, plan.model.vocab_size))
    items = concat("items", baseline.paths("items"))
    reasons += [impossible_answers(task, item_rows(items, task, BASELINE)) for task in plan.tasks if items.num_rows]
    if reason := next(filter(None, reasons), None):
        raise QevalError(f"{NO_BASELINE} {reason}")


def _check_unchanged(plan: Plan) -> None:
    """Refuse to write a record of weights that were replaced while they were scored.

    Raises:
        QevalError: they were.
    """
    if plan.memory is not None:
        weights = plan.memory.weights_sha256()
    else:
        weights = weights_sha256(read_entries(weight_files(plan.loaded.folder)))
    if weights != plan.model.weights_sha256 or plan.loaded.config_sha256 != plan.source.config_sha256:
        raise QevalError(
            f"The weights or the configuration of {plan.model.name} were changed while they were scored, so nothing of "
            "this run holds; run the same command again."
        )


def _manifests(entries: Sequence[VariantEntry]) -> dict[str, Path]:
    """Return the manifests of the variants that were made or named, by the variant's key."""
    folders = [entry.folder for entry in entries if entry.folder is not None]
    return {read_manifest(folder).key: folder / MANIFEST for folder in folders}


def _write(
    plan: Plan, work: Work, scored: Sequence[ScoredModel], record: RunRecord, manifests: Mapping[str, Path]
) -> RunRecord:
    """Write the manifests, the index of rows and the texts, then the record that names their digests, last and alone.

    Others of the run write theirs before or after.
    """
    out = plan.settings.out
    with work.ledger.alone("record"):
        copy_manifests(out, manifests)
        work.rows.keep_only({kind: [path for each in scored for path in each.paths(kind)] for kind in ROW_KINDS})
        keep_texts(out, plan.loaded.tokenizer, plan.shards, plan.suites, plan.responses)
        record = record.model_copy(update={"chain": chain_of(out, manifests, record.settings)})
        write_run(out, record)
        if not plan.is_drawn:  # a gate that draws rows goes on from here
            finish(out)
    if not failed_names(record.variants) and not work.ledger.others:
        remove_records(states_folder(out))
    return record


def _baseline_label(plan: Plan) -> str:
    names = {"float16": "FP16", "bfloat16": "BF16", "float32": "FP32"}
    weights, compute = plan.model.weight_dtype, plan.model.compute_dtype
    return f"{names.get(weights, weights)} weights computed in {names.get(compute, compute).lower()}"


def _note_overlap(plan: Plan, progress: Progress) -> None:
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
    if not any(recipe.calibrated for recipe in plan.settings.every_recipe):
        return None
    return CalibrationRecord.model_validate({**plan.calibration().record, "overlap": plan.overlap()})


def failed_names(variants: Sequence[VariantRecord]) -> list[str]:
    """Return the names of the variants that failed."""
    return [variant.name for variant in variants if variant.status == "failed"]

"""`verify`: a run's folder against itself, and a random sample of its rows against what the model answers now.

A sample is made of whole jobs (a shard of windows, a subject of questions), computed from the model, the variants and
the texts that the run's record names, without anything that the run left in the cache but the verified variants. On the
machine, the backend and the threads of the run the same bytes are expected; elsewhere, values within a tolerance.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, chdir, contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict

from qeval.compare.plan import Plan, make_plan
from qeval.compare.run_models import baseline_model, scored_models, work_of
from qeval.compare.scored_models import ReferenceModel, ScoredModel
from qeval.compare.settings_json import settings_of
from qeval.config import BASELINE
from qeval.errors import BrokenRecordError, QevalError, UsageError
from qeval.paths import home
from qeval.progress import Progress
from qeval.score.corpus import window_calls
from qeval.score.jobs import CorpusJob, ScoringJob, Work
from qeval.store.attempts import unfinished_sentence
from qeval.store.chain import UNCHAINED, chain_problems
from qeval.store.check import FolderCheck, check_folder
from qeval.store.ledger import join_ledger
from qeval.store.rows import RowKind, read_index
from qeval.store.run import RunRecord, TaskRecord, read_run
from qeval.store.variants import verify_variant

TOLERANCES = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 2e-1}
"""The largest difference (nats, or of a probability) that other batches, threads or machines may make, by the type that
the model is computed in; fp32's is what every session promises (`backends/base.py`)."""

_TIES = {
    "top1_agreement", "top5_agreement", "top10_agreement", "sampling_kl_nats", "outside_nucleus", "rank", "pred", "acc",
    "acc_norm",
}  # fmt: skip
"""Columns that rest on which of two values is larger, which a rounding may change where they are as good as equal."""


class Derived(BaseModel):
    """One job that was computed again."""

    model_config = ConfigDict(frozen=True)

    kind: RowKind
    name: str  # of the model, as rows have it
    file: str | None  # the stored record; None where there is none
    rows: int
    identical: bool  # byte for byte
    largest_difference: float | None  # over all columns of floats; None where rows don't belong together
    ties: int  # values that rest on a comparison and came out otherwise
    problem: str | None


class Verification(BaseModel):
    """All that `qeval verify --json` prints."""

    model_config = ConfigDict(frozen=True)

    verify_version: Literal[1] = 1
    run: str
    looked_at: list[str]
    derived: list[Derived]
    tolerance: float | None
    problems: list[str]
    notes: list[str]
    undone: str | None  # why no rows could be derived

    @property
    def exit_code(self) -> int:
        """0 verified, 1 something differs, 3 rows could not be derived."""
        if self.problems:
            return 1
        return QevalError.exit_code if self.undone else 0


def verify_run(out: Path, *, sample: int, seed: int, progress: Progress) -> Verification:
    """Check every checksum of the run in `out` and compute `sample` of its jobs again, drawn by `seed`.

    Raises:
        UsageError: the folder holds no finished run.
    """
    checked = check_folder(out)
    derived: list[Derived] = []
    undone, tolerance = None, None
    try:
        record = read_run(out)
        _check_chain(out, record, checked)
        _check_variants(record, checked)
        if sample and record.imported:
            undone = "The run was imported, so nothing can be computed again; --sample 0 checks its checksums alone."
        elif sample:
            tolerance = TOLERANCES[record.model.compute_dtype]
            derived = _derive(out.absolute(), record, sample, seed, progress)
    except UsageError:
        raise
    except BrokenRecordError as error:
        checked.problems.append(str(error))
    except (QevalError, RuntimeError, OSError) as error:
        undone = str(error)
    return Verification(
        run=str(out),
        looked_at=checked.looked_at,
        derived=derived,
        tolerance=tolerance,
        problems=list(
            dict.fromkeys([*checked.problems, *(comparison.problem for comparison in derived if comparison.problem)])
        ),
        notes=checked.notes,
        undone=undone,
    )


def _check_chain(out: Path, record: RunRecord, checked: FolderCheck) -> None:
    """Look whether the folder holds a finished run, and the very files that its record names."""
    if unended := unfinished_sentence(out):
        checked.problems.append(unended)
    if record.chain is None:
        checked.problems.append(f"Nothing vouches for '{out}': {UNCHAINED}")
        return
    checked.problems.extend(chain_problems(out, record))
    named = len(record.chain.shards) + len(record.chain.manifests) + len(record.chain.texts)
    checked.looked_at.append(f"the run's record, its index, and the {named} other files that it names")


def _check_variants(record: RunRecord, checked: FolderCheck) -> None:
    """Check the checksums of the variants that are still in the cache."""
    folders = {home() / "variants" / variant.key for variant in record.variants if variant.status == "done"}
    there = sorted(folder for folder in folders if folder.exists())
    for folder in there:
        try:
            verify_variant(folder)
        except (BrokenRecordError, UsageError) as error:
            checked.problems.append(f"{error} The same command, run again, makes it again.")
    checked.looked_at.append(f"{len(there)} variants in the cache")


def _derive(out: Path, record: RunRecord, sample: int, seed: int, progress: Progress) -> list[Derived]:
    """Compute some jobs of the run again and compare them with their records."""
    with _rebuilt_plan(out, record, progress) as (plan, work, baseline):
        _check_facts(plan, record)
        models = _models(plan, baseline, progress)
        _check_records(models, record)
        owners, jobs = _jobs([baseline, *models], work, record)
        chosen = np.random.default_rng(seed).choice(len(jobs), min(sample, len(jobs)), replace=False)
        drawn = [jobs[place] for place in sorted(chosen)]
        index = read_index(out)
        _keep_baseline(baseline, work, drawn)
        for model in owners:
            model.expect_only({job.id for job in drawn})
        units = sum(job.units for job in drawn)
        with progress.phase(f"derive {len(drawn)} of {len(jobs)} jobs", units) as advance:
            derived = []
            for model in owners:
                for job in (job for job in drawn if job.model is model):
                    path = job.run(advance)
                    derived.append(_compare_records(job, path, _stored(out, index, job), plan.model.compute_dtype))
                model.close()
    return derived


def _keep_baseline(baseline: ScoredModel, work: Work, drawn: Sequence[ScoringJob]) -> None:
    """Compute the baseline's states and continuations that a sample needs, before a variant takes its place in memory.

    Where it streams, the states are computed in one go.
    """
    shards = list(dict.fromkeys(job.shard for job in drawn if isinstance(job, CorpusJob)))
    with baseline.open() as session:
        session.expect(call for shard in shards for call in window_calls(shard.windows, work.batch_tokens))
    for job in drawn:
        job.require_baseline()


@contextmanager
def _rebuilt_plan(out: Path, record: RunRecord, progress: Progress) -> Iterator[tuple[Plan, Work, ReferenceModel]]:
    """Make the run's plan and its baseline from its record, with an empty folder and no states."""
    with ExitStack() as stack:
        place = Path(stack.enter_context(TemporaryDirectory(prefix="qeval-verify-")))
        folder, settings = settings_of(record, place)
        if not folder.is_dir():
            raise QevalError(f"The run was started in {folder}, which is gone; its paths may start there.")
        stack.enter_context(chdir(folder))
        try:
            alone = replace(settings, workers=1, executor="local", worker_gpus=None)
            plan = make_plan(replace(alone, threads=record.environment.threads))
        except UsageError as error:
            raise QevalError(f"The run can't be made again: {error}") from error
        _check_same(plan, record)
        baseline = baseline_model(plan, progress, place / "fresh")
        with join_ledger(place, "", f"qeval verify {out}", progress.warn, waiting=progress.tell) as ledger:
            yield plan, work_of(plan, baseline, ledger, progress), baseline


def _check_same(plan: Plan, record: RunRecord) -> None:
    """Refuse to compare rows of other weights or texts."""
    pairs = {
        "the model's weights": (plan.model.weights_sha256, record.model.weights_sha256),
        "the corpus's tokens": (
            plan.protocol and plan.protocol.tokens_sha256,
            record.protocol and record.protocol.tokens_sha256,
        ),
        "the prompts' tokens": (
            plan.drift and plan.drift.tokens_sha256,
            record.drift and record.drift.tokens_sha256,
        ),
        "the needles' tokens": (
            plan.needle and plan.needle.tokens_sha256,
            record.needle and record.needle.tokens_sha256,
        ),
        "the chains of thought": (
            plan.traces.reasoning and plan.traces.reasoning.tokens_sha256,
            record.reasoning and record.reasoning.tokens_sha256,
        ),
        "the calls of functions": (
            plan.traces.grammar and plan.traces.grammar.tokens_sha256,
            record.grammar and record.grammar.tokens_sha256,
        ),
    }
    changed = [what for what, (now, then) in pairs.items() if now != then]
    if changed:
        raise QevalError(f"The run can't be made again: {' and '.join(changed)} are no longer what they were.")


def _models(plan: Plan, baseline: ReferenceModel, progress: Progress) -> list[ScoredModel]:
    """Return every model of the run but the baseline, its variants made again where the cache lacks them."""
    with plan.workshop(progress) as workshop:
        entries = [*(workshop.entry(recipe) for recipe in plan.settings.every_recipe), *plan.given]
    return list(scored_models(plan, entries, baseline, progress))


_REMADE = (
    "key", "method", "backend", "role", "grid", "granularity", "symmetric", "bits_per_weight", "bits_per_weight_model",
    "size_bytes", "quantized_weights", "quantized_parameters", "kept", "groups", "calibration_sha256",
)  # fmt: skip
"""What of a variant's record follows from the variant alone."""


_OF_MODEL = (
    "architecture", "weight_dtype", "layers", "hidden_size", "vocab_size", "parameters", "tied_embeddings",
    "context_length",
)  # fmt: skip
"""What of the record of a model follows from the model alone; its weights are compared before."""


def _questions_of(task: TaskRecord) -> tuple[object, ...]:
    """Return what a task's record says of the questions, whatever version of the harness asked them."""
    return task.name, task.shots, task.subjects, task.items, task.items_with_fewer_shots, task.choices


def _check_facts(plan: Plan, record: RunRecord) -> None:
    """Refuse a record that says other things of the baseline and of what is scored than the model and texts do.

    Raises:
        BrokenRecordError: it names what differs.
    """
    said: dict[str, tuple[object, object]] = {
        f"model's {name}": (getattr(record.model, name), getattr(plan.model, name)) for name in _OF_MODEL
    }
    said |= {
        "protocol": (record.protocol, plan.protocol),
        "tasks": ([_questions_of(task) for task in record.tasks], [_questions_of(task) for task in plan.tasks]),
        "drift": (record.drift, plan.drift),
        "needles": (record.needle, plan.needle),
        "reasoning": (record.reasoning, plan.traces.reasoning),
        "grammar": (record.grammar, plan.traces.grammar),
        "baseline's size": (record.baseline_size_bytes, plan.baseline_size_bytes),
        "baseline's bits per weight": (record.baseline_bits_per_weight, float(plan.source.float_bits)),
    }
    for name, (stored, ours) in said.items():
        if stored != ours:
            raise BrokenRecordError(f"The run's record says otherwise of its {name} than the model and the texts do.")


def _check_records(models: Sequence[ScoredModel], record: RunRecord) -> None:
    """Refuse a record that says other things of a variant than the variant, made again or read from the cache.

    Raises:
        BrokenRecordError: it names the variant and what differs.
    """
    scored = {model.name: model for model in models if model.error is None}
    for variant in record.variants:
        if variant.status != "done" or variant.name not in scored:
            continue
        ours = scored[variant.name].record()
        for name in _REMADE:
            if getattr(ours, name) != getattr(variant, name):
                raise BrokenRecordError(
                    f"The run's record gives '{variant.name}' another {name} than the variant itself has."
                )


def _jobs(models: Sequence[ScoredModel], work: Work, record: RunRecord) -> tuple[list[ScoredModel], list[ScoringJob]]:
    """Return the models of the run that were scored, and every job of theirs, in order."""
    done = {variant.name for variant in record.variants if variant.status == "done"} | {BASELINE}
    scored = [model for model in models if model.name in done and model.error is None]
    return scored, [job for model in scored for jobs in model.jobs(work).values() for job in jobs]


def _stored(out: Path, index: dict[str, list[str]], job: ScoringJob) -> Path | None:
    names = [name for name in index.get(job.kind, []) if name.startswith(f"{job.id.key}-")]
    return out / "rows" / job.kind / names[0] if names else None


def _compare_records(job: ScoringJob, path: Path, stored: Path | None, dtype: str) -> Derived:
    """Compare a record with the one of the same job that the run left."""
    ours = pq.ParquetFile(path).read()
    recorded = ours if stored is not None and stored.name == path.name else _table(stored)
    same = stored is not None and recorded is ours
    difference, ties = (0.0, 0) if same else (None, 0)
    if recorded is not None and not same:
        difference, ties = _difference(ours, recorded)
    problem = None
    label = f"{job.kind} of {job.model.name}"
    if stored is None:
        problem = f"The run has no record of some {label}, which its settings ask for."
    elif difference is None or not difference <= TOLERANCES[dtype]:
        far = "other rows" if difference is None else f"values up to {difference:.3g} away"
        problem = f"{stored} ({label}) does not come out again: computed from scratch it has {far}."
    return Derived(
        kind=job.kind,
        name=job.model.name,
        file=None if stored is None else stored.name,
        rows=ours.num_rows,
        identical=same,
        largest_difference=difference,
        ties=ties,
        problem=problem,
    )


def _table(path: Path | None) -> pa.Table | None:
    try:
        return None if path is None else pq.ParquetFile(path).read()
    except (OSError, pa.ArrowInvalid):
        return None  # the checksums have said so


def _difference(ours: pa.Table, recorded: pa.Table) -> tuple[float | None, int]:
    """Return the largest difference of any float and the number of ties; None where the rows are of other things."""
    if ours.schema != recorded.schema or ours.num_rows != recorded.num_rows:
        return None, 0
    largest, ties = 0.0, 0
    for name in ours.schema.names:
        one, other = ours[name].to_pylist(), recorded[name].to_pylist()
        if one == other:
            continue
        if name in _TIES:
            ties += sum(a != b for a, b in zip(one, other, strict=True))
            continue
        gap = _gap(one, other)
        if gap is None:
            return None, ties
        largest = max(largest, gap)
    return largest, ties


def _gap(one: Sequence[object], other: Sequence[object]) -> float | None:
    """Return the largest difference of two columns of floats or lists of floats; None for anything else."""
    flat = [
        (a, b)
        for x, y in zip(one, other, strict=True)
        for a, b in (zip(x, y, strict=False) if isinstance(x, list) and isinstance(y, list) else [(x, y)])
    ]
    if any(type(a) is not type(b) or not isinstance(a, float | None) for a, b in flat):
        return None
    return max((abs(a - b) for a, b in flat if isinstance(a, float) and isinstance(b, float)), default=0.0)

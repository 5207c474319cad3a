"""`verify`: a run's folder against itself, and a random sample of its rows against what the model answers now.

A sample is made of whole jobs (a shard of windows, a subject of questions), computed from the model, the variants and
the texts that the run's record names, without anything that the run left in the cache but the verified variants. On the
machine, the backend and the threads of the run the same bytes are expected; elsewhere, values within a tolerance.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import chdir, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from qeval.compare.candidates import baseline_of, contenders
from qeval.compare.prepare import Plan, prepare
from qeval.compare.remake import settings_of
from qeval.compare.scoring import Kept, Scorer, Work
from qeval.compare.standing import work_of
from qeval.compare.variants import Workshop
from qeval.config import BASELINE
from qeval.errors import BrokenRecordError, QevalError, UsageError
from qeval.executors.local import Job
from qeval.paths import home
from qeval.progress import Progress
from qeval.score.corpus import Shard
from qeval.score.drift import Continuation, Part
from qeval.store.check import Checked, check_folder
from qeval.store.ledger import joined
from qeval.store.rows import Kind, read_index
from qeval.store.run import RunRecord, read_run
from qeval.store.states import StateStore
from qeval.store.variants import verify_variant

TOLERANCES = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 2e-1}
"""The largest difference (nats, or of a probability) that other batches, threads or machines may make, by the type that
the model is computed in; fp32's is what every session promises (`backends/base.py`)."""

_TIES = {"top1_agreement", "pred", "acc", "acc_norm"}
"""Columns that rest on which of two values is larger, which a rounding may change where they are as good as equal."""


class Derived(BaseModel):
    """One job that was computed again."""

    model_config = ConfigDict(frozen=True)

    kind: Kind
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
    found = check_folder(out)
    derived: list[Derived] = []
    undone, tolerance = None, None
    try:
        record = read_run(out)
        found.looked_at.append("the run's record")
        _check_variants(record, found)
        if sample:
            tolerance = TOLERANCES[record.model.compute_dtype]
            derived = _derive(out.absolute(), record, sample, seed, progress)
    except UsageError:
        raise
    except BrokenRecordError as error:
        found.problems.append(str(error))
    except (QevalError, RuntimeError, OSError) as error:
        undone = str(error)
    return Verification(
        run=str(out),
        looked_at=found.looked_at,
        derived=derived,
        tolerance=tolerance,
        problems=[*found.problems, *(each.problem for each in derived if each.problem)],
        notes=found.notes,
        undone=undone,
    )


def _check_variants(record: RunRecord, found: Checked) -> None:
    """The checksums of the variants that are still in the cache."""
    folders = {home() / "variants" / each.key for each in record.variants if each.status == "done"}
    there = sorted(folder for folder in folders if folder.exists())
    for folder in there:
        try:
            verify_variant(folder)
        except (BrokenRecordError, UsageError) as error:
            found.problems.append(f"{error} The same command, run again, makes it again.")
    found.looked_at.append(f"{len(there)} variants in the cache")


@dataclass(frozen=True, eq=False)
class _Drawn:
    """A job of the sample, the model that it is about, and what of the baseline it needs."""

    kind: Kind
    scorer: Scorer
    job: Job
    needs: Callable[[Kept, int], object] | None = None


def _derive(out: Path, record: RunRecord, sample: int, seed: int, progress: Progress) -> list[Derived]:
    """Some jobs of the run, computed again and laid beside their records."""
    with _remade(out, record, progress) as (plan, work):
        jobs = list(_jobs(plan, work, record, progress))
        chosen = np.random.default_rng(seed).choice(len(jobs), min(sample, len(jobs)), replace=False)
        drawn = [jobs[place] for place in sorted(chosen)]
        index = read_index(out)
        for needs in (each.needs for each in drawn if each.needs is not None):
            needs(work.baseline, work.batch_tokens)
        units = sum(each.job.units for each in drawn)
        with progress.phase(f"derive {len(drawn)} of {len(jobs)} jobs", units) as advance:
            found = []
            for each, after in zip(drawn, [*drawn[1:], None], strict=True):
                made = each.job.run(advance)
                found.append(_laid_beside(each, made, _stored(out, index, each), plan.model.compute_dtype))
                if after is None or after.scorer is not each.scorer:
                    each.scorer.close()
    return found


@contextmanager
def _remade(out: Path, record: RunRecord, progress: Progress) -> Iterator[tuple[Plan, Work]]:
    """The run's plan, made from its record, with an empty folder and no states."""
    folder, settings = settings_of(record)
    if not folder.is_dir():
        raise QevalError(f"The run was started in {folder}, which is gone; its paths may start there.")
    with TemporaryDirectory(prefix="qeval-verify-") as scratch, chdir(folder):
        place = Path(scratch)
        try:
            plan = prepare(replace(settings, out=place, workers=1, threads=record.environment.threads))
        except UsageError as error:
            raise QevalError(f"The run can't be made again: {error}") from error
        _check_same(plan, record)
        baseline = baseline_of(plan, progress)
        fresh = Kept(baseline.candidate, StateStore(place / "fresh", progress.warn), baseline.logits)
        with joined(place, "", f"qeval verify {out}", progress.warn, waiting=progress.tell) as ledger:
            yield plan, work_of(plan, fresh, ledger, progress)


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
    }
    changed = [what for what, (now, then) in pairs.items() if now != then]
    if changed:
        raise QevalError(f"The run can't be made again: {' and '.join(changed)} are no longer what they were.")


def _jobs(plan: Plan, work: Work, record: RunRecord, progress: Progress) -> Iterator[_Drawn]:
    """Every job of the run, in the order of its models; those of failed variants are left out."""
    workshop = Workshop(plan.source, plan.calibration, plan.settings.seed, progress)
    entries = [*(workshop.entry(recipe) for recipe in plan.settings.recipes), *plan.given]
    scored = {each.name for each in record.variants if each.status == "done"} | {BASELINE}
    scorers = [Scorer(work.baseline.candidate)]
    scorers += [
        each.scorer() for each in contenders(plan, entries, work.baseline, progress)
        if each.name in scored and each.error is None
    ]  # fmt: skip
    for scorer in scorers:
        jobs = work.jobs(scorer)
        for shard, job in zip(work.shards, jobs["tokens"], strict=True):
            yield _Drawn("tokens", scorer, job, partial(_states, shard))
        for job in jobs["items"]:
            yield _Drawn("items", scorer, job)
        for part, job in zip(work.parts, jobs["drift"], strict=True):
            yield _Drawn("drift", scorer, job, partial(_continuation, part))


def _states(shard: Shard, baseline: Kept, batch_tokens: int) -> Tensor:
    return baseline.states(shard, batch_tokens, lambda done: None)


def _continuation(part: Part, baseline: Kept, batch_tokens: int) -> Continuation:
    return baseline.continuation(part, batch_tokens, lambda done: None)


def _stored(out: Path, index: dict[str, list[str]], drawn: _Drawn) -> Path | None:
    names = [name for name in index.get(drawn.kind, []) if name.startswith(f"{drawn.job.ticket.key}-")]
    return out / "rows" / drawn.kind / names[0] if names else None


def _laid_beside(drawn: _Drawn, made: Path, stored: Path | None, dtype: str) -> Derived:
    """A record against the one of the same job that the run left."""
    ours = pq.ParquetFile(made).read()
    theirs = ours if stored is not None and stored.name == made.name else _table(stored)
    same = stored is not None and theirs is ours
    difference, ties = (0.0, 0) if same else (None, 0)
    if theirs is not None and not same:
        difference, ties = _difference(ours, theirs)
    problem = None
    label = f"{drawn.kind} of {drawn.scorer.candidate.name}"
    if stored is None:
        problem = f"The run has no record of some {label}, which its settings ask for."
    elif difference is None or not difference <= TOLERANCES[dtype]:
        far = "other rows" if difference is None else f"values up to {difference:.3g} away"
        problem = f"{stored} ({label}) does not come out again: computed from scratch it has {far}."
    return Derived(
        kind=drawn.kind,
        name=drawn.scorer.candidate.name,
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


def _difference(ours: pa.Table, theirs: pa.Table) -> tuple[float | None, int]:
    """The largest difference of any float and the number of ties; None where the rows are of other things."""
    if ours.schema != theirs.schema or ours.num_rows != theirs.num_rows:
        return None, 0
    largest, ties = 0.0, 0
    for name in ours.schema.names:
        one, other = ours[name].to_pylist(), theirs[name].to_pylist()
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
    """The largest difference of two columns of floats or lists of floats; None for anything else."""
    flat = [
        (a, b)
        for x, y in zip(one, other, strict=True)
        for a, b in (zip(x, y, strict=False) if isinstance(x, list) and isinstance(y, list) else [(x, y)])
    ]
    if any(type(a) is not type(b) or not isinstance(a, float | None) for a, b in flat):
        return None
    return max((abs(a - b) for a, b in flat if isinstance(a, float) and isinstance(b, float)), default=0.0)

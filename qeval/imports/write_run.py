"""Write paired foreign rows as a run: the same rows, record and chain as of a run that qeval measured."""

import hashlib
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa

from qeval import __version__
from qeval.identity import digest
from qeval.imports.check_sides import Item, ModelScores
from qeval.imports.foreign_rows import HASHES
from qeval.report.align import BASELINE_NAME
from qeval.store.attempts import attempt
from qeval.store.chain import chain_of, digests_of
from qeval.store.rows import ROW_KINDS, RowKind, RowStore
from qeval.store.run import (
    RUN_VERSION,
    EnvironmentRecord,
    ImportedFile,
    ImportRecord,
    ModelRecord,
    RunRecord,
    ScoreRecord,
    TaskRecord,
    VariantRecord,
    write_run,
)
from qeval.store.schema import SCORE_TEXTS

UNKNOWN = "unknown"
_UNKNOWN_COUNT = -1
PairedSides = Mapping[str, Sequence[ModelScores]]
"""The sides of each score, the baseline's first, by the score's name."""
Prompts = dict[Item, str]
"""The sha256 of each item's prompt."""


def write_imported(out: Path, sides: PairedSides, started: datetime, command: str) -> RunRecord:
    """Write the run and return its record.

    Args:
        out: The run's folder.
        sides: The rows, paired.
        started: When the import began.
        command: What made the run.

    Raises:
        QevalError: A file can't be written.
    """
    store = RowStore(out)
    files = list(dict.fromkeys(file for each in sides.values() for side in each for file in side.files))
    digests = dict(zip(files, digests_of(files), strict=True))
    shards: dict[RowKind, list[Path]] = {kind: [] for kind in ROW_KINDS}
    prompts = {name: _prompts(each[0]) for name, each in sides.items()}
    with attempt(out, command):
        for score, each in sides.items():
            for place, side in enumerate(each):
                name = BASELINE_NAME if place == 0 else side.model
                kind: RowKind = "scores" if side.parts[0].choices is None else "items"
                columns = _columns(kind, name, side, prompts[score])
                key = digest({"import": name, "score": side.name, "files": [digests[file] for file in side.files]})
                shards[kind].append(store.write(kind, key, columns))
        store.keep_only(shards)
        record = _record(sides, prompts, digests, started, command)
        record = record.model_copy(update={"chain": chain_of(out, [], None)})
        write_run(out, record)
    return record


def _prompts(side: ModelScores) -> Prompts:
    """Return what names each item's prompt: the sha256 of its hashes, and of its own name where it has none."""
    known = [side.hashes[name].tolist() for name in HASHES if name in side.hashes]
    values = zip(*known, strict=True) if known else side.items
    texts = ("\0".join(parts) for parts in values)
    return {item: hashlib.sha256(text.encode()).hexdigest() for item, text in zip(side.items, texts, strict=True)}


def _columns(kind: RowKind, name: str, side: ModelScores, prompts: Prompts) -> dict[str, object]:
    rows = len(side.items)
    shared: dict[str, object] = {
        "variant": [name] * rows,
        "backend": [side.parts[0].format] * rows,
        "task": [side.name] * rows,
        "subject": [subject for subject, _ in side.items],
        "prompt_sha256": [prompts[item] for item in side.items],
    }
    scores = np.concatenate([part.scores for part in side.parts])
    if kind == "scores":
        return shared | {
            "item": [item for _, item in side.items],
            "repeat": np.concatenate([part.repeats for part in side.parts]).tolist(),
            "score": [None if np.isnan(score) else float(score) for score in scores],
            **{name: [None] * rows for name in SCORE_TEXTS},
        }
    answers = [part.choices for part in side.parts if part.choices is not None]
    values = np.concatenate([each.loglikelihoods for each in answers])
    ends = np.cumsum(np.concatenate([each.counts for each in answers]))
    norms = [each.acc_norm for each in answers if each.acc_norm is not None]
    return shared | {
        "item": [int(item) for _, item in side.items],
        "gold": np.concatenate([each.gold for each in answers]),
        "pred": np.concatenate([each.pred for each in answers]),
        "choice_loglikelihoods": pa.ListArray.from_arrays(np.concatenate([[0], ends]).astype(np.int32), values),
        "acc": scores,
        "acc_norm": np.concatenate(norms) if len(norms) == len(answers) else [None] * rows,
        "shots": np.full(rows, _UNKNOWN_COUNT, np.int32),
        "prompt_tokens": np.full(rows, _UNKNOWN_COUNT, np.int32),
    }


def _record(
    sides: PairedSides, prompts: Mapping[str, Prompts], digests: Mapping[Path, str], started: datetime, command: str
) -> RunRecord:
    every = list(sides.values())
    models = list(dict.fromkeys(side.model for each in every for side in each))
    files = {(side.model, file): side.parts[0].format for each in every for side in each for file in side.files}
    finished = datetime.now(UTC)
    backends = {side.model: side.parts[0].format for each in every for side in each}
    notes = dict.fromkeys(note for each in every for side in each for part in side.parts for note in part.notes)
    return RunRecord(
        run_version=RUN_VERSION,
        command=command,
        started=started.isoformat(timespec="seconds"),
        finished=finished.isoformat(timespec="seconds"),
        seconds=(finished - started).total_seconds(),
        peak_rss_bytes=psutil.Process().memory_info().rss,
        seed=0,
        model=_model(models[0]),
        baseline_label=f"{models[0]}, imported",
        baseline_size_bytes=None,
        baseline_bits_per_weight=None,
        baseline_seconds=None,
        protocol=None,
        tasks=[_task(each[0]) for each in every if each[0].parts[0].choices is not None],
        scores=[_score(each) for each in every if each[0].parts[0].choices is None],
        calibration=None,
        variants=[_variant(name, backends[name]) for name in models[1:]],
        environment=_environment(),
        metrics=list(sides),
        warnings=list(notes),
        witness=digest({name: sorted(each.items()) for name, each in prompts.items()}),
        imported=ImportRecord(
            files=[
                ImportedFile(model=model, name=file.name, sha256=digests[file], format=form)
                for (model, file), form in files.items()
            ],
            hashes=[name for name in HASHES if all(name in side.hashes for each in every for side in each)],
        ),
    )  # fmt: skip


def _model(name: str) -> ModelRecord:
    return ModelRecord(
        name=name, source="imported", hub_id=None, revision=None, architecture=UNKNOWN, weights_sha256=UNKNOWN,
        weight_dtype=UNKNOWN, compute_dtype=UNKNOWN, layers=None, hidden_size=None, vocab_size=None, parameters=None,
        tied_embeddings=None, context_length=None, notes=[],
    )  # fmt: skip


def _variant(name: str, backend: str) -> VariantRecord:
    return VariantRecord(
        name=name, method="imported", backend=backend, status="done", error=None, key=UNKNOWN, grid=UNKNOWN,
        granularity=UNKNOWN, symmetric=None, bits_per_weight=None, bits_per_weight_model=None, size_bytes=None,
        quantized_weights=None, quantized_parameters=None, kept=[], input_scales=[], details={}, importance=None,
        budget_bits_per_weight=None, groups=[], quantize_seconds=0.0, score_seconds=0.0,
    )  # fmt: skip


def _task(side: ModelScores) -> TaskRecord:
    counts = np.concatenate([part.choices.counts for part in side.parts if part.choices is not None])
    return TaskRecord(
        name=side.name,
        source="imported",
        title=side.parts[0].title,
        shots=None,
        subjects=_distinct(subject for subject, _ in side.items),
        categories={},
        items=len(set(side.items)),
        items_with_fewer_shots=0,
        choices=int(counts[0]) if (counts == counts[0]).all() else 0,
        harness=side.parts[0].format,
    )


def _score(sides: Sequence[ModelScores]) -> ScoreRecord:
    part = sides[0].parts[0]
    values = np.concatenate([each.scores for side in sides for each in side.parts])
    known = values[np.isfinite(values)]
    share = len(known) and bool(((known >= 0) & (known <= 1)).all())
    return ScoreRecord(
        name=part.name,
        title=part.title,
        better=part.better,
        unit=part.unit or ("fraction" if share else "score"),
        subjects=_distinct(subject for subject, _ in sides[0].items),
        items=len(set(sides[0].items)),
        harness=part.format,
    )


def _environment() -> EnvironmentRecord:
    """Return this machine, which measured nothing: what did is unknown."""
    return EnvironmentRecord(
        qeval=__version__, python=platform.python_version(), torch=UNKNOWN, transformers=UNKNOWN, lm_eval=UNKNOWN,
        platform=platform.platform(), processor=platform.processor() or platform.machine(), cores=os.cpu_count() or 1,
        threads=1, memory_bytes=psutil.virtual_memory().total, device=UNKNOWN,
    )  # fmt: skip


def _distinct(names: Iterable[str]) -> list[str]:
    return sorted(set(names))

"""The records of a benchmark: one a repeat of a cell, one a cell, one an engine with a variant; nothing averaged.

A *cell* is a batch size with a prompt length. Seconds are of the wall clock, bytes are bytes.

    bench.json                 what was asked for, the machine, and all records but the repeats
    rows/timings/*.parquet     the repeats, one a file, written when it ends; bench.json names those of the run

So a run that is killed loses at most the repeat that it was at.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, ValidationError

from qeval.errors import BrokenRecordError, UsageError
from qeval.files.atomic import write_text
from qeval.files.records import find_record, verify_record, write_record
from qeval.parsing import first_fault
from qeval.progress import Notify
from qeval.store.run import EnvironmentRecord, ModelRecord
from qeval.store.schema import READ_ERRORS

BENCH = "bench.json"
_SUFFIX = ".parquet"
_STRICT = ConfigDict(extra="forbid")

LEAST_EQUAL = 0.75
"""Share of an engine's tokens that must be the reference's, over all prompts: below it a model counts as broken, and no
speed of it is told. Kernels that round activations to eight bits keep 90 % and more; a wrong mask, position or scale
leaves a few per cent.
"""

CellOutcome = Literal["measured", "oom", "refused", "failed", "unspent"]
"""`refused`: the engine can't do such a cell, and says so; `unspent`: the budget ended before its first repeat."""


@dataclass(frozen=True)
class EngineRecord:
    """An engine with a variant: what ran, what it took to open, what it holds.

    `variant` is the method's own name (`awq`, `rtn:int8-channel`) or the baseline's type (`fp32`); `reason` says in
    one sentence why it could not be opened, and is None when it was; the fields after it are then undefined.
    """

    __pydantic_config__ = _STRICT

    engine: str
    variant: str
    reason: str | None
    provider: str = ""
    dtype: str = ""
    weights: str = ""
    threads: int = 0
    version: str = ""
    load_seconds: float | None = None
    compile_seconds: float | None = None
    disk_bytes: int | None = None
    weights_bytes: int | None = None


@dataclass(frozen=True)
class Timing:
    """One repeat of one cell, after the warm-ups.

    `prompt_seconds` ends with the first token's choice, so it is the time to first token; `step_seconds` has the
    latency of each further generated token, [generated - 1]. `order` is the repeat's place among all of the run.
    `energy_joules` is the device's between begin and end, or None where it can't be read; the bytes are the peaks of
    each phase and the keys and values at the end.
    """

    __pydantic_config__ = _STRICT

    engine: str
    variant: str
    batch: int
    prompt: int
    repeat: int
    order: int
    prompt_seconds: float
    step_seconds: tuple[float, ...]
    energy_joules: float | None = None
    peak_prompt_bytes: int | None = None
    peak_generate_bytes: int | None = None
    cache_bytes: int | None = None


@dataclass(frozen=True)
class CellRecord:
    """The outcome of a cell, and its peaks of memory in each phase.

    A peak is the largest of any repeat, in bytes: of a process's RSS, or of the device's memory.
    """

    __pydantic_config__ = _STRICT

    engine: str
    variant: str
    batch: int
    prompt: int
    outcome: CellOutcome
    reason: str | None = None
    peak_prompt_bytes: int | None = None
    peak_generate_bytes: int | None = None
    cache_bytes: int | None = None


@dataclass(frozen=True)
class Drift:
    """The tokens that an engine chose for one prompt against the reference logits of the same variant.

    The engine runs freely for `tokens` tokens and the reference is asked after each of them, so both see the same text.
    `equal_share` is the share of positions at which the engine's token is the reference's most likely one.
    `first_divergence` is the index of the first that isn't, or None: up to there the reference's own greedy run is the
    same. At it `kl_nats` is KL(reference || engine), `margin_nats` the reference's log-probability of its first choice
    less that of the engine's; `rejoined`: with the reference's token forced there the engine's free run chooses the
    reference's most likely tokens for the next `rejoin_tokens`.
    """

    __pydantic_config__ = _STRICT

    engine: str
    variant: str
    prompt_index: int
    tokens: int
    equal_share: float
    first_divergence: int | None
    kl_nats: float | None
    margin_nats: float | None
    rejoined: bool | None
    rejoin_tokens: int


class BenchSettings(BaseModel):
    """The settings of a benchmark."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    engines: list[str]
    variants: list[str]
    batches: list[int]
    prompts: list[int]  # tokens
    generate: int  # tokens
    budget_seconds: float
    threads: int
    device: str
    provider: str
    accuracy_level: int
    corpus: str
    corpus_sha256: str


class BenchRecord(BaseModel):
    """All of bench.json; `timings` names the files of the repeats that belong to the run as last asked for."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    bench_version: Literal[1]
    command: str
    started: str  # ISO 8601, UTC
    finished: str | None  # None while it runs, or where it was stopped
    seconds: float  # of this command; one that went on from another has timings of both
    seed: int
    model: ModelRecord
    environment: EnvironmentRecord
    settings: BenchSettings
    opened: list[EngineRecord]
    cells: list[CellRecord]
    drifts: list[Drift]
    timings: list[str]
    warnings: list[str]


TIMINGS_SCHEMA = pa.schema(
    [
        pa.field("engine", pa.string(), nullable=False),
        pa.field("variant", pa.string(), nullable=False),
        pa.field("batch", pa.int32(), nullable=False),
        pa.field("prompt", pa.int32(), nullable=False),  # tokens
        pa.field("repeat", pa.int32(), nullable=False),
        pa.field("order", pa.int32(), nullable=False),
        pa.field("prompt_seconds", pa.float64(), nullable=False),
        pa.field("step_seconds", pa.list_(pa.float64()), nullable=False),
        pa.field("energy_joules", pa.float64()),
        pa.field("peak_prompt_bytes", pa.int64()),
        pa.field("peak_generate_bytes", pa.int64()),
        pa.field("cache_bytes", pa.int64()),
    ]
)
"""One row a file: a `Timing`."""


def write_bench_record(out: Path, record: BenchRecord) -> None:
    """Write bench.json, at once and whole."""
    write_text(out / BENCH, record.model_dump_json(indent=1) + "\n")


def read_bench_record(out: Path) -> BenchRecord:
    """Read the record of a benchmark's folder.

    Raises:
        UsageError: `out` holds none. BrokenRecordError: It is torn, or of another version.
    """
    path = out / BENCH
    try:
        return BenchRecord.model_validate_json(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UsageError(f"'{out}' holds no benchmark: there is no {BENCH} in it.") from error
    except ValidationError as error:
        where, fault = first_fault(error.errors())
        raise BrokenRecordError(
            f"{path} is torn or of another version ({where}: {fault}); run the same command again."
        ) from error


def write_timing(out: Path, key: str, timing: Timing) -> Path:
    """Write one repeat under the identity of what was timed; it appears whole or not at all."""
    table = pa.Table.from_pylist([asdict(timing)], schema=TIMINGS_SCHEMA)
    return write_record(_folder(out), key, _SUFFIX, lambda path: pq.write_table(table, path))


def find_timing(out: Path, key: str, warn: Notify) -> Path | None:
    """Return the file of a repeat that is done, or None; a broken one is named and removed."""
    return find_record(_folder(out), key, _SUFFIX, warn)


def read_timings(out: Path, names: Iterable[str]) -> list[Timing]:
    """Read the repeats in files of these names, in the order in which they were taken.

    Raises:
        BrokenRecordError: A file is missing, torn or foreign; it is named.
    """
    return sorted((_read(_folder(out) / name) for name in names), key=lambda timing: timing.order)


def _folder(out: Path) -> Path:
    return out / "rows" / "timings"


def _read(path: Path) -> Timing:
    verify_record(path)
    try:
        table = pq.ParquetFile(path).read()
    except READ_ERRORS as error:
        raise BrokenRecordError(f"{path} is no Parquet file ({error}).") from error
    if not table.schema.equals(TIMINGS_SCHEMA) or table.num_rows != 1:
        raise BrokenRecordError(f"{path} holds no repeat of a benchmark of this version.")
    row: dict[str, Any] = table.to_pylist()[0]
    return Timing(**row | {"step_seconds": tuple(row["step_seconds"])})

"""Rows on disk: Parquet shards under OUT/rows/KIND (tokens, items, drift, ...), one a finished job.

`OUT/rows/index.json` says which shards belong to the run as last asked for; the others stay for the next time.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import TypeAdapter

from qeval.errors import BrokenRecordError, UsageError
from qeval.files.atomic import write_text
from qeval.files.records import find_record, verify_record, write_record
from qeval.parsing import error_reason
from qeval.progress import Notify
from qeval.store.schema import (
    DRIFT_SCHEMA,
    ENDPOINT_TOKENS_SCHEMA,
    ITEMS_SCHEMA,
    LOWER_BOUND_COLUMNS,
    NEEDLE_SCHEMA,
    OLDER_SCORES_SCHEMA,
    READ_ERRORS,
    SCORES_SCHEMA,
    TOKENS_SCHEMA,
    TOKENS_SCHEMAS,
    TRACES_SCHEMA,
)

RowKind = Literal["tokens", "items", "drift", "needle", "traces", "scores"]
SCHEMAS: dict[RowKind, pa.Schema] = {
    "tokens": TOKENS_SCHEMA,
    "items": ITEMS_SCHEMA,
    "drift": DRIFT_SCHEMA,
    "needle": NEEDLE_SCHEMA,
    "traces": TRACES_SCHEMA,
    "scores": SCORES_SCHEMA,
}
_OTHERS: dict[RowKind, tuple[pa.Schema, ...]] = {
    "tokens": (*TOKENS_SCHEMAS[1:], ENDPOINT_TOKENS_SCHEMA),
    "scores": (OLDER_SCORES_SCHEMA,),
}
"""The columns of rows from before, and of models behind endpoints."""
ROW_KINDS: tuple[RowKind, ...] = tuple(SCHEMAS)
_READABLE: dict[RowKind, pa.Schema] = {**SCHEMAS, "tokens": ENDPOINT_TOKENS_SCHEMA}
"""Every column that a shard of a kind may have."""
_SUFFIX = ".parquet"
_INDEX = TypeAdapter(dict[str, list[str]])
"""Names of shards by kind."""

_READERS = 3
"""Threads that read shards: more of them wait for one another (525 shards on 2 cores: 0.45 s, with 6 threads 0.6 s)."""


class RowStore:
    """The shards of one run folder."""

    def __init__(self, out: Path) -> None:
        """`out` is the run's folder; nothing is created until the first shard is written."""
        self.root = out / "rows"

    def write(self, kind: RowKind, key: str, columns: Mapping[str, Any]) -> Path:
        """Write one job's rows; the shard appears whole or not at all."""
        has_bound = kind == "tokens" and LOWER_BOUND_COLUMNS[0] in columns
        schema = ENDPOINT_TOKENS_SCHEMA if has_bound else SCHEMAS[kind]
        table = pa.Table.from_pydict(dict(columns), schema=schema)
        return write_record(
            self.root / kind, key, _SUFFIX, lambda path: pq.write_table(table, path, compression="zstd")
        )

    def find(self, kind: RowKind, key: str, warn: Notify) -> Path | None:
        """Return the shard of a finished job, or None where the job isn't done; a broken shard is named and removed."""
        return find_record(self.root / kind, key, _SUFFIX, warn)

    def keep_only(self, shards: Mapping[RowKind, Sequence[Path]]) -> None:
        """Write down which shards belong to the run as last asked for; the others stay, unread."""
        index = {kind: sorted(path.name for path in paths) for kind, paths in shards.items()}
        write_text(self.root / "index.json", json.dumps(index, indent=1) + "\n")

    def read(self, kind: RowKind, columns: Sequence[str] | None = None) -> pa.Table:
        """Read all rows of a kind that belong to the run, in the order of the shards' names; only `columns` if given.

        Raises:
            UsageError: The folder holds no rows.
            BrokenRecordError: A shard is missing, torn or foreign.
        """
        paths = [self.root / kind / name for name in read_index(self.root.parent).get(kind, [])]
        return concat(kind, paths, columns)


def read_index(out: Path) -> dict[str, list[str]]:
    """Return the names of the shards that belong to the run in `out` as last asked for, by kind.

    Raises:
        UsageError: The folder holds no finished rows. BrokenRecordError: The index is torn.
    """
    path = out / "rows" / "index.json"
    try:
        index = _INDEX.validate_json(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UsageError(f"'{out}' holds no finished rows ({path} is missing).") from error
    except ValueError as error:
        raise BrokenRecordError(f"{path} is torn; run the same command again to make it.") from error
    shards = [f"{kind}/{name}" for kind, names in index.items() for name in names]
    if len(set(shards)) < len(shards):
        raise BrokenRecordError(f"{path} names {max(shards, key=shards.count)} twice; run the same command again.")
    if strange := [each for each in shards if not _is_shard(each)]:
        raise BrokenRecordError(f"{path} names '{strange[0]}', which is no shard; run the same command again.")
    return index


def _is_shard(name: str) -> bool:
    kind, _, file = name.partition("/")
    return kind in ROW_KINDS and file == Path(file).name and file.endswith(_SUFFIX)


def row_kind_of(path: Path) -> RowKind:
    """Return the kind of a shard, which its folder is named by.

    Raises:
        BrokenRecordError: The folder is none of rows.
    """
    for kind in ROW_KINDS:
        if kind == path.parent.name:
            return kind
    raise BrokenRecordError(f"{path} lies in no folder of rows ({', '.join(ROW_KINDS)}).")


def concat(kind: RowKind, paths: Iterable[Path], columns: Sequence[str] | None = None) -> pa.Table:
    """Read the rows of some shards as one table, by several threads."""
    with ThreadPoolExecutor(_READERS) as threads:
        tables = list(threads.map(lambda path: _read_shard(kind, path, columns), paths))
    if not tables:
        return SCHEMAS[kind].empty_table() if columns is None else _READABLE[kind].empty_table().select(columns)
    return pa.concat_tables(tables).unify_dictionaries()


def has_known_columns(kind: RowKind, schema: pa.Schema) -> bool:
    """Return whether a shard has columns of its kind: those of this qeval or of one before, or an endpoint's."""
    return any(schema.equals(each) for each in (SCHEMAS[kind], *_OTHERS.get(kind, ())))


def _read_shard(kind: RowKind, path: Path, columns: Sequence[str] | None) -> pa.Table:
    if not path.exists():
        raise BrokenRecordError(f"{path} is missing; run the same command again to make it.")
    verify_record(path)
    try:
        file = pq.ParquetFile(path)  # read_table looks for a data set of many files first, which takes longer
        if not has_known_columns(kind, file.schema_arrow):
            raise BrokenRecordError(f"{path} has other columns than this version of qeval writes.")
        wanted = SCHEMAS[kind].names if columns is None else list(columns)
        table = file.read(columns=[name for name in wanted if name in file.schema_arrow.names], use_threads=False)
        table.validate(full=True)
    except READ_ERRORS as error:
        raise BrokenRecordError(f"{path} can't be read as Parquet ({error_reason(error)}).") from error
    return _with_columns(table, [_READABLE[kind].field(name) for name in wanted])


def _with_columns(table: pa.Table, fields: Sequence[pa.Field]) -> pa.Table:
    """Return a table with these columns alone; those that an older shard lacks are null."""
    columns = [
        table[field.name] if field.name in table.column_names else pa.nulls(table.num_rows, field.type)
        for field in fields
    ]
    return pa.table(columns, schema=pa.schema(fields, metadata=table.schema.metadata))

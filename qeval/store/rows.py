"""Rows on disk: Parquet shards under OUT/rows/tokens, OUT/rows/items and OUT/rows/drift, one a finished job.

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
from qeval.store.atomic import write_text
from qeval.store.records import Warn, find_record, verify, write_record
from qeval.store.schema import DRIFT, ITEMS, TOKENS

Kind = Literal["tokens", "items", "drift"]
SCHEMAS: dict[Kind, pa.Schema] = {"tokens": TOKENS, "items": ITEMS, "drift": DRIFT}
KINDS: tuple[Kind, ...] = tuple(SCHEMAS)
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

    def write(self, kind: Kind, key: str, columns: Mapping[str, Any]) -> Path:
        """Write one job's rows; the shard appears whole or not at all."""
        table = pa.Table.from_pydict(dict(columns), schema=SCHEMAS[kind])
        return write_record(
            self.root / kind, key, _SUFFIX, lambda path: pq.write_table(table, path, compression="zstd")
        )

    def find(self, kind: Kind, key: str, warn: Warn) -> Path | None:
        """The shard of a finished job, or None when the job isn't done; a broken shard is named and removed."""
        return find_record(self.root / kind, key, _SUFFIX, warn)

    def keep_only(self, shards: Mapping[Kind, Sequence[Path]]) -> None:
        """Write down which shards belong to the run as last asked for; the others stay, unread."""
        index = {kind: sorted(path.name for path in paths) for kind, paths in shards.items()}
        write_text(self.root / "index.json", json.dumps(index, indent=1) + "\n")

    def read(self, kind: Kind, columns: Sequence[str] | None = None) -> pa.Table:
        """All rows of a kind that belong to the run, in the order of the shards' names; only `columns` if given.

        Raises:
            UsageError: the folder holds no rows.
            BrokenRecordError: a shard is missing, torn or foreign.
        """
        paths = [self.root / kind / name for name in read_index(self.root.parent).get(kind, [])]
        return concat(kind, paths, columns)


def read_index(out: Path) -> dict[str, list[str]]:
    """The names of the shards that belong to the run in `out` as last asked for, by kind.

    Raises:
        UsageError: the folder holds no finished rows. BrokenRecordError: the index is torn.
    """
    path = out / "rows" / "index.json"
    try:
        return _INDEX.validate_json(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UsageError(f"'{out}' holds no finished rows ({path} is missing).") from error
    except ValueError as error:
        raise BrokenRecordError(f"{path} is torn; run the same command again to make it.") from error


def kind_of(path: Path) -> Kind:
    """The kind of a shard, which its folder is named by.

    Raises:
        BrokenRecordError: the folder is none of rows.
    """
    for kind in KINDS:
        if kind == path.parent.name:
            return kind
    raise BrokenRecordError(f"{path} lies in no folder of rows ({', '.join(KINDS)}).")


def concat(kind: Kind, paths: Iterable[Path], columns: Sequence[str] | None = None) -> pa.Table:
    """The rows of some shards as one table, read by several threads."""
    with ThreadPoolExecutor(_READERS) as threads:
        tables = list(threads.map(lambda path: _read_shard(kind, path, columns), paths))
    if not tables:
        empty = SCHEMAS[kind].empty_table()
        return empty if columns is None else empty.select(columns)
    return pa.concat_tables(tables).unify_dictionaries()


def _read_shard(kind: Kind, path: Path, columns: Sequence[str] | None) -> pa.Table:
    if not path.exists():
        raise BrokenRecordError(f"{path} is missing; run the same command again to make it.")
    verify(path)
    file = pq.ParquetFile(path)  # read_table looks for a data set of many files first, which takes longer than reading
    if not file.schema_arrow.equals(SCHEMAS[kind]):
        raise BrokenRecordError(f"{path} has other columns than this version of qeval writes.")
    return file.read(columns=columns, use_threads=False)

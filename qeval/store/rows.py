"""Rows on disk: Parquet shards under OUT/rows/tokens and OUT/rows/items, one a finished job.

A shard's name is `KEY-DIGEST.parquet`: the job's key (everything that changes its numbers) and the start of the
sha256 of its bytes. So a job is known to be done by its name, and a shard that is torn or was changed by hand is
known by its content. `OUT/rows/index.json` says which shards belong to the run as last asked for.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq

from qeval.errors import BrokenRecordError, UsageError
from qeval.identity import digest_file
from qeval.store.atomic import atomic_path, write_text
from qeval.store.schema import ITEMS, TOKENS

Kind = Literal["tokens", "items"]
SCHEMAS: dict[Kind, pa.Schema] = {"tokens": TOKENS, "items": ITEMS}
_DIGEST_DIGITS = 16


class RowStore:
    """The shards of one run folder."""

    def __init__(self, out: Path) -> None:
        """`out` is the run's folder; nothing is created until the first shard is written."""
        self.root = out / "rows"

    def write(self, kind: Kind, key: str, columns: dict[str, object]) -> Path:
        """Write one job's rows; the shard appears whole or not at all."""
        table = pa.Table.from_pydict(columns, schema=SCHEMAS[kind])
        folder = self.root / kind
        with atomic_path(folder / f"{key}.part") as temporary:
            pq.write_table(table, temporary, compression="zstd")
            digest = digest_file(temporary)[:_DIGEST_DIGITS]
        final = folder / f"{key}-{digest}.parquet"
        (folder / f"{key}.part").replace(final)
        return final

    def find(self, kind: Kind, key: str) -> Path | None:
        """The shard of a finished job, verified, or None when the job isn't done.

        Raises:
            BrokenRecordError: the shard's bytes are not those that were written; it names the file.
        """
        found = sorted((self.root / kind).glob(f"{key}-*.parquet"))
        for path in found:
            verify(path)
        return found[0] if found else None

    def keep_only(self, shards: dict[Kind, Sequence[Path]]) -> None:
        """Write down which shards belong to the run as last asked for; the others stay, unread."""
        index = {kind: sorted(path.name for path in paths) for kind, paths in shards.items()}
        write_text(self.root / "index.json", json.dumps(index, indent=1) + "\n")

    def read(self, kind: Kind) -> pa.Table:
        """All rows of a kind that belong to the run, in the order of the shards' names.

        Raises:
            UsageError: the folder holds no rows.
            BrokenRecordError: a shard is missing, torn or foreign.
        """
        index_path = self.root / "index.json"
        try:
            index = json.loads(index_path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise UsageError(f"'{self.root.parent}' holds no finished rows ({index_path} is missing).") from error
        paths = [self.root / kind / name for name in index.get(kind, [])]
        return concat(kind, paths)


def concat(kind: Kind, paths: Iterable[Path]) -> pa.Table:
    """The rows of some shards as one table."""
    tables = [_read_shard(kind, path) for path in paths]
    return pa.concat_tables(tables).unify_dictionaries() if tables else SCHEMAS[kind].empty_table()


def verify(path: Path) -> None:
    """Raise a BrokenRecordError unless the shard's bytes are those that were written."""
    digest = path.stem.rpartition("-")[2]
    if digest_file(path)[:_DIGEST_DIGITS] != digest:
        raise BrokenRecordError(f"{path} is torn or was changed: its checksum does not fit its name.")


def _read_shard(kind: Kind, path: Path) -> pa.Table:
    if not path.exists():
        raise BrokenRecordError(f"{path} is missing; run the same command again to make it.")
    verify(path)
    table = pq.read_table(path)
    if not table.schema.equals(SCHEMAS[kind]):
        raise BrokenRecordError(f"{path} has other columns than this version of qeval writes.")
    return table

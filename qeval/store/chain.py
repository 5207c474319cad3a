"""One chain: a run's record names the sha256 of its index, its shards, its variants' manifests, its texts and settings.

The record is written last and replaced alone, so a process that is killed between two of these files leaves a folder
whose record fits none of it. Whoever takes a figure from a run walks the chain first.
"""

import shutil
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from qeval.errors import BrokenRecordError, QevalError, UsageError
from qeval.files.atomic import atomic_path
from qeval.files.records import verify_record
from qeval.identity import digest_file
from qeval.store.rows import read_index
from qeval.store.run import RECORD, Chain, RunRecord, VariantRecord
from qeval.store.seal import content_sha256
from qeval.store.texts import text_files

MANIFESTS = "manifests"
"""Where a run keeps copies of its variants' manifests, so that its folder speaks for itself on any machine."""

UNCHAINED = (
    "it is an older qeval's, whose record does not say which rows, variants and texts are its own; run the same "
    "compare again into it: what is scored already is not scored again."
)
_THREADS = 2


class _Sizes(BaseModel):
    """The part of a manifest that the record repeats."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    key: str
    size_bytes: int
    bits_per_weight: float
    bits_per_weight_model: float
    weights: list[Any]
    stored: list[Any] = []

    @property
    def quantized_weights(self) -> int:
        return len(self.weights) + len(self.stored)


_REPEATED = ("size_bytes", "bits_per_weight", "bits_per_weight_model", "quantized_weights")


def copy_manifests(out: Path, sources: Mapping[str, Path]) -> None:
    """Keep a copy of each variant's manifest in the run folder; `sources` are the files by the variant's key.

    Raises:
        QevalError: One can't be read or written.
    """
    for key, source in sources.items():
        try:
            with atomic_path(_manifest(out, key)) as temporary:
                shutil.copyfile(source, temporary)
        except OSError as error:
            raise QevalError(f"Cannot copy {source} into {out}: {error.strerror or error}.") from error


def chain_of(out: Path, keys: Iterable[str], settings: Mapping[str, Any] | None) -> Chain:
    """Return the digests of what lies in `out` now: its index with all shards, the manifests of `keys`, the texts.

    Args:
        out: The run's folder.
        keys: The variants'.
        settings: What was asked for, or None.
    """
    shards = _shard_paths(out)
    return Chain(
        index=digest_file(out / "rows" / "index.json"),
        shards=dict(zip(shards, digests_of(list(shards.values())), strict=True)),
        manifests={key: digest_file(_manifest(out, key)) for key in sorted(set(keys))},
        texts={path.name: digest_file(path) for path in text_files(out)},
        settings=None if settings is None else content_sha256(settings),
    )


def check_chain(out: Path, record: RunRecord) -> None:
    """Refuse a run whose files are not those that its record names.

    Raises:
        BrokenRecordError: It names the first file that is missing, torn, changed or another run's.
    """
    for problem in chain_problems(out, record):
        raise BrokenRecordError(problem)


def chain_problems(out: Path, record: RunRecord) -> Iterator[str]:
    """Yield, in sentences, in what the folder of a run is not what its record says; `record` has a chain."""
    chain = record.chain
    assert chain is not None
    yield from _record_problems(out, record)
    yield from _index_problems(out, chain)
    yield from _shard_problems(out, chain)
    for key, wanted in chain.manifests.items():
        yield from _file_problems(_manifest(out, key), wanted)
    for name, wanted in chain.texts.items():
        yield from _file_problems(out / "texts" / Path(name).name, wanted)
    yield from (problem for variant in record.variants for problem in _manifest_problems(out, chain, variant))


def _record_problems(out: Path, record: RunRecord) -> Iterator[str]:
    """Yield what the record says against itself."""
    names = [variant.name for variant in record.variants]
    if len(set(names)) < len(names):
        yield f"{out / RECORD} has two variants called '{max(names, key=names.count)}'; run the same command again."
    chain = record.chain
    assert chain is not None
    settings = None if record.settings is None else content_sha256(record.settings)
    if settings != chain.settings:
        yield f"{out / RECORD} has other settings than those that its run was made with; run the same command again."


def _index_problems(out: Path, chain: Chain) -> Iterator[str]:
    path = out / "rows" / "index.json"
    if not path.is_file():
        yield f"{path} is missing; run the same command again to make it."
    elif digest_file(path) != chain.index:
        yield (
            f"{path} is not the index that {out / RECORD} was written with: it was changed, or a later command was "
            "stopped between the two; run the same command again."
        )
    else:
        try:
            if set(_shard_paths(out)) != set(chain.shards):
                yield f"{path} names other shards than {out / RECORD} does; run the same command again."
        except (BrokenRecordError, UsageError) as error:
            yield str(error)


def _shard_problems(out: Path, chain: Chain) -> Iterator[str]:
    paths = {name: out / "rows" / name for name in chain.shards}
    there = {name: path for name, path in paths.items() if path.is_file()}
    digests = dict(zip(there, digests_of(list(there.values())), strict=True))
    for name, path in paths.items():
        if name not in digests:
            yield f"{path} is missing; run the same command again to make it."
            continue
        try:
            if digests[name] != chain.shards[name]:
                verify_record(path)
                yield f"{path} is not the shard that {out / RECORD} was written with; run the same command again."
        except BrokenRecordError as error:
            yield str(error)


def _file_problems(path: Path, wanted: str) -> Iterator[str]:
    if not path.is_file():
        yield f"{path} is missing or torn; run the same command again to make it."
    elif digest_file(path) != wanted:
        yield f"{path} was changed or torn: its checksum is not the one in the record; run the same command again."


def _manifest_problems(out: Path, chain: Chain, variant: VariantRecord) -> Iterator[str]:
    """Yield what the record says of a variant otherwise than its manifest."""
    if variant.status != "done" or variant.key not in chain.manifests:
        return

    path = _manifest(out, variant.key)
    try:
        manifest = _Sizes.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return  # said already: its digest is not the record's

    if manifest.key != variant.key:
        yield f"{path} is the manifest of another variant than '{variant.name}'; run the same command again."
    for what in _REPEATED:
        recorded, listed = getattr(variant, what), getattr(manifest, what)
        if recorded != listed:
            yield (
                f"{out / RECORD} gives '{variant.name}' {what} {recorded} and its manifest {listed}; run the same "
                "command again."
            )


def _shard_paths(out: Path) -> dict[str, Path]:
    """Return the run's shards by their path below `rows/`."""
    index = read_index(out)
    return {f"{kind}/{name}": out / "rows" / kind / name for kind, names in index.items() for name in names}


def _manifest(out: Path, key: str) -> Path:
    return out / MANIFESTS / f"{Path(key).name}.json"


def digests_of(paths: list[Path]) -> list[str]:
    """Return the sha256 of each file, by several threads."""
    with ThreadPoolExecutor(_THREADS) as threads:
        return list(threads.map(digest_file, paths))

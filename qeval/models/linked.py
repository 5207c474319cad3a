"""Some files of a repository's cached copy as one folder: links, where a model's files lie in several."""

from collections.abc import Iterable
from pathlib import Path

from qeval.identity import digest
from qeval.models.cache import build_once


def linked(copy: Path, files: Iterable[str]) -> Path:
    """A folder with links to these `files` of `copy` and nothing else, made once.

    Raises:
        QevalError: the cache can't be written.
    """
    found = sorted(files)
    name = f"linked-{digest({'copy': str(copy), 'files': found})[:16]}"

    def link(folder: Path) -> None:
        for file in found:
            (folder / Path(file).name).symlink_to(copy / file)

    return build_once(name, (), link)

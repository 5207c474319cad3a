"""Some files of a repository's cached copy as one folder: links, where a model's files lie in several."""

from collections.abc import Iterable
from pathlib import Path

from qeval.identity import digest
from qeval.models.checkpoint.cache import build_once


def link_files(copy: Path, files: Iterable[str]) -> Path:
    """Return a folder with links to these `files` of `copy` and nothing else, made once.

    Raises:
        QevalError: The cache can't be written.
    """
    names = sorted(files)
    name = f"linked-{digest({'copy': str(copy), 'files': names})[:16]}"

    def link(folder: Path) -> None:
        for file in names:
            (folder / Path(file).name).symlink_to(copy / file)

    return build_once(name, (), link)

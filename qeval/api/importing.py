"""Import rows that other programs measured, as a run that is gated, compared and shown like any other."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from qeval.compare import arguments as read
from qeval.compare.arguments import PathLike
from qeval.errors import UsageError

if TYPE_CHECKING:
    from qeval.results import Run


def import_rows(
    files: Iterable[PathLike] | PathLike,
    *,
    out: PathLike,
    baseline: str | None = None,
    task: str | None = None,
    repeats: bool = False,
    higher_is_better: bool | None = None,
    command: str | None = None,
) -> "Run":
    """Make a run of rows that other programs measured: lm-eval's samples, Inspect's logs, tables of scores.

    Args:
        files: FILE, or NAME=FILE for the rows of a model called NAME; a folder stands for lm-eval's samples in it.
        out: The run's folder.
        baseline: The model that the others are compared with; default: the one called baseline, else the first.
        task: Take all files as one task of this name, each file's own task a subject of it.
        repeats: Whether several files of one task and model are repeats (seeds) of it.
        higher_is_better: The direction of metrics whose direction is not known.
        command: What the run's record says made it; default: this call.

    Returns:
        The run; `gate`, `diff` and `card` take it.

    Raises:
        UsageError: A file can't be read, or the rows can't be paired: it says which and why.
        QevalError: The run can't be written.
    """
    from qeval.imports.foreign_rows import Declarations, SourceFile  # noqa: PLC0415 - the statistics take a second to import
    from qeval.imports.import_run import import_files  # noqa: PLC0415
    from qeval.results import load_run  # noqa: PLC0415

    names = [files] if isinstance(files, str) or not isinstance(files, Iterable) else list(files)
    if not names:
        raise UsageError("Name at least two files to import, such as baseline=FILE awq=FILE.")
    sources = [SourceFile(path, name) for name, path in map(_named, names)]
    better: Literal["higher", "lower"] | None = (
        None if higher_is_better is None else "higher" if higher_is_better else "lower"
    )
    folder = read.path(out)
    import_files(
        sources, folder, Declarations(task, better), baseline=baseline, repeats=repeats,
        command=command or "qeval.import_rows()",
    )  # fmt: skip
    return load_run(folder)


def _named(file: PathLike) -> tuple[str | None, Path]:
    """Return the name and the path of NAME=FILE; a file whose own name holds an equals sign is taken as it is."""
    text = str(file)
    name, equals, path = text.partition("=")
    if not equals or "/" in name or Path(text).exists():
        return None, read.path(text)
    return name, read.path(path)

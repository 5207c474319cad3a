"""Turn what callers write into settings' values: the same rules for flags and for keyword arguments.

Errors name the flag; the keyword is the flag's name with underscores.
"""

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import cast

from qeval.compare.options import check_least
from qeval.config import parse_budget
from qeval.errors import UsageError, unknown
from qeval.escape import cut_text
from qeval.types import Sampler

Names = str | Iterable[str]
"""Several names: a comma-separated text, or one text each."""
PathLike = str | os.PathLike[str]
Variants = Mapping[str, PathLike] | Iterable[str]
"""Variants that were made before: path by name, or texts `NAME=PATH`."""

_THREADS_A_CORE, _WORKERS_A_CORE = 16, 4
_WORKERS_OF_A_CLUSTER = 4096
_LARGEST_SIZE = 2.0**60
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]i?)?B?", re.IGNORECASE)
_SAMPLING = ("top_p", "temperature")
_COMPUTE = {"fp32": "float32", "float32": "float32", "bf16": "bfloat16", "bfloat16": "bfloat16"}
_COMPUTE |= {"fp16": "float16", "float16": "float16"}


def names(value: Names | None) -> tuple[str, ...]:
    """Return the words of a comma-separated text or of several, each once.

    >>> names("rtn, awq,rtn"), names(["rtn", "awq"]), names(None)
    (('rtn', 'awq'), ('rtn', 'awq'), ())
    """
    parts = (part.strip() for part in joined(value).split(","))
    return tuple(dict.fromkeys(name for name in parts if name))


def several(value: Names | None) -> tuple[str, ...]:
    """Return the words of a comma-separated text or of several, as often as they come.

    >>> several("q8_0, q8_0"), several(None)
    (('q8_0', 'q8_0'), ())
    """
    return tuple(name for name in (part.strip() for part in joined(value).split(",")) if name)


def joined(value: Names | None) -> str:
    """Return several names as one comma-separated text, as flags take them."""
    if value is None:
        return ""
    return value if isinstance(value, str) else ",".join(str(each) for each in value)


def joined_or_none(value: Names | None) -> str | None:
    """Return several names as `joined`, or None."""
    return None if value is None else joined(value)


def corpus_text(corpus: Names | PathLike | None) -> str | None:
    """Return the corpora's names or the path of one as text, or None."""
    is_one = corpus is None or isinstance(corpus, str | os.PathLike)
    return text_or_none(corpus) if is_one else joined(cast(Names, corpus))


def text_or_none(value: object | None) -> str | None:
    """Return a name or a path as text; `~` at its start is the home folder."""
    if value is None:
        return None
    text = str(value)
    return str(path(text)) if text.startswith("~") else text


def path(value: PathLike) -> Path:
    """Return a path; `~` at its start is the home folder."""
    return Path(value).expanduser()


def path_or_none(value: PathLike | None) -> Path | None:
    """Return a path, as `path`, or None."""
    return None if value is None else path(value)


def slug(model: str) -> str:
    """Return a folder's name for a model's: `meta-llama/Llama-3.2-3B` -> `meta-llama--llama-3.2-3b`."""
    name = Path(model).name if Path(model).exists() else model.replace("/", "--")
    return re.sub(r"[^a-z0-9._-]+", "-", name.lower()).strip("-.") or "model"


def subject_names(value: Names | None) -> tuple[str, ...]:
    """Return the subjects of --subjects; none means all of them.

    Raises:
        UsageError: There is a text, and it names none.
    """
    subjects = names(value)
    if value is not None and not subjects:
        raise UsageError(f"--subjects '{joined(value)}' names no subject; leave it out for all of them.")
    return subjects


def variant_paths(value: Variants | None) -> tuple[tuple[str, Path], ...]:
    """Return the name and the path of every variant that was made before.

    Raises:
        UsageError: A text is not NAME=PATH.
    """
    if isinstance(value, Mapping):
        return tuple((name, path(where)) for name, where in value.items())
    texts = [value] if isinstance(value, str) else value or ()
    return tuple(_named_path(text) for text in texts)


def _named_path(text: str) -> tuple[str, Path]:
    name, separator, where = text.partition("=")
    if not separator or not name or not where:
        raise UsageError(f"--variant takes NAME=PATH, not '{text}'.")
    return name, path(where)


def bits_per_weight(budget: str | float | None) -> float | None:
    """Return the size of mixed variants, of `4.8bpw` or 4.8.

    Raises:
        UsageError: The budget is no size.
    """
    return None if budget is None else parse_budget(str(budget))


def accuracy_levels(value: str | int | Iterable[int]) -> tuple[int, ...]:
    """Return the accuracy levels of `1`, `4`, `1,4` or [1, 4], each once; what is no level is 0."""
    text = joined(str(value) if isinstance(value, int) else cast(Names, value))
    words = dict.fromkeys(word.strip() for word in text.split(","))
    return tuple(int(word) if word in ("1", "4") else 0 for word in words)


def compute_type(text: str | None) -> str | None:
    """Return torch's name of a compute type, or None for the device's default.

    Raises:
        UsageError: There is no such type.
    """
    if text is None or text in _COMPUTE:
        return None if text is None else _COMPUTE[text]
    raise unknown("compute type", text, ("fp32", "bf16", "fp16"))


def size_bytes(value: str | int | None) -> int | None:
    """Return the bytes of `2GiB`, `500MB` or `1.5G` (GB: 10^9; GiB and G: 2^30); a number is bytes already.

    Raises:
        UsageError: It is no size, or nothing.

    >>> size_bytes("2GiB"), size_bytes("500MB"), size_bytes(1024)
    (2147483648, 500000000, 1024)
    """
    if value is None:
        return None
    text = str(value)
    match = _SIZE.fullmatch(text.strip())
    if not match:
        raise UsageError(f"--max-memory takes a size such as 2GiB or 500MB, not '{text}'.")
    unit = (match[2] or "").upper()
    decimal = text.strip().upper().endswith("B") and not unit.endswith("I")
    size = float(match[1]) * (1000 if decimal else 1024) ** " KMGT".index((unit or " ")[0])
    if size > _LARGEST_SIZE:
        raise UsageError(f"--max-memory {cut_text(text, 40)} is more than any machine has; give a size such as 2GiB.")
    if size < 1:
        raise UsageError(f"--max-memory {text} leaves nothing; give a size such as 2GiB.")
    return int(size)


def sampling(value: str | Mapping[str, float] | Sampler | None) -> Sampler | None:
    """Return the sampler of `top_p=0.9,temperature=0.7`, or of a mapping of the same.

    Raises:
        UsageError: A name or a number is none, or no sampler has it.

    >>> sampling("top_p=0.9")
    Sampler(top_p=0.9, temperature=1.0)
    """
    if value is None or isinstance(value, Sampler):
        return value
    parts = dict(value) if isinstance(value, Mapping) else dict(part.partition("=")[::2] for part in several(value))
    if not parts:
        raise UsageError("--sampling names nothing; say for example --sampling top_p=0.9,temperature=0.7.")
    for name in parts:
        if name not in _SAMPLING:
            raise unknown("part of --sampling", name, _SAMPLING)
    try:
        return Sampler(**{name: float(number) for name, number in parts.items()})
    except (TypeError, ValueError) as error:
        raise UsageError(
            f"--sampling takes numbers such as top_p=0.9,temperature=0.7, not '{cut_text(str(value), 60)}'."
        ) from error


def lengths(value: str | int | Iterable[int]) -> tuple[int, ...]:
    """Return the numbers of tokens of `1024,4096`, a number or several, each once, the smallest first.

    Raises:
        UsageError: A word is no whole number.

    >>> lengths("4096, 1024"), lengths(512)
    ((1024, 4096), (512,))
    """
    words = names(str(value) if isinstance(value, int) else joined(cast(Names, value)))
    if wrong := [word for word in words if not re.fullmatch(r"[0-9]{1,9}", word)]:
        raise UsageError(f"--needle-lengths takes numbers of tokens such as 1024,4096, not '{cut_text(wrong[0], 40)}'.")
    return tuple(sorted({int(word) for word in words}))


def few_threads(threads: int | None) -> int | None:
    """Return a number of threads; OpenMP ends the program where it can't start them.

    Raises:
        UsageError: They are more than could ever help, or fewer than none.
    """
    cores = os.cpu_count() or 1
    check_least("--threads", threads, 1)
    if threads is not None and threads > _THREADS_A_CORE * cores:
        raise UsageError(f"--threads {threads} is more than {_THREADS_A_CORE} for each of {cores} cores; give fewer.")
    return threads


def few_workers(workers: int, *, on_ray: bool) -> int:
    """Return a number of processes that score, each of which holds the whole model; 0 leaves it to the machine.

    Raises:
        UsageError: They are more than could ever help, or fewer than none.
    """
    cores = os.cpu_count() or 1
    check_least("--workers", workers, 0)
    most = _WORKERS_OF_A_CLUSTER if on_ray else _WORKERS_A_CORE * cores
    if workers > most:
        where = "any cluster takes" if on_ray else f"{_WORKERS_A_CORE} for each of {cores} cores"
        raise UsageError(f"--workers {workers} is more than {where}, and each holds the whole model; give fewer.")
    return workers

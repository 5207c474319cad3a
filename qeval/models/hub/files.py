"""The part of a repository on the hub that is meant: a checkpoint, a GGUF file or an ONNX model, by file names."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatch
from glob import escape
from pathlib import PurePosixPath
from typing import Literal

from qeval.errors import UsageError
from qeval.models.checkpoint.weights import (
    ADAPTER,
    INDEX,
    PICKLE_SUFFIXES,
    SINGLE,
    pickle_refusal,
    shorten_list,
    split_refusal,
)

Form = Literal["checkpoint", "gguf", "onnx"]

_CONFIG, _GENAI = "config.json", "genai_config.json"
AROUND = (
    _CONFIG,
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
)
"""What lies beside the weights of any model."""
_CHECKPOINT = (
    *AROUND,
    "hf_quant_config.json",  # where Model Optimizer alone may say that the weights are codes
    "model*.safetensors",  # not consolidated.safetensors or original/, which hold the same weights again
    INDEX,
)
_TITLES: Mapping[Form, tuple[str, str]] = {
    "checkpoint": ("checkpoint", "checkpoints"),
    "gguf": ("GGUF file", "GGUF files"),
    "onnx": ("ONNX model", "ONNX models"),
}
_SPLIT = re.compile(r"-\d{5}-of-\d{5}$")
"""How llama.cpp ends the names of a model's files where it is split over several."""
_NO_MODEL = re.compile("mmproj|imatrix", re.IGNORECASE)
"""GGUF files beside a model's: what looks at images, and the statistics that quantizers take."""
_NEAREST = 3


@dataclass(frozen=True)
class RepositoryPart:
    """A model in a repository: where it lies there ('' is the root), and patterns of its files.

    A GGUF model that is split has several files, and the path of the first. An ONNX model's path is its folder, or
    its graph where the folder holds several, or its configuration lies in the root, as transformers.js has it.
    """

    form: Form
    path: str
    files: tuple[str, ...]

    @property
    def tag(self) -> str:
        """The end of a GGUF file's name, by which llama.cpp's `-hf ORG/REPO:TAG` names it: `Q4_K_M`."""
        return re.split("[-.]", _stem(self.path))[-1]

    def among(self, names: Iterable[str]) -> list[str]:
        """Return those of a repository's files that it needs."""
        return [name for name in names if any(fnmatch(name, pattern) for pattern in self.files)]


def find_part(hub_id: str, names: Sequence[str], what: str | None, *, onnx: bool) -> RepositoryPart:
    """Return the part of a repository that is meant.

    Args:
        hub_id: The repository, for messages.
        names: Its files.
        what: A file, a folder, or what a file's name ends in; None: what lies in the root, else the only thing that
            there is.
        onnx: Whether an ONNX model is of use.

    Raises:
        UsageError: There is no such part, or several; they are listed, the nearest ones or the first.
    """
    parts = list(repository_parts(names))
    part = _default_part(hub_id, names, parts) if what is None else _part_by_name(hub_id, parts, what)
    if part.form == "gguf" and len(part.files) > 1:
        raise UsageError(split_refusal(f"'{part.path}' of '{hub_id}'", PurePosixPath(part.path).name, len(part.files)))
    if part.form == "onnx":
        where = f"'{part.path}' of '{hub_id}'" if part.path else f"'{hub_id}'"
        if not onnx:
            raise UsageError(f"{where} is an ONNX model, which may be a --variant and no model itself.")
        if not _is_described(PurePosixPath(name).name for name in part.among(names)):
            raise UsageError(
                f"{where} lies without {_GENAI} or {_CONFIG} and a tokenizer beside it: download it, copy the model's "
                "there, and give the folder."
            )
    return part


def repository_parts(names: Iterable[str]) -> Iterator[RepositoryPart]:
    """Yield everything in a repository that qeval can take: folders in the order of their paths, then GGUF files."""
    folders: dict[str, list[str]] = {}
    ggufs: dict[str, list[str]] = {}
    for name in sorted(names):
        path = PurePosixPath(name)
        if path.suffix.lower() != ".gguf":
            folders.setdefault(_parent(path), []).append(path.name)
        elif not _NO_MODEL.search(path.name):
            ggufs.setdefault(f"{_parent(path)}/{_stem(name)}", []).append(name)
    for folder, folder_files in sorted(folders.items()):
        yield from _folder_parts(folder, folder_files)
    for files in ggufs.values():
        yield RepositoryPart("gguf", files[0], tuple(map(escape, files)))


def _folder_parts(folder: str, names: Sequence[str]) -> Iterator[RepositoryPart]:
    under = f"{escape(folder)}/" if folder else ""
    graphs = [name for name in names if name.endswith(".onnx")]
    if (SINGLE in names or INDEX in names) and (not folder or _CONFIG in names):
        yield RepositoryPart("checkpoint", folder, tuple(under + pattern for pattern in _CHECKPOINT))
    elif graphs and (_GENAI in names or (len(graphs) == 1 and _is_described(names))):
        yield RepositoryPart("onnx", folder, (f"{under}*",) if folder else tuple(map(escape, names)))
    else:
        around = under if _is_described(names) else ""
        for graph in graphs:
            pattern_of_graph = under + escape(graph)
            files = (pattern_of_graph, f"{pattern_of_graph}[._]data*", *(around + pattern for pattern in AROUND))
            yield RepositoryPart("onnx", f"{folder}/{graph}".lstrip("/"), files)


def _is_described(files: Iterable[str]) -> bool:
    """Return whether files in one folder say how its graph is fed, and with what tokens."""
    names = {*files}
    has_tokenizer = any(name.startswith(("tokenizer.", "vocab.")) for name in names)
    return has_tokenizer and not names.isdisjoint((_GENAI, _CONFIG))


def _default_part(hub_id: str, names: Sequence[str], parts: Sequence[RepositoryPart]) -> RepositoryPart:
    """Return the part that a repository's name alone means."""
    pickles = sorted(name for name in names if name.endswith(PICKLE_SUFFIXES))
    for part in parts:
        if not part.path or (len(parts) == 1 and not pickles):
            return part

    if pickles and not parts:
        raise UsageError(pickle_refusal(hub_id, pickles))
    if not parts and ADAPTER in names:
        raise UsageError(
            f"'{hub_id}' holds a PEFT adapter and no model: merge it with its base first, "
            "by peft's `merge_and_unload()`, and give the folder of the result."
        )
    if not parts:
        raise UsageError(
            f"'{hub_id}' has no weights: neither {SINGLE} nor {INDEX} is in it, nor a GGUF file or an ONNX model."
        )

    choices = list(_short_names(parts).values())
    raise UsageError(
        f"'{hub_id}' holds {_count_forms(parts)}; say which after a colon, as '{hub_id}:{choices[0]}': "
        f"{shorten_list(choices)}."
    )


def _part_by_name(hub_id: str, parts: Sequence[RepositoryPart], what: str) -> RepositoryPart:
    """Return the part that a file, a folder or a tag names: the first of these that there is."""
    exact = [part for part in parts if what == part.path or (_is_file(what) and part.among([what]))]
    tagged = [part for part in parts if _is_file(part.path) and _ends_in(part, what)]
    below = [part for part in parts if part.path.startswith(f"{what}/")]
    matches = exact or tagged or below
    if len(matches) == 1:
        return matches[0]
    if matches:
        paths = [part.path for part in matches]
        raise UsageError(
            f"'{what}' may be any of {_count_forms(matches)} of '{hub_id}'; give one: {shorten_list(paths)}."
        )

    near = _nearest_names(parts, what)
    hint = f" (nearest: {', '.join(near)})" if near else ""
    below_root = list(_short_names(parts).values())
    rest = f"{_count_forms(parts) or 'nothing of use'}{': ' if below_root else ''}{shorten_list(below_root)}"
    raise UsageError(f"'{hub_id}' has no '{what}' that qeval could take{hint}; it holds {rest}.")


def _is_file(path: str) -> bool:
    return path.lower().endswith((".gguf", ".onnx"))


def _ends_in(part: RepositoryPart, what: str) -> bool:
    return re.search(rf"(^|[-._]){re.escape(what)}$", _stem(part.path), re.IGNORECASE) is not None


def _nearest_names(parts: Sequence[RepositoryPart], what: str) -> list[str]:
    """Return how to spell the parts whose path, its last piece, or tag is most like `what`."""
    spelled = {
        name.casefold(): short
        for part, short in _short_names(parts).items()
        for name in (part.path, PurePosixPath(part.path).name, short)
    }
    near = [spelled[name] for name in get_close_matches(what.casefold(), spelled, n=2 * _NEAREST, cutoff=0.5)]
    return list(dict.fromkeys(near))[:_NEAREST]


def _short_names(parts: Sequence[RepositoryPart]) -> dict[RepositoryPart, str]:
    """Return how each part may be named, the shortest way: a GGUF's tag where it alone has it, else the path."""
    tags = Counter(part.tag.casefold() for part in parts if part.form == "gguf")
    return {
        part: part.tag if part.form == "gguf" and tags[part.tag.casefold()] == 1 else part.path
        for part in parts
        if part.path
    }


def _count_forms(parts: Sequence[RepositoryPart]) -> str:
    """Return how many parts there are of each form: `3 GGUF files and 1 ONNX model`."""
    counts = Counter(part.form for part in parts)
    return " and ".join(f"{counts[form]} {_TITLES[form][counts[form] > 1]}" for form in _TITLES if counts[form])


def _parent(path: PurePosixPath) -> str:
    return "" if len(path.parts) == 1 else str(path.parent)


def _stem(name: str) -> str:
    """Return the name of a file without its folder, its suffix, and which file of a split model it is."""
    return _SPLIT.sub("", PurePosixPath(name).stem)

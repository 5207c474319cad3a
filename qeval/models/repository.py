"""What of a repository on the hub is meant, by the names of its files: a checkpoint, a GGUF file or an ONNX model."""

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
from qeval.models.weights import INDEX, PICKLE_SUFFIXES, SINGLE, listed, pickle_refused, split_refused

Form = Literal["checkpoint", "gguf", "onnx"]

_CONFIG, _GENAI = "config.json", "genai_config.json"
_AROUND = (
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
    *_AROUND,
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
class Part:
    """What qeval can take of a repository: where it lies there ('' is the root), and patterns of its files.

    A GGUF model that is split has several files, and the path of the first. An ONNX model's path is its folder, or
    its graph where the folder holds several, or its configuration lies in the root, as transformers.js has it.
    """

    form: Form
    path: str
    files: tuple[str, ...]

    @property
    def tag(self) -> str:
        """What the name of a GGUF file ends in, by which llama.cpp's `-hf ORG/REPO:TAG` names it: `Q4_K_M`."""
        return re.split("[-.]", _stem(self.path))[-1]

    def among(self, names: Iterable[str]) -> list[str]:
        """Those of a repository's files that it needs."""
        return [name for name in names if any(fnmatch(name, pattern) for pattern in self.files)]


def meant(hub_id: str, names: Sequence[str], what: str | None, *, onnx: bool) -> Part:
    """The part of a repository that `what` names: a file, a folder, or what a file's name ends in.

    Without `what` it is what lies in the root, else the only thing that there is. `onnx`: whether one of that kind is
    of use.

    Raises:
        UsageError: there is no such part, or several; they are listed, the nearest ones or the first.
    """
    parts = list(parts_of(names))
    part = _unnamed(hub_id, names, parts) if what is None else _named(hub_id, parts, what)
    if part.form == "gguf" and len(part.files) > 1:
        raise UsageError(split_refused(f"'{part.path}' of '{hub_id}'", PurePosixPath(part.path).name, len(part.files)))
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


def parts_of(names: Iterable[str]) -> Iterator[Part]:
    """Everything in a repository that qeval can take: folders in the order of their paths, then GGUF files."""
    folders: dict[str, list[str]] = {}
    ggufs: dict[str, list[str]] = {}
    for name in sorted(names):
        path = PurePosixPath(name)
        if path.suffix.lower() != ".gguf":
            folders.setdefault(_parent(path), []).append(path.name)
        elif not _NO_MODEL.search(path.name):
            ggufs.setdefault(f"{_parent(path)}/{_stem(name)}", []).append(name)
    for folder, held in sorted(folders.items()):
        yield from _parts_in(folder, held)
    for files in ggufs.values():
        yield Part("gguf", files[0], tuple(map(escape, files)))


def _parts_in(folder: str, held: Sequence[str]) -> Iterator[Part]:
    under = f"{escape(folder)}/" if folder else ""
    graphs = [name for name in held if name.endswith(".onnx")]
    if (SINGLE in held or INDEX in held) and (not folder or _CONFIG in held):
        yield Part("checkpoint", folder, tuple(under + pattern for pattern in _CHECKPOINT))
    elif graphs and (_GENAI in held or (len(graphs) == 1 and _is_described(held))):
        yield Part("onnx", folder, (f"{under}*",) if folder else tuple(map(escape, held)))
    else:
        around = under if _is_described(held) else ""
        for graph in graphs:
            own = under + escape(graph)
            files = (own, f"{own}[._]data*", *(around + pattern for pattern in _AROUND))
            yield Part("onnx", f"{folder}/{graph}".lstrip("/"), files)


def _is_described(held: Iterable[str]) -> bool:
    """Whether files in one folder say how its graph is fed, and with what tokens."""
    names = {*held}
    has_tokenizer = any(name.startswith(("tokenizer.", "vocab.")) for name in names)
    return has_tokenizer and not names.isdisjoint((_GENAI, _CONFIG))


def _unnamed(hub_id: str, names: Sequence[str], parts: Sequence[Part]) -> Part:
    """What a repository's name alone means."""
    pickles = sorted(name for name in names if name.endswith(PICKLE_SUFFIXES))
    for part in parts:
        if not part.path or (len(parts) == 1 and not pickles):
            return part
    if pickles and not parts:
        raise UsageError(pickle_refused(hub_id, pickles))
    if not parts:
        raise UsageError(
            f"'{hub_id}' has no weights: neither {SINGLE} nor {INDEX} is in it, nor a GGUF file or an ONNX model."
        )
    choices = list(_spelled(parts).values())
    raise UsageError(
        f"'{hub_id}' holds {_counted(parts)}; say which after a colon, as '{hub_id}:{choices[0]}': {listed(choices)}."
    )


def _named(hub_id: str, parts: Sequence[Part], what: str) -> Part:
    """What is meant by a file, a folder or a tag: the first of these that there is."""
    exact = [part for part in parts if what == part.path or (_is_file(what) and part.among([what]))]
    tagged = [part for part in parts if _is_file(part.path) and _ends_in(part, what)]
    below = [part for part in parts if part.path.startswith(f"{what}/")]
    found = exact or tagged or below
    if len(found) == 1:
        return found[0]
    if found:
        paths = [part.path for part in found]
        raise UsageError(f"'{what}' may be any of {_counted(found)} of '{hub_id}'; give one: {listed(paths)}.")
    near = _nearest(parts, what)
    hint = f" (nearest: {', '.join(near)})" if near else ""
    below_root = list(_spelled(parts).values())
    rest = f"{_counted(parts) or 'nothing of use'}{': ' if below_root else ''}{listed(below_root)}"
    raise UsageError(f"'{hub_id}' has no '{what}' that qeval could take{hint}; it holds {rest}.")


def _is_file(path: str) -> bool:
    return path.lower().endswith((".gguf", ".onnx"))


def _ends_in(part: Part, what: str) -> bool:
    return re.search(rf"(^|[-._]){re.escape(what)}$", _stem(part.path), re.IGNORECASE) is not None


def _nearest(parts: Sequence[Part], what: str) -> list[str]:
    """How to spell the parts whose path, its last piece, or tag is most like `what`."""
    spelled = {
        name.casefold(): short
        for part, short in _spelled(parts).items()
        for name in (part.path, PurePosixPath(part.path).name, short)
    }
    near = [spelled[name] for name in get_close_matches(what.casefold(), spelled, n=2 * _NEAREST, cutoff=0.5)]
    return list(dict.fromkeys(near))[:_NEAREST]


def _spelled(parts: Sequence[Part]) -> dict[Part, str]:
    """How each part may be named, the shortest way: a GGUF's tag where it alone has it, else the path."""
    tags = Counter(part.tag.casefold() for part in parts if part.form == "gguf")
    return {
        part: part.tag if part.form == "gguf" and tags[part.tag.casefold()] == 1 else part.path
        for part in parts
        if part.path
    }


def _counted(parts: Sequence[Part]) -> str:
    """How many parts there are of each form: `3 GGUF files and 1 ONNX model`."""
    counts = Counter(part.form for part in parts)
    return " and ".join(f"{counts[form]} {_TITLES[form][counts[form] > 1]}" for form in _TITLES if counts[form])


def _parent(path: PurePosixPath) -> str:
    return "" if len(path.parts) == 1 else str(path.parent)


def _stem(name: str) -> str:
    """The name of a file without its folder, its suffix, and which file of a split model it is."""
    return _SPLIT.sub("", PurePosixPath(name).stem)

"""Texts to score and to calibrate on, and their token ids.

Two names, one text: `pydoc` gives one half of the Python reference to score and the other to calibrate on, with no
paragraph in common, and `wikitext2` gives the test and the train split. A text that both sides saw would flatter
methods that calibrate. `wikitext2-raw` is the test split's file byte for byte, blank lines included.
"""

import hashlib
import logging
import sysconfig
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from qeval.errors import UsageError, unknown

BosPolicy = Literal["auto", "always", "never"]
Part = Literal["test", "calibration"]

_CALIBRATION_DOCUMENTS = 4096
"""How many documents (WikiText-2: lines) of a hub data set are calibrated on: 300 thousand tokens or more."""

_SHARED_WORDS = 16
"""Words in a row that the halves of the Python reference may not share; some 32 tokens of its prose."""


@dataclass(frozen=True)
class Corpus:
    """A text, how it is called, and the sha256 of its UTF-8 bytes."""

    name: str
    text: str
    sha256: str


@dataclass(frozen=True)
class HubText:
    """Where a data set of texts lies on the hub, what joins its documents, and what stands for a blank one."""

    hub_id: str
    config: str | None
    split: str
    column: str
    joiner: str = "\n\n"
    blank: str = ""
    documents: int | None = None
    """The first so many; None: all."""


HUB_CORPORA: Mapping[str, HubText] = {
    "wikitext2": HubText("Salesforce/wikitext", "wikitext-2-raw-v1", "test", "text"),
    "wikitext2-raw": HubText("Salesforce/wikitext", "wikitext-2-raw-v1", "test", "text", "", " \n"),
    "c4": HubText("allenai/c4", "en", "validation", "text", documents=_CALIBRATION_DOCUMENTS),
}
HUB_CALIBRATION: Mapping[str, HubText] = {
    "wikitext2": HubText("Salesforce/wikitext", "wikitext-2-raw-v1", "train", "text"),
    "pile-val": HubText("mit-han-lab/pile-val-backup", None, "validation", "text"),
    "cnn_dailymail": HubText("abisee/cnn_dailymail", "3.0.0", "train", "article"),
}
CORPORA = ("pydoc", "code", *HUB_CORPORA)
CALIBRATION = ("pydoc", *HUB_CALIBRATION)


def load_corpus(name_or_path: str) -> Corpus:
    """The text to score: `wikitext2`, `c4`, `pydoc`, `code`, or a UTF-8 text file, taken as it is.

    Raises:
        UsageError: no such corpus or file, the file is not UTF-8, or the hub can't be reached.
    """
    if name_or_path == "code":
        return _corpus(name_or_path, code_text())
    found = HUB_CORPORA.get(name_or_path)
    return _load(name_or_path, "corpus", HUB_CORPORA, "test", documents=found.documents if found else None)


def corpus_names(text: str) -> list[str]:
    """The corpora of a comma-separated list; a file whose name holds commas is one.

    >>> corpus_names("pydoc, code")
    ['pydoc', 'code']
    """
    if Path(text).expanduser().is_file():
        return [text]
    return list(dict.fromkeys(name for name in (part.strip() for part in text.split(",")) if name))


def load_calibration(name_or_path: str) -> Corpus:
    """The text to calibrate on: `pydoc`, `wikitext2`, `pile-val`, `cnn_dailymail`, or a UTF-8 text file.

    Raises:
        UsageError: as `load_corpus`.
    """
    return _load(name_or_path, "calibration source", HUB_CALIBRATION, "calibration", documents=_CALIBRATION_DOCUMENTS)


def encode(tokenizer: Any, text: str) -> tuple[int, ...]:
    """The token ids of the whole text at once, without special tokens."""
    return tuple(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def bos_token(tokenizer: Any, policy: BosPolicy) -> int | None:
    """The id of the BOS that the policy puts in front, or None; `auto` does as the tokenizer itself does.

    No other token, such as EOS, ever stands in for BOS.

    Raises:
        UsageError: `always` with a tokenizer that has no BOS.
    """
    bos: int | None = tokenizer.bos_token_id
    if policy == "never":
        return None
    if policy == "always":
        if bos is None:
            raise UsageError("--bos always: this model's tokenizer has no BOS token; use --bos auto or never.")
        return bos
    with_special = tokenizer("a", add_special_tokens=True)["input_ids"]
    return bos if bos is not None and with_special[:2] == [bos, *encode(tokenizer, "a")][:2] else None


def _load(name: str, kind: str, hub: Mapping[str, HubText], part: Part, *, documents: int | None) -> Corpus:
    if name == "pydoc":
        return _corpus(name, pydoc_text(part))
    if name in hub:
        return _corpus(name, _hub_text(name, hub[name], documents))
    path = Path(name).expanduser()
    if path.is_file():
        return _corpus(path.name, read_text(path))
    if path.is_dir():
        raise UsageError(f"'{name}' is a folder; the {kind} must be a text file.")
    if path.suffix or len(path.parts) > 1:
        raise UsageError(f"The {kind} '{name}' does not exist: no such file.")
    offline = ["pydoc", "code"] if kind == "corpus" else ["pydoc"]
    raise unknown(f"{kind} (and no such file)", name, [*offline, *hub])


def _corpus(name: str, text: str) -> Corpus:
    return Corpus(name, text, hashlib.sha256(text.encode()).hexdigest())


def read_text(path: Path) -> str:
    """A UTF-8 text file as it is, line ends included.

    Raises:
        UsageError: it is empty, unreadable, starts with a byte order mark, or holds bytes that are not UTF-8.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(f"Cannot read '{path}': {error.strerror or error}.") from error
    if data.startswith((b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")):
        raise UsageError(f"'{path}' starts with a byte order mark, which would be scored; save it as plain UTF-8.")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UsageError(
            f"'{path}' is not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start} (line {line}) "
            "can't be decoded; convert the file first."
        ) from error
    if not text.strip():
        raise UsageError(f"'{path}' is empty.")
    return text


def pydoc_text(part: Part, topics: Mapping[str, str] | None = None) -> str:
    """One half of the Python reference of `pydoc_data`; the other half has no paragraph in common with it.

    The reference differs by Python version, so the text's sha256 belongs in the record. Topics repeat one another
    (`specialnames` holds all of `customization`): they are taken longest first, a paragraph that was seen before is
    dropped, and a topic of which less than half is left is dropped whole. The sha256 of a topic's name says
    which half it belongs to, so a new topic moves no other. Sentences recur with a word changed: the half to calibrate
    on leaves out paragraphs that share so many words in a row with the other.
    """
    kept = list(_distinct_topics(_pydoc_topics() if topics is None else topics))
    test = [text for name, text in kept if _part_of(name) == "test"]
    if part == "test":
        return "\n\n\n".join(test) + "\n"
    seen = {run for text in test for run in _word_runs(text)}
    rest = [_without(text, seen) for name, text in kept if _part_of(name) == "calibration"]
    return "\n\n\n".join(filter(None, rest)) + "\n"


def code_text() -> str:
    """An eighth of the modules of Python's own standard library, as they are, in the order of their names.

    It differs by Python version, as `pydoc_text` does. The sha256 of a module's name says whether it is taken.
    """
    folder = Path(sysconfig.get_paths()["stdlib"])
    taken = [path for path in sorted(folder.glob("*.py")) if not hashlib.sha256(path.name.encode()).digest()[0] % 8]
    if not taken:
        raise UsageError(f"This Python has no source in {folder}; pass a text file instead of 'code'.")
    return "\n\n\n".join(path.read_text(encoding="utf-8") for path in taken)


def _word_runs(text: str) -> set[tuple[str, ...]]:
    """Every run of `_SHARED_WORDS` words of a text."""
    words = text.split()
    return {tuple(words[at : at + _SHARED_WORDS]) for at in range(len(words) - _SHARED_WORDS + 1)}


def _without(text: str, seen: set[tuple[str, ...]]) -> str:
    """A text's paragraphs but for those that hold a run of words in `seen`."""
    return "\n\n".join(part for part in text.split("\n\n") if seen.isdisjoint(_word_runs(part)))


def _distinct_topics(topics: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    seen: set[str] = set()
    for name in sorted(topics, key=lambda name: (-len(topics[name]), name)):
        paragraphs = {part.strip(): part.strip("\n") for part in topics[name].split("\n\n") if part.strip()}
        new = [text for key, text in paragraphs.items() if key not in seen]
        seen.update(paragraphs)
        if new and 2 * sum(map(len, new)) >= sum(map(len, paragraphs.values())):
            yield name, "\n\n".join(new)


def _part_of(topic: str) -> Part:
    return "test" if hashlib.sha256(topic.encode()).digest()[0] % 2 else "calibration"


def _pydoc_topics() -> Mapping[str, str]:
    try:
        from pydoc_data.topics import topics  # noqa: PLC0415 - half a megabyte that some builds of Python leave out
    except ImportError as error:
        raise UsageError("This Python was built without pydoc_data; pass a text file instead of 'pydoc'.") from error
    return dict(topics)


def _hub_text(name: str, where: HubText, documents: int | None) -> str:
    """The documents of a hub data set, joined; the first `documents` of them where a limit is given."""
    import datasets  # noqa: PLC0415 - heavy, and needed for hub data sets alone

    datasets.disable_progress_bars()
    for logger in ("datasets", "huggingface_hub"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    try:
        rows = datasets.load_dataset(where.hub_id, where.config, split=where.split, streaming=documents is not None)
        texts = [row[where.column] or where.blank for row in islice(rows, documents)]
    except (OSError, RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UsageError(
            f"'{name}' ({where.hub_id} on the hub) can't be loaded: {reason.rstrip('.')}. "
            "Pass the path of a text file instead, or 'pydoc', which needs no hub."
        ) from error
    return where.joiner.join(texts)

"""Texts to score and to calibrate on, and their token ids.

Two names, one text: `pydoc` gives one half of the Python reference to score and the other to calibrate on, with no
paragraph in common, and `wikitext2` gives the test and the train split. A text that both sides saw would flatter
methods that calibrate. `wikitext2-raw` is the test split's file byte for byte, blank lines included.
"""

import hashlib
import json
import logging
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from qeval.errors import UsageError, first_line, unknown
from qeval.hub import data_offline_reason
from qeval.tasks.decoding import decode
from qeval.tasks.hub_data import HubText

BosPolicy = Literal["auto", "always", "never"]
CorpusSplit = Literal["test", "calibration"]

_LINES, _DOCUMENTS = 4096, 1024
"""How many lines of WikiText-2 and documents of other data sets are calibrated on: 300 thousand tokens or more."""

_SHARED_WORDS = 16
"""Words in a row that the halves of the Python reference may not share; some 32 tokens of its prose."""


@dataclass(frozen=True)
class Corpus:
    """A text, how it is called, and the sha256 of its UTF-8 bytes."""

    name: str
    text: str
    sha256: str


HUB_CORPORA: Mapping[str, HubText] = {
    "wikitext2": HubText("Salesforce/wikitext", "wikitext-2-raw-v1", "test", "text"),
    "wikitext2-raw": HubText("Salesforce/wikitext", "wikitext-2-raw-v1", "test", "text", "", " \n"),
    "c4": HubText("allenai/c4", "en", "validation", "text", documents=_LINES),
}
HUB_CALIBRATION: Mapping[str, HubText] = {
    "wikitext2": HubText("Salesforce/wikitext", "wikitext-2-raw-v1", "train", "text", documents=_LINES),
    "pile-val": HubText("mit-han-lab/pile-val-backup", None, "validation", "text", documents=_DOCUMENTS),
    "cnn_dailymail": HubText("abisee/cnn_dailymail", "3.0.0", "train", "article", documents=_DOCUMENTS),
}
CHAT = "chat"
"""The corpus that is no text: the baseline's answers to prompts (`tasks.chat_prompts`)."""
CORPORA = ("pydoc", "code", CHAT, *HUB_CORPORA)
CALIBRATION_CORPORA = ("pydoc", *HUB_CALIBRATION)


def load_corpus(name_or_path: str) -> Corpus:
    """Load the text to score: `wikitext2`, `c4`, `pydoc`, `code`, or a UTF-8 text file, taken as it is.

    Raises:
        UsageError: There is no such corpus or file, the file is not UTF-8, or the hub can't be reached.
    """
    if name_or_path == CHAT:
        raise UsageError("'chat' is no text but a model's own answers, which `qeval compare` scores; name a text here.")
    if name_or_path == "code":
        return _corpus(name_or_path, code_text())
    return _load(name_or_path, "corpus", HUB_CORPORA, "test")


def corpus_names(text: str) -> list[str]:
    """Return the corpora of a comma-separated list; a file whose name holds commas is one.

    >>> corpus_names("pydoc, code")
    ['pydoc', 'code']
    """
    if Path(text).expanduser().is_file():
        return [text]
    return list(dict.fromkeys(name for name in (part.strip() for part in text.split(",")) if name))


def load_calibration(name_or_path: str) -> Corpus:
    """Load the text to calibrate on: `pydoc`, `wikitext2`, `pile-val`, `cnn_dailymail`, or a UTF-8 text file.

    Raises:
        UsageError: As `load_corpus`.
    """
    return _load(name_or_path, "calibration source", HUB_CALIBRATION, "calibration")


def encode(tokenizer: Any, text: str) -> tuple[int, ...]:
    """Return the token ids of the whole text, encoded at once, without special tokens."""
    return tuple(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def bos_token(tokenizer: Any, policy: BosPolicy) -> int | None:
    """Return the id of the BOS that a policy puts in front, or None.

    No other token, such as EOS, ever stands in for BOS.

    Args:
        tokenizer: The model's.
        policy: Whether there is a BOS; `auto` does as the tokenizer itself does.

    Raises:
        UsageError: The policy is `always`, with a tokenizer that has no BOS.
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


def _load(name: str, kind: str, hub: Mapping[str, HubText], part: CorpusSplit) -> Corpus:
    if name == "pydoc":
        return _corpus(name, pydoc_text(part))
    if name in hub:
        return _corpus(name, _hub_text(name, hub[name]))
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
    """Read a UTF-8 text file as it is, line ends included.

    Raises:
        UsageError: It is empty, unreadable, starts with a byte order mark, holds NUL bytes or is not UTF-8.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(f"Cannot read '{path}': {error.strerror or error}.") from error
    text = decode(data, path)
    if not text.strip():
        raise UsageError(f"'{path}' is empty.")
    return text


def pydoc_text(part: CorpusSplit, topics: Mapping[str, str] | None = None) -> str:
    """Return one half of the Python reference of `pydoc_data`; the halves have no paragraph in common.

    The reference differs by Python version, so the text's sha256 belongs in the record. Topics repeat one another
    (`specialnames` holds all of `customization`): they are taken longest first, a paragraph of an earlier topic is
    dropped, and a topic of which less than half is left is dropped whole. The sha256 of a topic's name says
    which half it belongs to, so a new topic moves no other. Sentences recur with a word changed: the half to calibrate
    on leaves out paragraphs that share so many words in a row with the other.

    Args:
        part: Which half.
        topics: Texts by name, in place of the reference of this Python.
    """
    distinct = list(_distinct_topics(_pydoc_topics() if topics is None else topics))
    test = [text for name, text in distinct if _part_of(name) == "test"]
    if part == "test":
        return "\n\n\n".join(test) + "\n"
    test_runs = {run for text in test for run in _word_runs(text)}
    rest = [_without(text, test_runs) for name, text in distinct if _part_of(name) == "calibration"]
    return "\n\n\n".join(filter(None, rest)) + "\n"


def code_text() -> str:
    """Return an eighth of the modules of Python's standard library, as they are, in the order of their names.

    It differs by Python version, as `pydoc_text` does. The sha256 of a module's name says whether it is taken.
    """
    folder = Path(sysconfig.get_paths()["stdlib"])
    modules = [path for path in sorted(folder.glob("*.py")) if not hashlib.sha256(path.name.encode()).digest()[0] % 8]
    if not modules:
        raise UsageError(f"This Python has no source in {folder}; pass a text file instead of 'code'.")
    return "\n\n\n".join(path.read_text(encoding="utf-8") for path in modules)


def _word_runs(text: str) -> set[tuple[str, ...]]:
    """Return every run of `_SHARED_WORDS` words of a text."""
    words = text.split()
    return {tuple(words[at : at + _SHARED_WORDS]) for at in range(len(words) - _SHARED_WORDS + 1)}


def _without(text: str, runs: set[tuple[str, ...]]) -> str:
    """Return a text's paragraphs but for those that hold one of `runs` of words."""
    return "\n\n".join(part for part in text.split("\n\n") if runs.isdisjoint(_word_runs(part)))


def _distinct_topics(topics: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    seen: set[str] = set()
    for name in sorted(topics, key=lambda name: (-len(topics[name]), name)):
        paragraphs = {part.strip(): part.strip("\n") for part in topics[name].split("\n\n") if part.strip()}
        new = [text for key, text in paragraphs.items() if key not in seen]
        seen.update(paragraphs)
        if new and 2 * sum(map(len, new)) >= sum(map(len, paragraphs.values())):
            yield name, "\n\n".join(new)


def _part_of(topic: str) -> CorpusSplit:
    return "test" if hashlib.sha256(topic.encode()).digest()[0] % 2 else "calibration"


def _pydoc_topics() -> Mapping[str, str]:
    try:
        from pydoc_data.topics import topics  # noqa: PLC0415 - half a megabyte that some builds of Python leave out
    except ImportError as error:
        raise UsageError("This Python was built without pydoc_data; pass a text file instead of 'pydoc'.") from error
    return dict(topics)


def _hub_text(name: str, where: HubText) -> str:
    """Return the documents of a hub data set, joined: as they were stored here, else from the hub or its cache."""
    text = where.read()
    if text is None:
        rows = hub_rows(name, where, "Pass the path of a text file instead, or 'pydoc', which needs no hub.")
        text = where.joiner.join(row[where.column] or where.blank for row in rows)
        where.write(text)
    return text


def hub_rows(name: str, where: HubText, instead: str) -> list[Mapping[str, Any]]:
    """Return the rows of a hub data set, the first `where.documents` of them.

    Args:
        name: What the error calls it.
        where: Where it lies.
        instead: What to do without it, in a sentence.

    Raises:
        UsageError: It can't be loaded, or has no such column.
    """
    import datasets  # noqa: PLC0415 - heavy, and needed for hub data sets alone

    datasets.disable_progress_bars()
    for logger in ("datasets", "huggingface_hub"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    # the first documents of a large data set are streamed; without the hub only a copy of all of it is of use
    streams = where.documents is not None and data_offline_reason() is None
    try:
        rows = datasets.load_dataset(where.hub_id, where.config, split=where.split, streaming=streams)
        found: list[Mapping[str, Any]] = list(islice(rows, where.documents))
    except (OSError, RuntimeError, ValueError) as error:
        raise UsageError(
            f"'{name}' ({where.hub_id} on the hub) can't be loaded: {first_line(error)}. {instead}"
        ) from error
    if found and where.column not in found[0]:
        raise UsageError(f"'{name}' ({where.hub_id} on the hub) has no column {where.column}. {instead}")
    return found


def fetch_lines(where: HubText, columns: Sequence[str], instead: str) -> str:
    """Return the rows of a data set as JSON lines: as they were stored here, else from the hub or its cache.

    Args:
        where: Where it lies; its column is one that every row has.
        columns: What is kept of a row, where it has it.
        instead: What to do without it, in a sentence.

    Raises:
        UsageError: It can't be loaded.
    """
    text = where.read()
    if text is None:
        rows = hub_rows(where.hub_id, where, instead)
        kept = ({name: row[name] for name in columns if row.get(name)} for row in rows)
        text = "\n".join(json.dumps(row, ensure_ascii=False) for row in kept)
        where.write(text)
    return text

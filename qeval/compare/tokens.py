"""The token rows of a run: from flags to a protocol, its text, its windows, and what a reader must know of them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from qeval.compare.chat import ChatWork
from qeval.compare.settings import CorpusChoice
from qeval.errors import UsageError
from qeval.identity import digest
from qeval.models.info import LoadedModel
from qeval.models.vocabulary import check_ids
from qeval.score.corpus import Shard, shards_of
from qeval.store.run import ChatRecord, CorpusPart, ProtocolRecord
from qeval.tasks.corpus import CHAT, Corpus, bos_token, corpus_names, encode, load_corpus
from qeval.tasks.documents import prefix_token, rolling
from qeval.tasks.protocols import Protocol, choose_protocol
from qeval.tasks.windows import Window, Windows

_GEMMA = "Gemma"
_COUNTS = ("windows", "windows_available", "kl_positions", "nll_positions")
_OF_PART = ("corpus", "corpus_sha256", "tokens_sha256", "windows", "windows_available")

_Part = tuple[ProtocolRecord, tuple[Window, ...]]


@dataclass(frozen=True)
class _Cut:
    """A text's windows, the id that stands where BOS does, and the words and bytes of its documents, if counted."""

    windows: Windows
    bos: int | None
    words: int | None = None
    bytes: int | None = None


def protocol_of(choice: CorpusChoice, loaded: LoadedModel) -> Protocol:
    """Return the protocol that was asked for, over one text, on this model.

    Raises:
        UsageError: an unknown name, flags that exclude each other, or a window longer than the model's context.
    """
    context = loaded.info.context_length
    protocol = choose_protocol(
        name=choice.protocol,
        corpus=choice.corpus,
        window=choice.window,
        stride=choice.stride,
        convention=choice.convention,
        context=context,
    )
    if protocol.window > context:
        raise UsageError(
            f"A window of {protocol.window} tokens is longer than the model's context of {context}; "
            "give a smaller --window."
        )
    return protocol


def token_work(
    choice: CorpusChoice, loaded: LoadedModel, chat: ChatWork | None = None
) -> tuple[ProtocolRecord, tuple[Shard, ...]]:
    """Return what is scored of texts: the record of it, and the shards.

    Args:
        choice: The texts and their windows.
        loaded: The model.
        chat: The baseline's answers, where one of the texts is they.

    Raises:
        UsageError: as `protocol_of`, and where the text is not there or too short.
    """
    parts = [
        (chat.record, chat.windows) if chat is not None and each.corpus == CHAT else _one(each, loaded)
        for each in each_corpus(choice)
    ]
    record, windows = parts[0] if len(parts) == 1 else _together(parts)
    return record, shards_of(windows)


def each_corpus(choice: CorpusChoice) -> list[CorpusChoice]:
    """Return the choice of each text, where several were asked for."""
    if choice.corpus is None:
        return [choice]
    names = corpus_names(choice.corpus)
    if not names:
        raise UsageError("--corpus names no text; say for example --corpus pydoc,code.")
    return [replace(choice, corpus=name) for name in names]


def _one(choice: CorpusChoice, loaded: LoadedModel) -> _Part:
    protocol = protocol_of(choice, loaded)
    corpus = load_corpus(protocol.corpus)
    cut = _cut(protocol, corpus, choice, loaded)
    windows = cut.windows
    used = (token for window in windows.windows for token in window.tokens)
    check_ids(used, loaded.info.vocab_size, loaded.tokenizer, f"The text '{corpus.name}'")
    record = ProtocolRecord(
        name=protocol.name,
        corpus=corpus.name,
        corpus_sha256=corpus.sha256,
        tokens_sha256=windows.tokens_sha256,
        window=protocol.window,
        stride=protocol.stride,
        windows=len(windows.windows),
        windows_available=windows.available,
        bos=windows.bos is not None,
        kl_positions=windows.kl_count,
        nll_positions=windows.nll_count,
        convention=protocol.convention.name,
        bos_policy=choice.bos,
        bos_placement=windows.bos,
        bos_token=None if cut.bos is None else str(loaded.tokenizer.convert_ids_to_tokens(cut.bos)),
        words=cut.words,
        bytes=cut.bytes,
    )
    return record, windows.windows


def _together(parts: Sequence[_Part]) -> _Part:
    """Join several texts' windows one after the other, under one record that says which are whose.

    Raises:
        UsageError: the convention counts words, or two texts have one name.
    """
    records = [record for record, _ in parts]
    first = next((record for record in records if record.chat is None), records[0])  # its windows have a size
    names = [record.corpus for record in records]
    if first.words is not None:
        raise UsageError(f"--convention {first.convention} counts the words of one --corpus at a time.")
    if len(set(names)) < len(names):
        raise UsageError(f"Two of the corpora are called {max(names, key=names.count)}; rename one.")
    starts = list(accumulate((record.windows for record in records), initial=0))
    chats = [_moved(record.chat, start) for record, start in zip(records, starts, strict=False) if record.chat]
    merged = first.model_copy(
        update={
            "name": ", ".join(record.name for record in records),
            "corpus": " + ".join(names),
            "corpus_sha256": digest({"corpora": [record.corpus_sha256 for record in records]}),
            "tokens_sha256": digest({"tokens": [record.tokens_sha256 for record in records]}),
            **{name: sum(getattr(record, name) for record in records) for name in _COUNTS},
            "parts": [
                CorpusPart(first=start, **{name: getattr(record, name) for name in _OF_PART})
                for record, start in zip(records, starts, strict=False)
            ],
            "chat": next(iter(chats), None),
        }
    )
    return merged, tuple(window for _, windows in parts for window in windows)


def _moved(chat: ChatRecord, start: int) -> ChatRecord:
    """Return the record of answers whose first window is number `start`."""
    answers = [each.model_copy(update={"window": each.window + start}) for each in chat.answers]
    return chat.model_copy(update={"answers": answers})


def bos_warnings(record: ProtocolRecord, loaded: LoadedModel) -> list[str]:
    """Warn of where BOS stands: of models that break without it, and of a token that is not BOS."""
    warnings = []
    if record.bos_placement == "document" and record.bos_token != loaded.tokenizer.bos_token:
        warnings.append(
            f"{record.convention} puts {record.bos_token} before each page, as lm-evaluation-harness does where a "
            "tokenizer has no BOS; compare these figures with its own alone."
        )
    if loaded.info.architecture.startswith(_GEMMA) and (why := _missing_bos(record)):
        warnings.append(
            f"This is a Gemma model and {why}. Gemma was trained with BOS in front of every sequence and breaks "
            "without it: LAMBADA's perplexity on Gemma-7B is 5,909,545,606 without BOS and 3.464 with it "
            "(lm-evaluation-harness, pull request 1465). Figures of such windows say nothing of the model."
        )
    return warnings


def _missing_bos(record: ProtocolRecord) -> str | None:
    """Say which windows have no BOS, or return None."""
    if record.bos_placement is None:
        return f"no window has a BOS (--bos {record.bos_policy})"
    if record.bos_placement == "text" and record.windows > 1:
        return f"{record.name} has one BOS at the start of the text, so {record.windows - 1} windows have none"
    return None


def _cut(protocol: Protocol, corpus: Corpus, choice: CorpusChoice, loaded: LoadedModel) -> _Cut:
    if protocol.convention.scoring == "rolling":
        if choice.bos == "never":
            raise UsageError(f"--bos never: {protocol.convention.name} puts a token before each page; leave --bos out.")
        counted = rolling(loaded.tokenizer, corpus.text, protocol.window, choice.max_windows)
        return _Cut(counted.windows, prefix_token(loaded.tokenizer), counted.words, counted.bytes)
    bos = bos_token(loaded.tokenizer, choice.bos)
    ids = encode(loaded.tokenizer, corpus.text)
    return _Cut(protocol.windows(ids, bos=bos, max_windows=choice.max_windows), bos)

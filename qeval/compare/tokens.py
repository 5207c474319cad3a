"""The token rows of a run: from flags to a protocol, its text, its windows, and what a reader must know of them."""

from dataclasses import dataclass

from qeval.compare.settings import CorpusChoice
from qeval.errors import UsageError
from qeval.models.info import LoadedModel
from qeval.score.corpus import Shard, shards_of
from qeval.store.run import ProtocolRecord
from qeval.tasks.corpus import Corpus, bos_token, encode, load_corpus
from qeval.tasks.documents import prefix_token, rolling
from qeval.tasks.protocols import Protocol, choose
from qeval.tasks.windows import Windows

_GEMMA = "Gemma"


@dataclass(frozen=True)
class _Cut:
    """A text's windows, the id that stands where BOS does, and the words and bytes of its documents, if counted."""

    windows: Windows
    bos: int | None
    words: int | None = None
    bytes: int | None = None


def protocol_of(asked: CorpusChoice, loaded: LoadedModel) -> Protocol:
    """The protocol that was asked for, on this model.

    Raises:
        UsageError: an unknown name, flags that exclude each other, or a window longer than the model's context.
    """
    context = loaded.info.context_length
    protocol = choose(
        name=asked.protocol,
        corpus=asked.corpus,
        window=asked.window,
        stride=asked.stride,
        convention=asked.convention,
        context=context,
    )
    if protocol.window > context:
        raise UsageError(
            f"A window of {protocol.window} tokens is longer than the model's context of {context}; "
            "give a smaller --window."
        )
    return protocol


def token_work(asked: CorpusChoice, loaded: LoadedModel) -> tuple[ProtocolRecord, tuple[Shard, ...]]:
    """What is scored of a text: the record of it, and the shards.

    Raises:
        UsageError: as `protocol_of`, and where the text is not there or too short.
    """
    protocol = protocol_of(asked, loaded)
    corpus = load_corpus(protocol.corpus)
    cut = _cut(protocol, corpus, asked, loaded)
    windows = cut.windows
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
        convention=protocol.convention,
        bos_policy=asked.bos,
        bos_placement=windows.bos,
        bos_token=None if cut.bos is None else str(loaded.tokenizer.convert_ids_to_tokens(cut.bos)),
        words=cut.words,
        bytes=cut.bytes,
    )
    return record, shards_of(windows.windows)


def bos_warnings(record: ProtocolRecord, loaded: LoadedModel) -> list[str]:
    """What a reader must know of where BOS stands: models that break without it, and a token that is not BOS."""
    found = []
    if record.bos_placement == "document" and record.bos_token != loaded.tokenizer.bos_token:
        found.append(
            f"{record.convention} puts {record.bos_token} before each page, as lm-evaluation-harness does where a "
            "tokenizer has no BOS; compare these figures with its own alone."
        )
    if loaded.info.architecture.startswith(_GEMMA) and (why := _missing_bos(record)):
        found.append(
            f"This is a Gemma model and {why}. Gemma was trained with BOS in front of every sequence and breaks "
            "without it: LAMBADA's perplexity on Gemma-7B is 5,909,545,606 without BOS and 3.464 with it "
            "(lm-evaluation-harness, pull request 1465). Figures of such windows say nothing of the model."
        )
    return found


def _missing_bos(record: ProtocolRecord) -> str | None:
    """Which windows have no BOS, or None."""
    if record.bos_placement is None:
        return f"no window has a BOS (--bos {record.bos_policy})"
    if record.bos_placement == "text" and record.windows > 1:
        return f"{record.name} has one BOS at the start of the text, so {record.windows - 1} windows have none"
    return None


def _cut(protocol: Protocol, corpus: Corpus, asked: CorpusChoice, loaded: LoadedModel) -> _Cut:
    if protocol.scoring == "rolling":
        if asked.bos == "never":
            raise UsageError(f"--bos never: {protocol.convention} puts a token before each page; leave --bos out.")
        counted = rolling(loaded.tokenizer, corpus.text, protocol.window, asked.max_windows)
        return _Cut(counted.windows, prefix_token(loaded.tokenizer), counted.words, counted.bytes)
    bos = bos_token(loaded.tokenizer, asked.bos)
    ids = encode(loaded.tokenizer, corpus.text)
    return _Cut(protocol.windows(ids, bos=bos, max_windows=asked.max_windows), bos)

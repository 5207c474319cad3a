"""The comparability witness: one hash of exactly what is scored, and why two sides' differ.

It covers the token ids of every window, the positions that are scored, where BOS stands, and the token ids of every
question, of every prompt that is continued, of every item of other tasks, and of every trace. Each side's is made with
its own tokenizer; where they differ nothing is compared.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from qeval.score.choices import prompt_sha256
from qeval.score.corpus import Shard
from qeval.store.run import DriftRecord, NeedleRecord, ProtocolRecord
from qeval.tasks.corpus import BosPolicy, bos_token, encode
from qeval.tasks.harness import Suite
from qeval.tasks.responses import ResponseSuite

WITNESS_VERSION = 1
"""Part of every witness: raise it when the same sequences hash otherwise."""

PROBES = (
    "Hello world", " 3.14159  2026-01-31\n\n\tdef f(x):\n        return x ** 2\n", "naïve Zürich 東京 привет 👩‍🚀",
    "don't WON'T i̇stanbul ﬁne … — “quotes”", "<s> </s> <|endoftext|> [INST]",
)  # fmt: skip
"""Texts that tokenizers disagree on: spaces, digits, other scripts, joined characters, names of special tokens."""


def other_hashes(traces: Sequence[str], needle: NeedleRecord | None) -> tuple[str, ...]:
    """Return the kinds and hashes of texts that are forced on every model, for `witness_of`.

    Args:
        traces: The hashes of the baseline's chains of thought and calls.
        needle: The record of haystacks.
    """
    hidden = [f"needles {needle.tokens_sha256}"] if needle else []
    return (*(f"traces {each}" for each in traces), *hidden)


def witness_of(
    shards: Iterable[Shard],
    suites: Iterable[Suite],
    protocol: ProtocolRecord | None,
    drift: DriftRecord | None = None,
    responses: Iterable[ResponseSuite] = (),
    others: Sequence[str] = (),
) -> str:
    """Return the hash of what a run scores: windows with positions, questions, and whether BOS stands in the windows.

    The BOS in front of a question is among the ids of its prompt; so it is with prompts that are continued. A chat
    template counts by its text. `traces` are the hashes of what tasks force on every model.
    """
    bos = protocol.bos if protocol else None
    sha = hashlib.sha256(f"witness {WITNESS_VERSION} bos {bos}".encode())
    prompts = [b"continued " + drift.tokens_sha256.encode()] if drift else []
    prompts += [each.encode() for each in others]
    prompts += [b"template " + protocol.chat.template_sha256.encode()] if protocol and protocol.chat else []
    for part in chain(_parts(shards, suites), prompts, _asked(responses)):
        sha.update(len(part).to_bytes(8, "little") + part)
    return sha.hexdigest()[:32]


def _parts(shards: Iterable[Shard], suites: Iterable[Suite]) -> Iterator[bytes]:
    for shard in shards:
        for window in shard.windows:
            for numbers in (window.tokens, window.kl_positions, window.nll_positions):
                yield np.asarray(numbers, dtype="<i8").tobytes()
    for suite in suites:
        for question in suite.questions:
            named = (suite.info.name, question.subject, str(question.item), prompt_sha256(question))
            yield "\0".join(named).encode()


def _asked(responses: Iterable[ResponseSuite]) -> Iterator[bytes]:
    for suite in responses:
        for item in suite.items:
            yield "\0".join((suite.info.name, item.subject, str(item.item), item.sha256)).encode()


def has_tokenizer(folder: Path) -> bool:
    """Return whether a folder holds one at all."""
    return any(folder.glob("tokenizer*")) or (folder / "vocab.json").is_file()


def same_tokenizer(ours: Any, theirs: Any) -> bool:
    """Return whether two tokenizers are one, rule by rule, so that no text need be encoded to know."""
    mine, other = (getattr(each, "backend_tokenizer", None) for each in (ours, theirs))
    if mine is None or other is None or ours.bos_token_id != theirs.bos_token_id:
        return False
    return bool(mine.to_str() == other.to_str())


def why_other(ours: Any, theirs: Any, texts: Sequence[str], policy: BosPolicy) -> str | None:
    """In what two tokenizers differ on the texts of a run, in words; None where they give the same ids."""
    for text in texts:
        mine, other = encode(ours, text), encode(theirs, text)
        if mine != other:
            return f"other token ids than the baseline for the same text ({_first(mine, other)})"
    mine_bos, other_bos = bos_token(ours, policy), bos_token(theirs, policy)
    if mine_bos != other_bos:
        return f"another BOS than the baseline ({_bos(other_bos)} where the baseline has {_bos(mine_bos)})"
    return None


def notes_on(ours: Any, theirs: Any) -> dict[str, str]:
    """Return what differs without changing scores: ids of texts that this run does not have, the chat template."""
    told = {}
    other = [text for text in PROBES if encode(ours, text) != encode(theirs, text)]
    if other:
        told["tokenizer"] = f"gives other ids for texts that this run does not score, such as {other[0]!r}"
    if theirs.chat_template and theirs.chat_template != ours.chat_template:
        told["chat template"] = "another than the baseline's, in which every side is asked"
    return told


def _first(mine: Sequence[int], other: Sequence[int]) -> str:
    where = next((i for i, (a, b) in enumerate(zip(mine, other, strict=False)) if a != b), None)
    return "one is longer" if where is None else f"the first at token {where}: {mine[where]}, {other[where]}"


def _bos(token: int | None) -> str:
    return "none" if token is None else f"id {token}"

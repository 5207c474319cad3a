"""The text behind a run's rows, for its readers: the text of tokens and of questions."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from qeval.score.corpus import Shard
from qeval.store.texts import QuestionText, WindowText, write_texts
from qeval.tasks.corpus import encode
from qeval.tasks.harness import Suite
from qeval.tasks.responses import ResponseSuite

TORN = "\N{REPLACEMENT CHARACTER}"
"""What a tokenizer decodes the bytes of half a character to."""

Decode = Callable[[Sequence[Sequence[int]]], list[str]]


def keep_texts(
    out: Path,
    tokenizer: Any,
    shards: Iterable[Shard],
    suites: Iterable[Suite],
    responses: Iterable[ResponseSuite] = (),
) -> None:
    """Write the texts of everything that a run scores into its folder `out`."""
    windows = [(number, w.tokens) for shard in shards for number, w in enumerate(shard.windows, shard.first)]
    texts = token_texts(decoder(tokenizer), [tokens for _, tokens in windows])
    kept = [WindowText(number, tokens, found) for (number, tokens), found in zip(windows, texts, strict=True)]
    questions = (text for suite in suites for text in _questions(suite))
    asked = (
        QuestionText(suite.info.name, item.subject, item.item, suite.question(item), ())
        for suite in responses
        for item in suite.items
    )
    write_texts(out, kept, chain(questions, asked))


def decoder(tokenizer: Any) -> Decode:
    """Return what some ids add to a text before them: alone, many tokenizers would drop their leading space."""
    first = encode(tokenizer, "a")

    def plain(sequences: Sequence[Sequence[int]]) -> list[str]:
        if not sequences:
            return []  # transformers decodes no sequences to one empty text
        options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
        found: list[str] = tokenizer.batch_decode([list(ids) for ids in sequences], **options)
        return found

    before = plain([first])[0]

    def decode(sequences: Sequence[Sequence[int]]) -> list[str]:
        texts = plain([[*first, *ids] for ids in sequences])
        return [text.removeprefix(before) for text in texts]

    return decode


def token_texts(decode: Decode, windows: Sequence[Sequence[int]]) -> list[tuple[str, ...]]:
    """Return the text of every token of every window.

    Each distinct id is decoded once. A character whose bytes are spread over tokens stands at the last of them, and
    the others are empty: a run of ids that are no whole characters is decoded together.
    """
    ids = sorted({token for window in windows for token in window})
    alone = dict(zip(ids, decode([[token] for token in ids]), strict=True))
    return [_joined(decode, alone, window) for window in windows]


def _joined(decode: Decode, alone: dict[int, str], window: Sequence[int]) -> tuple[str, ...]:
    texts = [alone[token] for token in window]
    runs = list(_torn_runs(texts))
    for (start, end), text in zip(runs, decode([window[start:end] for start, end in runs]), strict=True):
        texts[start:end] = ["" for _ in range(start, end - 1)] + [text]
    return tuple(texts)


def _torn_runs(texts: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Yield the ends (start, end) of runs of tokens that hold parts of characters."""
    start = None
    for place, text in enumerate([*texts, ""]):
        if TORN in text:
            start = place if start is None else start
        elif start is not None:
            yield start, place
            start = None


def _questions(suite: Suite) -> Iterator[QuestionText]:
    for question in suite.questions:
        task = suite.tasks[question.subject]
        doc = task.eval_docs[question.item]
        # a task of several inputs (winogrande) has the place of the answer as its text, and asks for the target
        asked = task.doc_to_target(doc) if task.multiple_input else task.doc_to_text(doc)
        choices = tuple(str(choice) for choice in task.doc_to_choice(doc))
        yield QuestionText(suite.info.name, question.subject, question.item, str(asked), choices)

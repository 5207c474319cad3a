"""The baseline's chains of thought on questions: greedy, under its chat template, each before the right answer.

A chain is the answer's thinking, where the template names markers of it, else the answer up to where it first says that
'The answer is'. A chain that reached the limit of length is closed there. The right answer stands behind the answer's
own words where the baseline gives it, else behind 'The answer is'.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from qeval.backends.base import BaselineBackend
from qeval.compare.chat import answerer_of, count_thinking
from qeval.compare.settings import Settings
from qeval.compare.trace_set import TraceSet, traces_sha256
from qeval.errors import UsageError
from qeval.models.info import LoadedModel
from qeval.progress import Progress
from qeval.score.texts import decoder, token_texts
from qeval.store.trace_records import ReasoningRecord, TraceRecord
from qeval.tasks.chat_template import ChatTemplate, template_of
from qeval.tasks.corpus import encode
from qeval.tasks.names import REASONING
from qeval.tasks.reasoning import CUE, DOUBT, ReasoningQuestion, find_answer, load_questions
from qeval.tasks.traces import reasoning_trace
from qeval.types import TokenIds


class _Chain(NamedTuple):
    """A chain, whether the baseline ended it itself, the rest of its answer, and words that ask for the result."""

    tokens: TokenIds
    ended: bool
    final: TokenIds
    cue: str


def chain_traces(
    settings: Settings, loaded: LoadedModel, backend: BaselineBackend[Any], progress: Progress
) -> TraceSet:
    """Have the baseline reason about a run's questions.

    Args:
        settings: The run's.
        loaded: The model.
        backend: What runs the baseline.
        progress: Hears how many questions were answered.

    Raises:
        UsageError: There is no template or question, or a question is too long.
    """
    tokenizer, template = loaded.tokenizer, template_of(loaded.tokenizer, settings.chat.template)
    found = load_questions(settings.traces.questions)
    questions = found.questions[: settings.questions.limit]
    texts = tuple(
        template.render(tokenizer, [{"role": "user", "content": each.message}], (), each.where) for each in questions
    )
    asked = [encode(tokenizer, text) for text in texts]
    limit = settings.traces.tokens
    for question, ids in zip(questions, asked, strict=True):
        _check_length(question, len(ids) + limit + _room(template, tokenizer, question), loaded)

    answerer = answerer_of(settings, loaded, backend, template)
    answerer = replace(answerer, choice=replace(settings.chat, tokens=limit, temperature=0.0))
    traces, records, in_own_words = [], [], 0
    said = answerer.answers(asked, progress)
    for item, (question, text, ids, answer) in enumerate(zip(questions, texts, asked, said, strict=True)):
        chain = _chain(tokenizer, template, text, answer, answerer.stops)
        own = _own_words(tokenizer, chain.final, question.answer)
        cue, right = own or _split(tokenizer, chain.cue, question.answer)
        in_own_words += own is not None
        traces.append(reasoning_trace(item, ids, chain.tokens, cue, right))
        records.append(TraceRecord(item=item, draw=0, tokens=len(chain.tokens), ended=chain.ended))

    doubt = _doubt(tokenizer)
    ends = encode(tokenizer, template.markers.end)[:1] if template.markers else ()
    masses = {"stop_p": tuple(sorted({*ends, *answerer.stops}))}
    masses |= {"doubt_p": tuple(sorted(set(doubt.values())))} if doubt else {}
    record = ReasoningRecord(
        source=found.source,
        sha256=found.sha256,
        tokens_sha256=traces_sha256(tuple(traces)),
        template_sha256=template.sha256,
        questions=len(questions),
        longest_chain=limit,
        thinks=template.markers is not None,
        cue=CUE,
        in_own_words=in_own_words,
        doubt=list(dict.fromkeys(text.strip() for text in doubt)),
        traces=records,
    )
    return TraceSet(REASONING, tuple(traces), texts, record, masses, _word_tokens(tokenizer, loaded.info.vocab_size))


def _chain(tokenizer: Any, template: ChatTemplate, prompt: str, said: TokenIds, stops: frozenset[int]) -> _Chain:
    """Return the chain in an answer, which follows a prompt."""
    ended = said[-1] in stops
    said = said[:-1] if ended else said
    thinking = count_thinking(tokenizer, template, prompt, said)
    (texts,) = token_texts(decoder(tokenizer), [said])
    if template.markers is not None and thinking:
        closed = template.markers.end in "".join(texts[:thinking])
        cue = f"\n\n{CUE}" if closed else f"\n{template.markers.end}\n\n{CUE}"
        return _Chain(said[:thinking], closed, said[thinking:], cue)

    # without thinking the chain goes up to the words that announce the result
    whole = "".join(texts)
    place = whole.find(CUE)
    count = len(said) if place < 0 else _tokens_before(texts, place)
    before = "".join(texts[:count])
    cue = CUE if not before or before[-1].isspace() else f"\n{CUE}"
    return _Chain(said[:count], ended and count == len(said), said[count:], cue)


def _tokens_before(texts: Sequence[str], place: int) -> int:
    """Return how many tokens end before a place in their text."""
    length = 0
    for count, text in enumerate(texts):
        length += len(text)
        if length > place:
            return count
    return len(texts)


def _own_words(tokenizer: Any, final: TokenIds, answer: str) -> tuple[TokenIds, TokenIds] | None:
    """Return the tokens before the right answer and those of it, as the baseline said them; None where it didn't."""
    (texts,) = token_texts(decoder(tokenizer), [final])
    place = find_answer(texts, answer)
    return None if place is None else (final[: place[0]], final[slice(*place)])


def _split(tokenizer: Any, cue: str, answer: str) -> tuple[TokenIds, TokenIds]:
    """Return the tokens of a cue and of the answer behind it, as they are encoded together where that can be told."""
    before, whole = encode(tokenizer, cue), encode(tokenizer, f"{cue} {answer}")
    if whole[: len(before)] == before:
        return before, whole[len(before) :]
    return before, encode(tokenizer, f" {answer}")


def _room(template: ChatTemplate, tokenizer: Any, question: ReasoningQuestion) -> int:
    """Return how many tokens may stand behind a chain."""
    end = template.markers.end if template.markers else ""
    return sum(map(len, _split(tokenizer, f"\n{end}\n\n{CUE}", question.answer)))


def _check_length(question: ReasoningQuestion, length: int, loaded: LoadedModel) -> None:
    if length > loaded.info.context_length:
        raise UsageError(
            f"{question.where} takes {length:,} tokens with its chain of thought and answer, and the model's context "
            f"holds {loaded.info.context_length:,}; give a smaller --reasoning-tokens."
        )


def _doubt(tokenizer: Any) -> dict[str, int]:
    """Return the markers of doubt that are one token each, at the start of a line and behind a space."""
    spelled = {text: encode(tokenizer, text) for word in DOUBT for text in (word, f" {word}")}
    return {text: ids[0] for text, ids in spelled.items() if len(ids) == 1}


def _word_tokens(tokenizer: Any, size: int) -> TokenIds:
    """Return the ids whose text begins with a letter or a digit: what would go on with a word or a number."""
    special = set(tokenizer.all_special_ids)
    ids = [token for token in range(min(size, len(tokenizer))) if token not in special]
    texts = decoder(tokenizer)([[token] for token in ids])
    return tuple(token for token, text in zip(ids, texts, strict=True) if text[:1].isalnum())

"""Calls of functions that the baseline samples within the grammar of a prompt's tools.

Among allowed tokens each is drawn with p(token) / p(any allowed), so that the product of p(any allowed) over a call has
the probability of a valid call as its expectation: the weight of importance sampling (D. G. Horvitz and D. J. Thompson,
JASA 47, 1952), here of a proposal that is the model itself, renormalized at each step.
"""

from dataclasses import replace
from typing import Any

from qeval.backends.base import BaselineBackend
from qeval.compare.chat import answerer_of
from qeval.compare.chat_choice import ChatChoice
from qeval.compare.settings import Settings
from qeval.compare.trace_set import TraceSet, traces_sha256
from qeval.errors import UsageError
from qeval.models.info import LoadedModel
from qeval.progress import Progress
from qeval.store.trace_records import GrammarRecord, TraceRecord
from qeval.tasks.chat_prompts import CALLS, ChatPrompt, load_prompts
from qeval.tasks.chat_template import template_of
from qeval.tasks.corpus import encode
from qeval.tasks.grammar import CallGrammar, GrammarVocabulary, call_grammar, grammar_engine
from qeval.tasks.names import GRAMMAR
from qeval.tasks.tool_calls import call_form
from qeval.tasks.traces import Trace, call_trace
from qeval.types import TokenIds


def call_traces(settings: Settings, loaded: LoadedModel, backend: BaselineBackend[Any], progress: Progress) -> TraceSet:
    """Have the baseline call the functions of a run's prompts.

    Args:
        settings: The run's.
        loaded: The model.
        backend: What runs the baseline.
        progress: Hears how many prompts were answered.

    Raises:
        UsageError: The template takes no tools, no prompt has any, a schema is none, or a prompt is too long.
    """
    engine = grammar_engine()
    tokenizer, template = loaded.tokenizer, template_of(loaded.tokenizer, settings.chat.template)
    form = call_form(template, tokenizer)
    found = load_prompts(settings.chat.prompts or CALLS)
    prompts = [each for each in found.prompts if _asks(each)][: settings.questions.limit]
    if not prompts:
        raise UsageError(
            f"No prompt of {found.source} has tools and one message to answer, the user's; give others by --prompts."
        )

    vocabulary = GrammarVocabulary.of(tokenizer, loaded.info.vocab_size)
    texts, grammars = [], dict[TokenIds, CallGrammar]()
    for prompt in prompts:
        text = template.render(tokenizer, prompt.messages, prompt.tools, prompt.where) + form.opening
        ids = encode(tokenizer, text)
        _check_length(prompt, len(ids), settings.chat, loaded)
        texts.append(text)
        grammars[ids] = call_grammar(form.schemas(prompt.tools), vocabulary, prompt.where)

    traces, records = [], []
    asked = [encode(tokenizer, text) for text in texts]
    sampled = replace(
        answerer_of(settings, loaded, backend, template),
        choice=replace(settings.chat, temperature=1.0),
        stops=frozenset({tokenizer.eos_token_id}),
        grammars=grammars,
    )
    for draw in range(settings.traces.calls):
        said = replace(sampled, seed=settings.seed + draw).answers(asked, progress)
        for item, (prompt, ids, answer) in enumerate(zip(prompts, asked, said, strict=True)):
            call = _call_of(prompt, answer, tokenizer.eos_token_id)
            trace, record = _trace(item, draw, ids, call, grammars[ids])
            traces.append(trace)
            records.append(record)
    calls = GrammarRecord(
        source=found.source,
        sha256=found.sha256,
        tokens_sha256=traces_sha256(tuple(traces)),
        template_sha256=template.sha256,
        prompts=len(prompts),
        prompts_left_out=len(found.prompts) - len(prompts),
        calls=settings.traces.calls,
        longest_call=settings.chat.tokens,
        opening=form.opening,
        engine=engine,
        traces=records,
    )
    return TraceSet(GRAMMAR, tuple(traces), tuple(texts * settings.traces.calls), calls)


def _trace(item: int, draw: int, asked: TokenIds, said: TokenIds, grammar: CallGrammar) -> tuple[Trace, TraceRecord]:
    """Return a call as a trace, and the record of it."""
    path = grammar.path(said)
    record = TraceRecord(item=item, draw=draw, tokens=len(said), ended=path.is_complete)
    return call_trace(item, draw, asked, said, path.masks), record


def _call_of(prompt: ChatPrompt, said: TokenIds, end: int) -> TokenIds:
    """Return a call without what ends it.

    Raises:
        UsageError: There is none, since no token of the vocabulary begins one.
    """
    call = said[:-1] if said[-1] == end else said
    if not call:
        raise UsageError(f"{prompt.where}: no token of the model's vocabulary begins a call of its tools.")
    return call


def _asks(prompt: ChatPrompt) -> bool:
    """Return whether a prompt has tools, and one message of the user to answer, the last."""
    return bool(prompt.tools) and prompt.messages[-1]["role"] == "user" and len(prompt.pieces) == 1


def _check_length(prompt: ChatPrompt, length: int, choice: ChatChoice, loaded: LoadedModel) -> None:
    if length + choice.tokens > loaded.info.context_length:
        raise UsageError(
            f"{prompt.where} is {length:,} tokens long with its tools, and the model's context of "
            f"{loaded.info.context_length:,} has no room for a call of {choice.tokens:,} after it; shorten it, or give "
            "a smaller --chat-tokens."
        )

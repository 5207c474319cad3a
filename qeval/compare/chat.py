"""`--corpus chat`: the baseline answers prompts under its chat template, and its answers are windows like a text's.

A window holds one answer and all that stands before it; the answer's tokens alone are scored. So every variant, on
every backend, is asked for the probabilities of the baseline's own words, and none generates anything.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from qeval.backends.base import BaselineBackend
from qeval.compare.answers import Answerer
from qeval.compare.loading import baseline_key
from qeval.compare.settings import CorpusChoice, Settings
from qeval.errors import UsageError
from qeval.identity import digest
from qeval.models.info import LoadedModel
from qeval.models.vocabulary import check_ids, end_tokens
from qeval.progress import Progress
from qeval.score.texts import TORN, decoder, token_texts
from qeval.store.run import AnswerRecord, ChatRecord, ProtocolRecord
from qeval.tasks.chat_prompts import ChatPrompt, Message, PromptSet, load_prompts
from qeval.tasks.chat_template import ChatTemplate, template_of, thinking_tokens
from qeval.tasks.corpus import CHAT, corpus_names, encode
from qeval.tasks.protocols import TOKEN_MEAN
from qeval.tasks.windows import Window, tokens_sha256
from qeval.types import TokenIds

_MANY_BYTES = 0.25
"""The share of a language's tokens that are parts of characters, from which a reader is told."""


class Answer(NamedTuple):
    """One answer: the prompt's number, text under the template and ids; the answer's ids, how many of them thinking."""

    prompt: int
    text: str
    asked: TokenIds
    said: TokenIds
    thinking: int


@dataclass(frozen=True, eq=False)
class ChatWork:
    """The answers of a run, in the order of prompts and turns, and the record of them."""

    answers: tuple[Answer, ...]
    record: ProtocolRecord

    @property
    def windows(self) -> tuple[Window, ...]:
        """A window an answer."""
        return tuple(_window(answer.asked, answer.said) for answer in self.answers)

    @property
    def first_prompts(self) -> tuple[TokenIds, ...]:
        """The ids of what comes before each conversation's first answer, each once."""
        first = {answer.prompt: answer.asked for answer in reversed(self.answers)}
        return tuple(dict.fromkeys(first[prompt] for prompt in sorted(first)))

    def asked_by(self, tokenizer: Any) -> "ChatWork":
        """Return the same answers to what another tokenizer makes of the prompts' text."""
        answers = tuple(each._replace(asked=encode(tokenizer, each.text)) for each in self.answers)
        return replace(self, answers=answers)


@dataclass(eq=False)
class _Conversation:
    """A conversation under way."""

    number: int
    prompt: ChatPrompt
    history: list[Message] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class _Host:
    """The model in conversations: its tokenizer, the template, and what answers."""

    loaded: LoadedModel
    template: ChatTemplate
    answerer: Answerer

    def hold(self, prompts: Sequence[ChatPrompt], progress: Progress) -> tuple[Answer, ...]:
        """Return the answers of every conversation, in the order of conversations and turns.

        Raises:
            UsageError: A prompt is too long, or the template refuses it.
        """
        conversations = [_Conversation(number, prompt) for number, prompt in enumerate(prompts)]
        for turn in range(max(len(prompt.pieces) for prompt in prompts)):
            self._take_turn([each for each in conversations if turn < len(each.prompt.pieces)], turn, progress)
        return tuple(answer for each in conversations for answer in each.answers)

    def _take_turn(self, conversations: Sequence[_Conversation], turn: int, progress: Progress) -> None:
        """Have the model answer all conversations once, and put its answers into them."""
        texts = []
        for each in conversations:
            each.history += each.prompt.pieces[turn]
            texts.append(
                self.template.render(self.loaded.tokenizer, each.history, each.prompt.tools, each.prompt.where)
            )
        asked = [encode(self.loaded.tokenizer, text) for text in texts]
        for each, ids in zip(conversations, asked, strict=True):
            self._check_length(each.prompt, ids)

        for each, text, ids, said in zip(
            conversations, texts, asked, self.answerer.answers(asked, progress), strict=True
        ):
            thinking = count_thinking(self.loaded.tokenizer, self.template, text, said)
            content = self.loaded.tokenizer.decode(said[thinking:], skip_special_tokens=True).strip()
            each.history.append({"role": "assistant", "content": content})
            each.answers.append(Answer(each.number, text, ids, said, thinking))

    def _check_length(self, prompt: ChatPrompt, ids: TokenIds) -> None:
        limit, context = self.answerer.choice.tokens, self.loaded.info.context_length
        if len(ids) + limit > context:
            raise UsageError(
                f"{prompt.where} is {len(ids):,} tokens long under the chat template, and the model's context of "
                f"{context:,} has no room for an answer of {limit:,} after it; shorten it, or give a smaller "
                "--chat-tokens."
            )


def chat_work(settings: Settings, loaded: LoadedModel, backend: BaselineBackend[Any], progress: Progress) -> ChatWork:
    """Have the baseline answer a run's prompts.

    Args:
        settings: The run's.
        loaded: The model; its tokenizer has the template unless the settings name one.
        backend: What runs the baseline.
        progress: Hears how many prompts were answered.

    Raises:
        UsageError: There is no template or no prompt, or a prompt is too long.
    """
    _check_windows(settings.corpus)
    template = template_of(loaded.tokenizer, settings.chat.template)
    prompt_set = load_prompts(settings.chat.prompts)
    askable = [each for each in prompt_set.prompts if template.takes_tools or not each.tools]
    prompts = tuple(askable[: settings.corpus.max_windows])
    if not prompts:
        why = "all have tools, of which the chat template takes none" if prompt_set.prompts else "are none: it is empty"
        raise UsageError(f"The prompts of {prompt_set.source} {why}; give others by --prompts.")

    answerer = answerer_of(settings, loaded, backend, template)
    answers = _Host(loaded, template, answerer).hold(prompts, progress)
    used = (token for answer in answers for token in answer.asked)
    check_ids(used, loaded.info.vocab_size, loaded.tokenizer, "A prompt under the chat template")
    chat = ChatRecord(
        source=prompt_set.source,
        template=template.file,
        template_sha256=template.sha256,
        prompts=len(prompts),
        prompts_with_tools_left_out=len(prompt_set.prompts) - len(askable),
        longest_answer=settings.chat.tokens,
        temperature=settings.chat.temperature,
        in_bytes=_in_bytes(prompts, loaded.tokenizer),
        answers=[_answer_record(number, each, prompts, answerer.stops) for number, each in enumerate(answers)],
    )
    return ChatWork(answers, _protocol(settings, loaded, prompt_set, answers, chat))


def answerer_of(
    settings: Settings, loaded: LoadedModel, backend: BaselineBackend[Any], template: ChatTemplate
) -> Answerer:
    """Return the baseline as it answers prompts under a template, with the length and temperature of chat.

    Args:
        settings: The run's.
        loaded: The model.
        backend: What runs the baseline.
        template: The chat template, which says what ends a turn.
    """
    return Answerer(
        backend=backend,
        key=baseline_key(loaded, settings.model.device, loaded.info.compute_dtype),
        choice=settings.chat,
        seed=settings.seed,
        stops=_stops(loaded, template),
        batch_tokens=settings.batch_tokens or backend.batch_tokens,
    )


def count_thinking(tokenizer: Any, template: ChatTemplate, prompt: str, said: TokenIds) -> int:
    """Return how many tokens of an answer are thinking.

    Args:
        tokenizer: The model's.
        template: The chat template, which names the markers.
        prompt: The text before the answer.
        said: The answer.
    """
    if template.markers is None:
        return 0
    (texts,) = token_texts(decoder(tokenizer), [said])
    return thinking_tokens(prompt, texts, template.markers)


def _check_windows(choice: CorpusChoice) -> None:
    """Refuse flags on the windows of a text where there is none."""
    sized = {"window": choice.window, "stride": choice.stride, "protocol": choice.protocol}
    flags = [f"--{name}" for name, value in {**sized, "convention": choice.convention}.items() if value is not None]
    if flags and corpus_names(choice.corpus or "") == [CHAT]:
        raise UsageError(f"--corpus chat has a window for each answer, whatever its length; leave {flags[0]} out.")


def _stops(loaded: LoadedModel, template: ChatTemplate) -> frozenset[int]:
    """Return the ids that end an answer: those of a text, and what the template puts behind it."""
    turn = template.end_of_turn(loaded.tokenizer)
    return end_tokens(loaded.model, loaded.tokenizer) | ({turn} if turn is not None else set())


def _window(asked: TokenIds, said: TokenIds) -> Window:
    """Return a prompt and its answer, of which the answer is scored: each token, and the distribution it is of."""
    begin, end = len(asked), len(asked) + len(said)
    return Window((*asked, *said), 0, tuple(range(begin - 1, end - 1)), tuple(range(begin, end)))


def _answer_record(number: int, answer: Answer, prompts: Sequence[ChatPrompt], stops: frozenset[int]) -> AnswerRecord:
    prompt, first = prompts[answer.prompt], len(answer.asked)
    return AnswerRecord(
        window=number,
        prompt=answer.prompt,
        kind=prompt.kind,
        language=prompt.language,
        first=first,
        final=first + answer.thinking,
        ended=answer.said[-1] in stops,
    )


def _in_bytes(prompts: Sequence[ChatPrompt], tokenizer: Any) -> dict[str, float]:
    """Return the languages of which many tokens are parts of characters, with the share of those."""
    tokens, torn, decode = Counter[str](), Counter[str](), decoder(tokenizer)
    for prompt in prompts:
        text = "\n".join(message["content"] for message in prompt.messages if message["role"] == "user")
        ids = encode(tokenizer, text)
        tokens[prompt.language] += len(ids)
        torn[prompt.language] += sum(TORN in each for each in decode([[token] for token in ids]))
    shares = {language: torn[language] / count for language, count in tokens.items() if count}
    return {language: share for language, share in sorted(shares.items()) if share > _MANY_BYTES}


def _protocol(
    settings: Settings, loaded: LoadedModel, prompts: PromptSet, answers: Sequence[Answer], chat: ChatRecord
) -> ProtocolRecord:
    """Return the record of the answers as a corpus of its own."""
    bos = loaded.tokenizer.bos_token_id
    starts_with_bos = bos is not None and all(answer.asked[0] == bos for answer in answers)
    ids = [token for answer in answers for token in (*answer.asked, *answer.said)]
    longest, scored = max(len(each.asked) + len(each.said) for each in answers), sum(len(each.said) for each in answers)
    return ProtocolRecord(
        name=f"chat-{settings.chat.tokens}",
        corpus=CHAT,
        corpus_sha256=prompts.sha256,
        tokens_sha256=digest({"template": chat.template_sha256, "tokens": tokens_sha256(ids)}),
        window=longest,
        stride=longest,
        windows=len(answers),
        windows_available=len(answers),
        bos=starts_with_bos,
        kl_positions=scored,
        nll_positions=scored,
        convention=TOKEN_MEAN.name,
        bos_policy=settings.corpus.bos,
        bos_placement="window" if starts_with_bos else None,
        bos_token=loaded.tokenizer.bos_token if starts_with_bos else None,
        chat=chat,
    )

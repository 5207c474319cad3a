"""Read a run's data before its model: the hub's texts and the tasks of questions; then both in the model's tokens."""

from collections.abc import Sequence

from qeval.compare.chat import ChatWork
from qeval.compare.generation_choice import DriftChoice
from qeval.compare.hub_access import needs_of
from qeval.compare.settings import NEEDLE, Settings
from qeval.compare.tokens import each_corpus, protocol_of
from qeval.errors import UsageError
from qeval.identity import digest
from qeval.models.info import LoadedModel
from qeval.models.vocabulary import check_ids
from qeval.score.drift import DriftPart, parts_of
from qeval.store.run import DriftRecord, NeedleRecord
from qeval.tasks.corpus import CHAT, bos_token, encode, load_corpus
from qeval.tasks.drift import prompts_of
from qeval.tasks.harness import Suite, TaskData, encode_task, load_task
from qeval.tasks.harness_tasks import has_choices
from qeval.tasks.harness_text import HarnessText
from qeval.tasks.needle import Haystack, depths_of, write_haystack
from qeval.tasks.responses import GENERATED, ResponseSuite, encode_responses
from qeval.tasks.windows import tokens_sha256


def drift_of(
    settings: Settings, loaded: LoadedModel, chat: ChatWork | None = None
) -> tuple[DriftRecord, tuple[DriftPart, ...]]:
    """Return the prompts that are continued greedily: the record of them, and their parts.

    They are pieces of the first corpus; where that is `chat`, its prompts under the chat template.

    Args:
        settings: The run's.
        loaded: The model.
        chat: The baseline's answers, where a corpus is they.

    Raises:
        UsageError: They and what follows do not fit the context, or the corpus is too short.
    """
    choice = settings.drift
    if chat is not None and each_corpus(settings.corpus)[0].corpus == CHAT:
        return _drift_of_chat(choice, loaded, chat)
    whole = choice.prompt_tokens + choice.tokens
    if whole > loaded.info.context_length:
        raise UsageError(
            f"Prompts of {choice.prompt_tokens} tokens and {choice.tokens} more are longer than the model's context of "
            f"{loaded.info.context_length}; give smaller --drift-prompt-tokens or --drift-tokens."
        )
    corpus = load_corpus(protocol_of(each_corpus(settings.corpus)[0], loaded).corpus)
    bos = bos_token(loaded.tokenizer, settings.corpus.bos)
    prompts = prompts_of(encode(loaded.tokenizer, corpus.text), choice.prompts, choice.prompt_tokens, bos)
    used = (token for prompt in prompts for token in prompt)
    check_ids(used, loaded.info.vocab_size, loaded.tokenizer, f"The text '{corpus.name}'")
    record = DriftRecord(
        corpus=corpus.name,
        corpus_sha256=corpus.sha256,
        tokens_sha256=tokens_sha256([token for prompt in prompts for token in prompt]),
        prompts=len(prompts),
        prompt_tokens=choice.prompt_tokens,
        generated=choice.tokens,
        bos=bos is not None,
    )
    return record, parts_of(prompts, choice.tokens)


def _drift_of_chat(
    choice: DriftChoice, loaded: LoadedModel, chat: ChatWork
) -> tuple[DriftRecord, tuple[DriftPart, ...]]:
    prompts = chat.first_prompts[: choice.prompts]
    longest = max(map(len, prompts))
    if longest + choice.tokens > loaded.info.context_length:
        raise UsageError(
            f"A prompt of {longest} tokens and {choice.tokens} more are longer than the model's context of "
            f"{loaded.info.context_length}; give a smaller --drift-tokens."
        )
    record = DriftRecord(
        corpus=CHAT,
        corpus_sha256=chat.record.corpus_sha256,
        tokens_sha256=tokens_sha256([token for prompt in prompts for token in prompt]),
        prompts=len(prompts),
        prompt_tokens=longest,
        generated=choice.tokens,
        bos=chat.record.bos,
    )
    return record, parts_of(prompts, choice.tokens)


def needles_of(settings: Settings, loaded: LoadedModel) -> tuple[NeedleRecord | None, tuple[Haystack, ...]]:
    """Return the haystacks of a run in a model's tokens, and the record of them; none where none was asked for.

    Raises:
        UsageError: A length is beyond the model's context, or too short for its needles.
    """
    if NEEDLE not in settings.tasks:
        return None, ()
    choice, bos = settings.needle, settings.corpus.bos
    if (longest := max(choice.lengths)) > loaded.info.context_length:
        raise UsageError(
            f"--needle-lengths {longest} is longer than the model's context of {loaded.info.context_length}; give "
            "smaller ones."
        )
    depths = depths_of(choice.depths)
    haystacks = tuple(
        write_haystack(loaded.tokenizer, bos, length, number, depths, settings.seed)
        for length in choice.lengths
        for number in range(choice.haystacks)
    )
    used = (token for haystack in haystacks for pair in haystack.pairs for ids in pair for token in ids)
    check_ids(used, loaded.info.vocab_size, loaded.tokenizer, "A haystack of --tasks needle")
    record = NeedleRecord(
        lengths=list(choice.lengths),
        depths=list(depths),
        haystacks=choice.haystacks,
        tokens_sha256=digest({"haystacks": [haystack.pairs for haystack in haystacks]}),
        bos=bos_token(loaded.tokenizer, bos) is not None,
    )
    return record, haystacks


def load_tasks(settings: Settings) -> list[TaskData]:
    """Have every text of the hub here, and the data of the tasks of questions.

    Raises:
        UsageError: Something that was named is not there.
    """
    for need in needs_of(settings):
        need.fetch()
    choice = settings.questions
    return [
        load_task(name, shots=choice.shots, folder=choice.mmlu_dir, subjects=choice.subjects)
        for name in settings.question_tasks
    ]


def responses_of(settings: Settings, loaded: LoadedModel, tasks: Sequence[TaskData]) -> tuple[ResponseSuite, ...]:
    """Return the items of tasks without choices in a model's tokens.

    Raises:
        UsageError: An item does not fit, a task asks for what qeval does not do, or a backend can't generate.
    """
    text = HarnessText(loaded.tokenizer, settings.corpus.bos, loaded.info.context_length)
    limit, form = settings.questions.limit, settings.questions.form
    suites = []
    for data in tasks:
        if not has_choices(data.tasks):
            _check_generating(settings, data)
            suites.append(encode_responses(data, text, limit=limit, form=form))
    for suite in suites:
        used = (token for item in suite.items for pair in item.pairs for part in pair for token in part)
        check_ids(used, loaded.info.vocab_size, loaded.tokenizer, f"An item of {suite.info.name}")
    return tuple(suites)


def _check_generating(settings: Settings, data: TaskData) -> None:
    """Refuse tasks without choices of models behind endpoints, and those that generate where one can only be scored."""
    if settings.backends.endpoints:
        raise UsageError(
            f"Task '{data.name}' has no choices, and endpoints are asked for choices and text alone: leave it, or "
            f"--backend {','.join(settings.backends.endpoints)}, out."
        )
    if all(task.OUTPUT_TYPE != GENERATED for task in data.tasks.values()):
        return
    if settings.model.stream:
        raise UsageError(
            f"Task '{data.name}' generates one token after another, and --stream would read every layer for each: "
            "leave one of them out."
        )
    if others := [name for name in settings.backends.names if name != "torch"]:
        raise UsageError(
            f"Task '{data.name}' generates answers, which the backend torch does alone: leave it, or --backend "
            f"{','.join(others)}, out."
        )


def suites_of(settings: Settings, loaded: LoadedModel, tasks: Sequence[TaskData]) -> tuple[Suite, ...]:
    """Return the questions of tasks of choices in a model's tokens.

    Raises:
        UsageError: A question does not fit the context.
    """
    suites = tuple(
        encode_task(
            data,
            loaded.tokenizer,
            max_length=loaded.info.context_length,
            bos=settings.corpus.bos,
            limit=settings.questions.limit,
            form=settings.questions.form,
        )
        for data in tasks
        if has_choices(data.tasks)
    )
    for suite in suites:
        used = (token for question in suite.questions for pair in question.pairs for part in pair for token in part)
        check_ids(used, loaded.info.vocab_size, loaded.tokenizer, f"A question of {suite.info.name}")
    return suites

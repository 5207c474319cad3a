"""The texts that every model of a run is scored on: windows, questions, continuations, needles, traces."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from qeval.backends.base import BaselineBackend
from qeval.compare.chat import ChatWork, chat_work
from qeval.compare.contamination import ScoredTexts
from qeval.compare.external_checkpoints import TokenCheck
from qeval.compare.settings import Settings
from qeval.compare.sources import drift_of, needles_of, responses_of, suites_of
from qeval.compare.tokens import each_corpus, protocol_of, token_work
from qeval.compare.traces import TraceWork, trace_work
from qeval.models.info import LoadedModel
from qeval.progress import Progress
from qeval.score.choices import count_pair_tokens, question_tokens, shared_pair_tokens, shared_tokens
from qeval.score.corpus import Shard
from qeval.score.drift import DriftPart
from qeval.score.responses import response_tokens
from qeval.score.token_hash import other_hashes, witness_of
from qeval.store.run import DriftRecord, NeedleRecord, ProtocolRecord
from qeval.tasks.corpus import CHAT, load_corpus
from qeval.tasks.harness import Suite, TaskData
from qeval.tasks.needle import Haystack
from qeval.tasks.responses import ResponseSuite


@dataclass(frozen=True, eq=False)
class ScoredData:
    """All that is scored, in the baseline's tokens, with the records of the settings that it was made by."""

    protocol: ProtocolRecord | None
    shards: tuple[Shard, ...]
    suites: tuple[Suite, ...]
    responses: tuple[ResponseSuite, ...]
    """Tasks without choices."""
    drift: DriftRecord | None
    parts: tuple[DriftPart, ...]
    needle: NeedleRecord | None
    haystacks: tuple[Haystack, ...]
    traces: TraceWork

    @property
    def texts(self) -> ScoredTexts:
        """The texts of which calibration should know none."""
        return ScoredTexts(self.shards, self.suites, self.responses)

    @property
    def token_hash(self) -> str:
        """The hash of all token ids and scored positions."""
        others = other_hashes(self.traces.token_hashes(), self.needle)
        return witness_of(self.shards, self.suites, self.protocol, self.drift, self.responses, others)

    @property
    def most_positions(self) -> int:
        """The tokens of the largest shard, whose states are kept together."""
        return max((shard.tokens for shard in (*self.shards, *(part.shard for part in self.traces.parts))), default=0)

    @property
    def corpus_tokens(self) -> int:
        """Tokens that one model runs for the corpus."""
        return sum(shard.tokens for shard in self.shards)

    @property
    def generated_tokens(self) -> int:
        """Tokens that one model generates at most for tasks' answers."""
        return sum(item.ending.tokens for suite in self.responses for item in suite.items if item.ending)

    @property
    def response_warnings(self) -> list[str]:
        """Sentences on what is cut or left out of tasks without choices."""
        return [warning for suite in self.responses for warning in _response_warnings(suite)]

    def question_tokens(self, *, shared: bool) -> int:
        """Return the tokens that one model runs for questions and needles; `shared`: a common prefix once."""
        of_questions, of_pairs = (shared_tokens, shared_pair_tokens) if shared else (question_tokens, count_pair_tokens)
        tokens = sum(response_tokens(suite.items) for suite in self.responses)
        tokens += sum(of_pairs(haystack.pairs) for haystack in self.haystacks)
        return tokens + sum(of_questions(part) for suite in self.suites for part in suite.parts())


def scored_data(
    settings: Settings,
    loaded: LoadedModel,
    backend: BaselineBackend[Any],
    tasks: Sequence[TaskData],
    progress: Progress,
) -> tuple[ScoredData, TokenCheck]:
    """Return what is scored, and what other tokenizers are held against.

    Args:
        settings: The settings of the run.
        loaded: The baseline, whose tokenizer counts.
        backend: Generates what the baseline is to answer.
        tasks: Tasks of lm-eval, loaded.
        progress: Is told of the answers.

    Raises:
        UsageError: Something that was asked for is not there or does not fit.
    """
    suites, responses = suites_of(settings, loaded, tasks), responses_of(settings, loaded, tasks)
    chat = chat_work(settings, loaded, backend, progress) if settings.answers else None
    protocol, shards = token_work(settings.corpus, loaded, chat) if settings.scores_tokens else (None, ())
    if protocol and settings.sampling:
        protocol = protocol.model_copy(update={"sampling": str(settings.sampling)})
    drift, parts = drift_of(settings, loaded, chat) if settings.continues else (None, ())
    needle, haystacks = needles_of(settings, loaded)
    traces = trace_work(settings, loaded, backend, progress)
    data = ScoredData(protocol, shards, suites, responses, drift, parts, needle, haystacks, traces)
    return data, _token_check(settings, loaded, data, tasks, chat)


def _token_check(
    settings: Settings, loaded: LoadedModel, data: ScoredData, tasks: Sequence[TaskData], chat: ChatWork | None
) -> TokenCheck:
    """Return what every side of the run is asked, and what a tokenizer makes of it; the baseline wrote a part of it."""
    texts = [loaded.tokenizer.decode(part[0].prompt) for suite in data.suites for part in suite.parts()]
    texts += [loaded.tokenizer.decode(part[0].prompt) for suite in data.responses for part in suite.parts()]
    if settings.scores_tokens or settings.continues:
        named = [each for each in each_corpus(settings.corpus) if chat is None or each.corpus != CHAT]
        texts += [load_corpus(protocol_of(each, loaded).corpus).text for each in named]
    texts += [answer.text for answer in chat.answers] if chat else []
    texts += data.traces.texts

    def token_hash_of(tokenizer: Any) -> str:
        side, asked = replace(loaded, tokenizer=tokenizer), chat and chat.asked_by(tokenizer)
        protocol, shards = token_work(settings.corpus, side, asked) if settings.scores_tokens else (None, ())
        drift = drift_of(settings, side, asked)[0] if settings.continues else None
        suites, responses = suites_of(settings, side, tasks), responses_of(settings, side, tasks)
        others = other_hashes(data.traces.token_hashes(tokenizer), needles_of(settings, side)[0])
        return witness_of(shards, suites, protocol, drift, responses, others)

    return TokenCheck(texts, settings.corpus.bos, data.token_hash, token_hash_of)


def _response_warnings(suite: ResponseSuite) -> list[str]:
    """Return sentences on what of a task is cut or left out."""
    info, warnings = suite.info, []
    if info.cut_prompts:
        warnings.append(
            f"{info.cut_prompts} of {info.items} prompts of {info.name} are longer than the context leaves room for, "
            "and are cut on the left, as lm-eval does."
        )
    if suite.skipped:
        warnings.append(
            f"{info.name}: {', '.join(suite.skipped)} has no value or no direction for each item, so it is left out."
        )
    return warnings

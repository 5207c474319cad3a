"""Check that the hub's data of a command can be had, before torch is imported and a weight is read."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

from qeval.compare.settings import CalibrationChoice, CorpusChoice, Settings
from qeval.config import Recipe
from qeval.errors import UsageError
from qeval.hub import OFFLINE_FLAG, data_offline_reason, offline, why_silent
from qeval.progress import Progress
from qeval.tasks.chat_prompts import fetch_prompts, hub_prompts
from qeval.tasks.corpus import HUB_CALIBRATION, HUB_CORPORA, corpus_names, load_calibration, load_corpus
from qeval.tasks.hub_data import HubText, check_subjects, in_cache, mmlu_data_set, mmlu_subjects
from qeval.tasks.names import GRAMMAR, HUB, MMLU, REASONING
from qeval.tasks.protocols import DEFAULT, PROTOCOLS
from qeval.tasks.reasoning import fetch_questions, hub_questions

_PROBE = "Salesforce/wikitext"
"""What the hub is asked for where only the harness knows a task's data set."""
_TITLES = {
    "wikitext2": "WikiText-2",
    "wikitext2-raw": "WikiText-2",
    "c4": "C4",
    "pile-val": "the Pile's validation text",
}


class Need(NamedTuple):
    """Data of the hub that a command reads.

    `is_at_hand`: whether no hub need be asked for it; `lacking` names what is in no cache, or is None; `instead` are
    the flags by which a command does without it; `fetch` has it here.
    """

    hub_id: str
    is_at_hand: Callable[[], bool]
    lacking: Callable[[], str | None]
    instead: tuple[str, ...]
    fetch: Callable[[], object] = lambda: None


def needs_of(settings: Settings) -> list[Need]:
    """Return what a run reads of the hub, as its settings name it.

    Raises:
        UsageError: MMLU has no such subject.
    """
    found = _of_corpora(settings.corpus) if settings.scores_tokens or settings.continues else []
    if (settings.answers or GRAMMAR in settings.tasks) and (where := hub_prompts(settings.chat.prompts)):
        found.append(_of_text(where.hub_id, where, "--prompts FILE", partial(fetch_prompts, where)))
    if REASONING in settings.tasks and (where := hub_questions(settings.traces.questions)):
        found.append(_of_text(where.hub_id, where, "--reasoning-questions FILE", partial(fetch_questions, where)))
    for task in settings.question_tasks:
        if task != MMLU:
            found.append(Need(_PROBE, lambda: False, lambda: None, ()))
        elif str(settings.questions.mmlu_dir) == HUB:
            found.append(_of_mmlu(settings.questions.subjects))
    return [*found, *needs_of_calibration(settings.calibration, settings.every_recipe)]


def needs_of_calibration(choice: CalibrationChoice, recipes: Sequence[Recipe] | None = None) -> list[Need]:
    """Return what calibrating reads of the hub; nothing where no recipe is calibrated. None: the text is read."""
    is_read = recipes is None or any(recipe.calibrated for recipe in recipes)
    if choice.source not in HUB_CALIBRATION or not is_read:
        return []
    name = choice.source
    return [_of_text(name, HUB_CALIBRATION[name], "--calibration FILE", partial(load_calibration, name))]


def needs_of_text(name: str) -> list[Need]:
    """Return what a corpus of that name reads of the hub."""
    if name not in HUB_CORPORA:
        return []
    return [_of_text(name, HUB_CORPORA[name], "--corpus FILE", partial(load_corpus, name))]


@contextmanager
def hub_access(needs: Sequence[Need], progress: Progress, *, is_offline: bool) -> Iterator[None]:
    """Ask the hub once whether it is there; where it is not, and the caches do, keep all else from asking it.

    Args:
        needs: What the block reads of the hub.
        progress: Hears of a hub that does not answer.
        is_offline: Whether the user says that the hub is not to be asked.

    Raises:
        UsageError: The hub can't be asked and something is in no cache, or it refuses the token.
    """
    unread = [need for need in needs if not need.is_at_hand()]
    why = OFFLINE_FLAG if is_offline else None
    if unread and why is None:
        why = why_silent(unread[0].hub_id, f"'{unread[0].hub_id}'")
    if why is None:
        yield
        return
    lacking = [(name, need.instead) for need in unread if (name := need.lacking()) is not None]
    if lacking:
        raise UsageError(_refusal(why, lacking))
    if not is_offline and data_offline_reason() is None:
        progress.warn(f"{why}: what its caches hold is used, which need not be the newest.")
    with offline(why):
        yield


def _of_corpora(choice: CorpusChoice) -> list[Need]:
    named = PROTOCOLS.get(choice.protocol or DEFAULT, PROTOCOLS[DEFAULT]).corpus
    return [need for name in corpus_names(choice.corpus or named) for need in needs_of_text(name)]


def _of_text(name: str, where: HubText, instead: str, fetch: Callable[[], object]) -> Need:
    title = f"{_TITLES.get(name, name)} ({where.hub_id})"
    return Need(
        hub_id=where.hub_id,
        is_at_hand=lambda: where.read() is not None,
        lacking=lambda: None if where.is_here else title,
        instead=(instead,),
        fetch=fetch,
    )


def _of_mmlu(subjects: Sequence[str]) -> Need:
    check_subjects(subjects)
    wanted = list(subjects) or mmlu_subjects()
    return Need(mmlu_data_set(), lambda: False, partial(_lacking_of_mmlu, wanted), ("--mmlu-dir DIR", "--tasks kl,ppl"))


def _lacking_of_mmlu(subjects: Sequence[str]) -> str | None:
    hub_id = mmlu_data_set()
    absent = [subject for subject in subjects if not in_cache(hub_id, subject)]
    if not absent:
        return None
    return f"MMLU ({hub_id})" if len(absent) == len(subjects) else f"{len(absent)} subjects of MMLU ({hub_id})"


def _refusal(why: str, lacking: Sequence[tuple[str, tuple[str, ...]]]) -> str:
    """Return the sentence on data that can't be had, with the ways to do without it."""
    names = list(dict.fromkeys(name for name, _ in lacking))
    listed = ", ".join(names[:-1]) + (f" and {names[-1]}" if len(names) > 1 else names[-1])
    flags = dict.fromkeys(flag for _, instead in lacking for flag in instead)
    first = "unset it" if data_offline_reason() else "leave --offline out" if why == OFFLINE_FLAG else "connect"
    shipped = [] if why == OFFLINE_FLAG else ["--offline (the Python reference and a sample of questions)"]
    return (
        f"{why}, and {listed} {'is' if len(names) == 1 else 'are'} not in its cache: {first}, or give "
        f"{', '.join([*shipped, *flags])}."
    )

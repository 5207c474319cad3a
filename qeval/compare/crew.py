"""`--workers`: more processes on one run. Each loads the model once and takes jobs from the ledger.

The command itself makes the variants, with all threads. On one machine it is the first of the workers, and the others
load meanwhile; with `--executor ray` all workers are a cluster's, and the command does what they leave.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch

from qeval.compare.candidates import baseline_of, contenders
from qeval.compare.prepare import default_threads, prepare, share_of_threads
from qeval.compare.remake import identity_of
from qeval.compare.scoring import Scorer, Work
from qeval.compare.settings import Settings
from qeval.compare.standing import Model, Scored, score_all, work_of
from qeval.compare.variants import Entry
from qeval.executors.cluster import Needs, RayWorkers, helping_on_ray
from qeval.executors.processes import Helpers, Receive, helping
from qeval.paths import HOME, home
from qeval.progress import Progress, Silent
from qeval.store.ledger import joined


@contextmanager
def helped(settings: Settings, crew: str, progress: Progress) -> Iterator[Helpers | RayWorkers]:
    """All workers but this process, which wait to be told the variants and then score."""
    on_ray = settings.executor == "ray"
    theirs = replace(settings, out=settings.out.resolve())
    arguments = [(theirs, crew, place, str(home().resolve())) for place in range(0 if on_ray else 1, settings.workers)]
    if on_ray:
        with helping_on_ray(_work, arguments, _needs(settings)) as workers:
            yield workers
        return
    with helping(_work, arguments, progress) as helpers:
        yield helpers


def wait_for(helpers: Helpers | RayWorkers, work: Work, first: Scored, models: Sequence[Model]) -> None:
    """Let a cluster's workers do the run; those of this machine are not waited for but worked with."""
    if not isinstance(helpers, RayWorkers):
        return
    wanted = first.tickets().union(*(model.tickets() for model in models))
    with work.progress.phase("score on Ray", len(wanted)) as advance:
        reason = helpers.wait(lambda: len(wanted & _finished(work)), lambda: work.ledger.others, advance)
    if reason:
        work.progress.warn(f"The Ray workers ended early: {reason} What they had not finished is done by this process.")


def _finished(work: Work) -> set[tuple[str, str]]:
    return {(each.kind, each.key) for each in work.ledger.finished()}


def _needs(settings: Settings) -> Needs:
    """What each of the run's workers takes: its share of the threads, and a GPU where one is computed on."""
    gpus = 1.0 if settings.model.device.startswith("cuda") else 0.0
    return Needs(share_of_threads(settings), gpus if settings.worker_gpus is None else settings.worker_gpus)


@contextmanager
def all_threads(settings: Settings) -> Iterator[None]:
    """All threads for this process, while the other workers have nothing to do."""
    share = torch.get_num_threads()
    torch.set_num_threads(default_threads(settings) if settings.workers > 1 else share)
    try:
        yield
    finally:
        torch.set_num_threads(share)


def _work(settings: Settings, crew: str, place: int, cache: str, receive: Receive) -> None:
    """One worker: every model, beginning with its own share of them; then what others could not finish."""
    os.environ[HOME] = cache
    plan, progress = prepare(settings), Silent()
    entries: Sequence[Entry] = receive()
    identity = identity_of(settings)
    with joined(settings.out, identity, settings.command, progress.warn, waiting=progress.tell, crew=crew) as ledger:
        baseline = baseline_of(plan, progress)
        work = work_of(plan, baseline, ledger, progress)
        first = Scored(work, lambda: Scorer(baseline.candidate))
        first.score(wait=False)
        models = [Model(work, each) for each in contenders(plan, list(entries), baseline, progress)]
        start = place * len(models) // settings.workers
        score_all(first, [*models[start:], *models[:start]], work)

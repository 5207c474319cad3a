"""`--workers`: more processes of this machine on one run. Each loads the model once and takes jobs from the ledger.

The command itself makes the variants, with all threads, and is the first of the workers; the others load meanwhile.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from qeval.compare.candidates import baseline_of, contenders
from qeval.compare.prepare import default_threads, prepare
from qeval.compare.remake import identity_of
from qeval.compare.scoring import Scorer
from qeval.compare.settings import Settings
from qeval.compare.standing import Model, Scored, score_all, work_of
from qeval.compare.variants import Entry
from qeval.executors.processes import Helpers, Receive, helping
from qeval.paths import HOME, home
from qeval.progress import Progress, Silent
from qeval.store.ledger import joined


@contextmanager
def helped(settings: Settings, crew: str, progress: Progress) -> Iterator[Helpers]:
    """All workers but this process, which wait to be told the variants and then score beside it."""
    arguments = [(settings, crew, place, str(home())) for place in range(1, settings.workers)]
    with helping(_work, arguments, progress) as helpers:
        yield helpers


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

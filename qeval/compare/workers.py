"""`--workers`: more processes on one run. Each loads the model once and takes jobs from the ledger.

The command itself makes the variants, with all threads. On one machine it is the first of the workers, and the others
load meanwhile; with `--executor ray` all workers are a cluster's, and the command does what they leave.

A streamed model is read by every worker, a layer at a time, at about the same time: a worker claims its share of a
model's windows and questions and runs it over the layers. The system's page cache hands what one has read to all.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch

from qeval.compare.machine import shares_device
from qeval.compare.plan import Plan, default_threads, make_plan, share_of_threads
from qeval.compare.run_models import baseline_model, score_all, scored_models, work_of
from qeval.compare.scored_models import ScoredModel
from qeval.compare.settings import Settings
from qeval.compare.settings_json import identity_of
from qeval.compare.variants import VariantEntry
from qeval.executors.cluster import Needs, RayWorkers, helping_on_ray
from qeval.executors.local import Share
from qeval.executors.processes import Helpers, Receive, helping
from qeval.paths import HOME, home
from qeval.progress import Progress, Silent
from qeval.score.jobs import Work
from qeval.store.ledger import join_ledger


@contextmanager
def helped(plan: Plan, crew: str, progress: Progress) -> Iterator[Helpers | RayWorkers]:
    """Start all workers but this process; they wait to be sent the variants and then score."""
    settings, theirs = plan.settings, _settings_of_workers(plan)
    on_ray = settings.executor == "ray"
    arguments = [
        (on_gpu_of(theirs, place), crew, place, str(home().resolve()))
        for place in range(0 if on_ray else 1, settings.worker_count)
    ]
    if on_ray:
        with helping_on_ray(_work, arguments, _needs(settings)) as workers:
            yield workers
        return
    with helping(_work, arguments, progress) as helpers:
        yield helpers


def on_gpu_of(settings: Settings, place: int) -> Settings:
    """Return the settings of the run's worker number `place`: each has a GPU of its own where no one GPU was named.

    A Ray worker sees no GPU but its own, as number 0, whatever the number was where the command was given.
    """
    kind, _, index = settings.model.device.partition(":")
    if kind != "cuda":
        return settings
    device = "cuda:0" if settings.executor == "ray" else f"cuda:{index or place}"
    return replace(settings, model=replace(settings.model, device=device))


def _settings_of_workers(plan: Plan) -> Settings:
    """Return what workers load: of a streamed model with the command's own batches and its limit on memory.

    Both depend on the memory that is free when a process starts. Nodes of a cluster and GPUs have their own.
    """
    settings = replace(plan.settings, out=plan.settings.out.resolve())
    if not (settings.model.stream and shares_device(settings)):
        return settings
    model = replace(settings.model, max_memory=plan.backend.memory_limit)
    return replace(settings, model=model, batch_tokens=plan.batch_tokens)


def share_of_worker(settings: Settings, place: int | None = None) -> Share | None:
    """Return what a worker of a streamed run does in one go; None where a job is run by itself.

    Args:
        settings: The run's.
        place: The worker's number; None for the command, which is the first worker unless a cluster has them all, and
            then does everything that is left.
    """
    on_ray = settings.executor == "ray"
    if not settings.model.stream or (settings.worker_count == 1 and not on_ray):
        return None
    if place is None and on_ray:
        return Share(0, 1)
    return Share(place or 0, settings.worker_count)


def wait_for(helpers: Helpers | RayWorkers, work: Work, models: Sequence[ScoredModel]) -> None:
    """Let a cluster's workers do the run; those of this machine are not waited for but worked with."""
    if not isinstance(helpers, RayWorkers):
        return
    wanted = {id_ for model in models for id_ in model.job_ids(work)}
    with work.progress.phase("score on Ray", len(wanted)) as advance:
        reason = helpers.wait(lambda: len(wanted & _finished(work)), lambda: work.ledger.others, advance)
    if reason:
        work.progress.warn(f"The Ray workers ended early: {reason} What they had not finished is done by this process.")


def _finished(work: Work) -> set[tuple[str, str]]:
    return {(each.kind, each.key) for each in work.ledger.finished()}


def _needs(settings: Settings) -> Needs:
    """Return what each of the run's workers takes: its share of the threads, and a GPU where one is computed on."""
    gpus = 1.0 if settings.model.device.startswith("cuda") else 0.0
    return Needs(share_of_threads(settings), gpus if settings.worker_gpus is None else settings.worker_gpus)


@contextmanager
def all_threads(settings: Settings) -> Iterator[None]:
    """Give this process all threads, while the other workers have nothing to do."""
    share = torch.get_num_threads()
    torch.set_num_threads(default_threads(settings) if settings.worker_count > 1 else share)
    try:
        yield
    finally:
        torch.set_num_threads(share)


def _work(settings: Settings, crew: str, place: int, cache: str, receive: Receive) -> None:
    """Work as one worker: score every model, beginning with its own share, then what others could not finish."""
    os.environ[HOME] = cache
    plan, progress = make_plan(settings), Silent()
    entries: Sequence[VariantEntry] = receive()
    identity = identity_of(settings)
    with join_ledger(
        settings.out, identity, settings.command, progress.warn, waiting=progress.tell, command_id=crew
    ) as ledger:
        baseline = baseline_model(plan, progress)
        work = work_of(plan, baseline, ledger, progress, share_of_worker(settings, place))
        baseline.score(work, wait=False)
        models = list(scored_models(plan, entries, baseline, progress))
        # Who shares every model's jobs has the same model as the others, so that a layer is read for all.
        start = place * len(models) // settings.worker_count if work.share is None else 0
        score_all(baseline, [*models[start:], *models[:start]], work)

"""Models behind endpoints among a run's models: scored by asking, in jobs of their own."""

from collections.abc import Iterator
from dataclasses import dataclass

from qeval.backends.endpoint.backend import Endpoint
from qeval.compare.endpoints import ServedVariant
from qeval.compare.plan import Plan
from qeval.compare.scored_models import ScoredModel
from qeval.score.jobs import ScoringJob, Work
from qeval.score.served import ServedCorpusJob, ServedQuestionJob
from qeval.store.rows import RowKind


@dataclass(eq=False, kw_only=True)
class ServedModel(ScoredModel):
    """A model behind an endpoint: asked over HTTP, never opened."""

    variant: ServedVariant

    @property
    def endpoint(self) -> Endpoint:
        """The endpoint that is asked."""
        return self.variant.endpoint

    def jobs(self, work: Work) -> dict[RowKind, list[ScoringJob]]:
        """Return the jobs on everything that an endpoint is asked."""
        jobs: dict[RowKind, list[ScoringJob]] = {
            "tokens": [ServedCorpusJob(self, work, shard) for shard in work.shards],
            "items": [ServedQuestionJob(self, work, suite, part) for suite in work.suites for part in suite.parts()],
        }
        self._jobs = [job for each in jobs.values() for job in each]
        return jobs


def served_models(plan: Plan) -> Iterator[ServedModel]:
    """Yield the models behind a plan's endpoints, in the order of the report."""
    for served in plan.served:
        key = {"baseline": plan.baseline_key, **served.endpoint.identity(None)}
        yield ServedModel(name=served.name, variant=served, backend=served.endpoint, key=key, out=plan.settings.out)

"""From the settings to what is run: the model loaded, the variants quantized, the prompts cut, bad input refused."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cache

import torch

from qeval.backends.torch import TorchBackend
from qeval.bench.engines.base import Tokens
from qeval.bench.engines.engine_spec import EngineSpec
from qeval.bench.prompts import passages
from qeval.bench.results import EngineCell
from qeval.bench.settings import BenchChoice
from qeval.compare.environment import describe_environment
from qeval.compare.external_variants import given_entry
from qeval.compare.loading import source_of_model, tell_warnings
from qeval.compare.plan import calibration_of
from qeval.compare.schemes import refuse_rotations, refuse_schemes, schemes_of
from qeval.compare.variants import BaselineModel, VariantEntry, Workshop, check_recipes
from qeval.errors import UsageError
from qeval.models.info import LoadedModel
from qeval.models.source import resolve
from qeval.progress import Progress
from qeval.store.run import ModelRecord
from qeval.store.timings import BenchRecord, BenchSettings
from qeval.store.variants import is_variant
from qeval.tasks.corpus import bos_token, encode, load_corpus

_CHECKS, _CHECK_PROMPT, _CHECK_TOKENS, _REJOIN_TOKENS = 3, 64, 32, 8
"""Prompts that an engine's tokens are checked on, their length, the tokens chosen, and those after a forced one."""


@dataclass(frozen=True, eq=False)
class Checks:
    """The prompts [prompts, tokens] of the check, how many tokens are chosen after each, and how many to rejoin."""

    prompts: Tokens
    tokens: int
    rejoin: int

    @property
    def capacity(self) -> int:
        """Return the tokens of the longest sequence of the check."""
        return int(self.prompts.shape[1]) + self.tokens + self.rejoin


@dataclass(frozen=True, eq=False)
class BenchPlan:
    """A benchmark that can start. `too_long` says of each cell beyond the context why it can't be run."""

    choice: BenchChoice
    loaded: LoadedModel
    source: BaselineModel
    backend: TorchBackend
    prompts: Mapping[tuple[int, int], Tokens]
    checks: Checks
    too_long: Mapping[tuple[int, int], str]
    record: BenchRecord

    @property
    def places(self) -> list[EngineCell]:
        """Return all cells of all systems, in the order of the tables."""
        choice = self.choice
        return [
            EngineCell(engine, variant, batch, prompt)
            for engine in choice.engines
            for variant in choice.variant_names
            for batch in choice.batches
            for prompt in choice.prompts
        ]

    @property
    def spec(self) -> EngineSpec:
        """Return what every engine is opened for, save its variant."""
        choice = self.choice
        on_cpu = choice.model.device == "cpu"
        return EngineSpec(
            model=resolve(choice.model.name, choice.model.revision),
            variant=None,
            precision="fp32" if on_cpu else "fp16",
            device=choice.model.device,
            provider=choice.provider,
            threads=self.record.settings.threads,
            batch=max((batch for batch, _ in self.prompts), default=1),
            capacity=max([self.checks.capacity, *(prompt + choice.generate for _, prompt in self.prompts)]),
            accuracy_level=choice.accuracy_level,
        )


def plan_benchmark(choice: BenchChoice) -> BenchPlan:
    """Load and check everything that `choice` names, save the engines.

    Raises:
        UsageError: It is not there, or does not fit.
    """
    refuse_schemes(schemes_of(choice.recipes, dict(choice.variants)), "qeval bench times")
    refuse_rotations(choice.recipes, dict(choice.variants), "qeval bench times")
    if choice.threads:
        torch.set_num_threads(choice.threads)
    loaded, source = source_of_model(choice.model)
    check_recipes(choice.recipes, source, choice.calibration.samples)
    for name, folder in choice.variants:
        if is_variant(folder):
            given_entry(name, folder, loaded.info.weights_sha256)
        elif not folder.exists():
            raise UsageError(f"--variant {name}={folder}: there is nothing there.")
    corpus = load_corpus(choice.corpus)
    ids, bos = encode(loaded.tokenizer, corpus.text), bos_token(loaded.tokenizer, "auto")
    too_long = _too_long(choice, loaded.info.context_length)
    fitting = [cell for cell in choice.cells if cell not in too_long]
    return BenchPlan(
        choice=choice,
        loaded=loaded,
        source=source,
        backend=TorchBackend(loaded.model, source.description, source.head, source.weight_dtype),
        prompts={(batch, prompt): passages(ids, batch, prompt, bos) for batch, prompt in fitting},
        checks=_checks(ids, bos, loaded.info.context_length),
        too_long=too_long,
        record=_record(choice, loaded, corpus.name, corpus.sha256),
    )


def make_variants(plan: BenchPlan, progress: Progress) -> list[VariantEntry]:
    """Return all variants in their order; the model itself has no folder, one that could not be quantized an error."""
    tell_warnings(plan.loaded, progress)
    choice = plan.choice
    calibration = cache(lambda: calibration_of(choice.calibration, plan.loaded))
    workshop = Workshop(plan.source, calibration, choice.seed, progress)
    unquantized = [VariantEntry(precision, "float", None) for precision in choice.precisions]
    quantized = [workshop.entry(recipe) for recipe in choice.recipes]
    return [*unquantized, *quantized, *(VariantEntry(name, "given", folder) for name, folder in choice.variants)]


def _checks(ids: Sequence[int], bos: int | None, context: int) -> Checks:
    """Return prompts for the check that fit a short context too."""
    prompts = passages(ids, _CHECKS, max(2, min(_CHECK_PROMPT, context // 2)), bos)
    return Checks(prompts, max(1, min(_CHECK_TOKENS, context // 4)), max(1, min(_REJOIN_TOKENS, context // 8)))


def _too_long(choice: BenchChoice, context: int) -> dict[tuple[int, int], str]:
    reason = "{} tokens of prompt and {} generated don't fit the context of {}."
    return {
        (batch, prompt): reason.format(prompt, choice.generate, context)
        for batch, prompt in choice.cells
        if prompt + choice.generate > context
    }


def _record(choice: BenchChoice, loaded: LoadedModel, corpus: str, corpus_sha256: str) -> BenchRecord:
    return BenchRecord(
        bench_version=1,
        command=choice.command,
        started=datetime.now(UTC).isoformat(timespec="seconds"),
        finished=None,
        seconds=0.0,
        seed=choice.seed,
        model=ModelRecord(**asdict(loaded.info)),
        environment=describe_environment(choice.model.device),
        settings=BenchSettings(
            engines=list(choice.engines),
            variants=choice.variant_names,
            batches=list(choice.batches),
            prompts=list(choice.prompts),
            generate=choice.generate,
            budget_seconds=choice.budget_seconds,
            threads=torch.get_num_threads(),
            device=choice.model.device,
            provider=choice.provider,
            accuracy_level=choice.accuracy_level,
            corpus=corpus,
            corpus_sha256=corpus_sha256,
        ),
        opened=[],
        cells=[],
        drifts=[],
        timings=[],
        warnings=[],
    )

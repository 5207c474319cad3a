"""From settings to a plan: the model loaded, the texts tokenized, every bad input found before any long work."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from qeval.backends.base import Session
from qeval.backends.llamacpp.backend import require_llama_cpp
from qeval.backends.memory import require_bf16
from qeval.backends.onnx.nbits import kernel_block
from qeval.backends.onnx.packages import require_onnx
from qeval.backends.stream.backend import StreamBackend
from qeval.backends.torch import TorchBackend
from qeval.calibrate.build import quantizable
from qeval.compare.elsewhere import Asked
from qeval.compare.estimate import Shape
from qeval.compare.given import given_folders, given_variants
from qeval.compare.llamacpp import Llama, llama_of
from qeval.compare.local import Place, local_places
from qeval.compare.overlap import overlap_of, with_overlap
from qeval.compare.settings import BackendChoice, CalibrationChoice, ModelChoice, Settings
from qeval.compare.stream import StreamWorkshop, room_beside, streamed_model
from qeval.compare.tokens import bos_warnings, each_corpus, protocol_of, token_work
from qeval.compare.variants import (
    Calibration,
    Entry,
    Loaded,
    Workshop,
    check_recipes,
)
from qeval.compare.witness import witness_of
from qeval.errors import UsageError
from qeval.executors.cluster import require_ray
from qeval.identity import digest
from qeval.models.graph import describe
from qeval.models.head import head_of
from qeval.models.info import LoadedModel
from qeval.models.load import load
from qeval.models.matrices import weights_of
from qeval.models.source import resolve
from qeval.models.supported import notes_of
from qeval.progress import Progress
from qeval.score.corpus import Shard
from qeval.score.drift import Part, parts_of
from qeval.store.run import CalibrationRecord, DriftRecord, ModelRecord, OverlapRecord, ProtocolRecord, TaskRecord
from qeval.tasks.corpus import bos_token, encode, load_calibration, load_corpus
from qeval.tasks.drift import prompts_of
from qeval.tasks.harness import Suite, load_suite
from qeval.tasks.windows import tokens_sha256

if TYPE_CHECKING:
    from qeval.compare.onnx import Foreign, Runtime

_CORES = torch.get_num_threads()
"""What torch takes by itself."""


@dataclass(frozen=True, eq=False)
class Plan:
    """A run that can start: everything that was asked for is there and fits."""

    settings: Settings
    loaded: LoadedModel
    source: Loaded
    backend: TorchBackend | StreamBackend
    model: ModelRecord
    protocol: ProtocolRecord | None
    shards: tuple[Shard, ...]
    suites: tuple[Suite, ...]
    tasks: tuple[TaskRecord, ...]
    drift: DriftRecord | None
    parts: tuple[Part, ...]
    places: tuple[Place, ...]
    given: tuple[Entry, ...]
    foreign: "tuple[Foreign, ...]"
    runtime: "Runtime | None"
    llama: Llama | None
    calibration: Callable[[], Calibration]
    overlap: Callable[[], OverlapRecord]
    """What the calibration text shares with what is scored."""
    shape: Shape
    batch_tokens: int
    """Tokens a batch: what was asked for, else what suits the device and its free memory."""
    is_drawn: bool = False
    """Whether this is a part of what the settings name, drawn by a gate."""

    @property
    def warnings(self) -> list[str]:
        """What must be known of the numbers before any is made."""
        told = [*self.loaded.warnings, *(warning for place in self.places for warning in place.warnings)]
        if self.llama and self.llama.unwritten:
            told.append(f"There is no noise floor of llama.cpp, the baseline in it: {self.llama.unwritten}")
        return [*told, *(bos_warnings(self.protocol, self.loaded) if self.protocol else ())]

    @property
    def baseline_key(self) -> str:
        """The identity of the baseline's numbers: weights, configuration, type of the arithmetic, kind of device."""
        return self.key_in(self.model.compute_dtype)

    @property
    def rounds_on_cpu(self) -> bool:
        """Whether the CPU computes in less than fp32, so that the noise of that is to be shown."""
        return self.settings.model.device == "cpu" and self.model.compute_dtype in ("bfloat16", "float16")

    def key_in(self, compute: str) -> str:
        """The identity of the baseline's numbers in a compute type."""
        kind = self.settings.model.device.partition(":")[0]
        return digest(
            {
                "weights": self.model.weights_sha256,
                "config": self.loaded.config_sha256,
                "compute": compute,
                "device": kind,
            }
        )

    def workshop(self, progress: Progress) -> AbstractContextManager[Workshop]:
        """What makes the run's variants, as `workshop_of`."""
        return workshop_of(self.source, self.calibration, self.backend, self.settings.seed, progress)

    @property
    def corpus_tokens(self) -> int:
        """Tokens that one model runs for the corpus."""
        return sum(shard.tokens for shard in self.shards)

    @property
    def models(self) -> int:
        """How many models are scored: the baseline, and every variant on every backend."""
        floor, others = (1, len(self.runtime.backends)) if self.runtime else (0, 0)
        if self.llama:
            floor, others = floor + (self.llama.unwritten is None), others + 1
        floor += self.rounds_on_cpu
        backends = self.settings.backends.uses_torch + others
        return 1 + floor + len(self.foreign) + backends * (len(self.settings.recipes) + len(self.given))


def prepare(settings: Settings) -> Plan:
    """Load and check everything that `settings` names.

    Raises:
        UsageError: something that was asked for is not there or does not fit.
    """
    if settings.executor == "ray":
        require_ray()
    if settings.threads or settings.workers > 1:
        torch.set_num_threads(share_of_threads(settings))
    if settings.backends.uses_llama:
        require_llama_cpp()
    if settings.model.device == "cpu" and settings.model.compute == "bfloat16":
        require_bf16()
    places = local_places(settings.variants)  # what the hub lacks is told before a model is loaded
    loaded, source, backend = loaded_model(settings.model, folds=any(recipe.uses_awq for recipe in settings.recipes))
    fits = [kernel_block] if settings.backends.uses_ort else []
    check_recipes(settings.recipes, source, settings.calibration.samples, *fits)
    protocol, shards = token_work(settings.corpus, loaded) if settings.scores_tokens else (None, ())
    suites = _suites(settings, loaded)
    drift, parts = _drift(settings, loaded) if settings.continues else (None, ())
    if isinstance(backend, StreamBackend):
        backend.reserve(max((shard.tokens for shard in shards), default=0))
    asked = _asked(settings, loaded, witness_of(shards, suites, protocol, drift), suites)
    calibration = cache(lambda: calibration_of(settings.calibration, loaded))
    overlap = cache(lambda: overlap_of(calibration().samples, shards, suites))
    if any(recipe.calibrated for recipe in settings.recipes):
        calibration()
    for recipe in settings.recipes:
        if recipe.calibrated and isinstance(backend, StreamBackend):
            room_beside(backend, source, recipe, calibration().samples)
    return Plan(
        settings=settings,
        loaded=loaded,
        source=source,
        backend=backend,
        model=ModelRecord(**asdict(loaded.info)),
        protocol=protocol,
        shards=shards,
        suites=suites,
        tasks=tuple(TaskRecord(**asdict(suite.info)) for suite in suites),
        drift=drift,
        parts=parts,
        places=places,
        given=tuple(
            with_overlap(each, shards, suites) for each in given_variants(places, loaded, source, backend, asked, fits)
        ),
        foreign=given_folders(places, settings.backends.ep, loaded, source, asked),
        runtime=_runtime(settings.backends, loaded, source) if settings.backends.uses_ort else None,
        llama=_llama(settings, loaded, source, places) if settings.backends.uses_llama else None,
        calibration=calibration,
        overlap=overlap,
        batch_tokens=settings.batch_tokens or backend.batch_tokens,
        shape=_shape(loaded, quantizable(source.description)),
    )


def share_of_threads(settings: Settings) -> int:
    """The threads of each of a run's workers."""
    return max(1, default_threads(settings) // settings.workers)


def default_threads(settings: Settings) -> int:
    """The threads of a whole run: what was asked for, else all cores."""
    return settings.threads or _CORES


def source_of_model(choice: ModelChoice) -> tuple[LoadedModel, Loaded]:
    """The model that a choice names, and what variants are made from.

    Raises:
        UsageError: it can't be loaded, scored or quantized.
    """
    loaded = load(resolve(choice.name, choice.revision), device=choice.device, dtype=choice.compute)
    description = describe(loaded.model)
    notes = (*loaded.info.notes, *notes_of(loaded.model, description))
    loaded = replace(loaded, info=replace(loaded.info, notes=notes))
    return loaded, Loaded(
        model=loaded.model,
        description=description,
        head=head_of(loaded.model),
        weights_sha256=loaded.info.weights_sha256,
        config_sha256=loaded.config_sha256,
        name=choice.name,
        weight_dtype=getattr(torch, loaded.info.weight_dtype),
    )


def tell_warnings(loaded: LoadedModel, progress: Progress) -> None:
    """Say what must be told of how a model was had today, such as a copy in the cache of a hub that does not answer."""
    for warning in loaded.warnings:
        progress.warn(warning)


@contextmanager
def workshop_of(
    source: Loaded,
    calibration: Callable[[], Calibration],
    backend: TorchBackend | StreamBackend,
    seed: int,
    progress: Progress,
) -> Iterator[Workshop]:
    """What makes a model's variants; what calibrating left is let go of when the block ends."""
    if isinstance(backend, StreamBackend):
        made: Workshop = StreamWorkshop(source, calibration, backend, seed, progress)
    else:
        made = Workshop(source, calibration, seed, progress)
    with closing(made):
        yield made


@contextmanager
def open_exact(choice: ModelChoice, compute: str) -> Iterator[Session]:
    """A session of the baseline in another compute type, loaded for the length of the block."""
    with loaded_model(replace(choice, compute=compute))[2].open(None) as session:
        yield session


def loaded_model(
    choice: ModelChoice, *, folds: bool = False
) -> tuple[LoadedModel, Loaded, TorchBackend | StreamBackend]:
    """The model that a choice names, what variants are made from, and what opens it.

    `folds`: whether a streamed model is looked at for what takes its inputs' scales; others always are.
    """
    if choice.stream:
        return streamed_model(choice, folds=folds)
    loaded, source = source_of_model(choice)
    return loaded, source, TorchBackend(loaded.model, source.description, source.head, source.weight_dtype)


def _runtime(choice: BackendChoice, loaded: LoadedModel, source: Loaded) -> "Runtime":
    require_onnx()
    from qeval.compare.onnx import runtime_of  # noqa: PLC0415 - an extra

    return runtime_of(choice, loaded, source.description)


def _llama(settings: Settings, loaded: LoadedModel, source: Loaded, places: Sequence[Place]) -> Llama:
    given = {each.name: each.path for each in places if each.path.suffix.lower() == ".gguf"}
    return llama_of(
        loaded,
        given,
        writes=bool(settings.recipes) or len(given) < len(places),
        ids=int(source.head.weight.shape[0]),
        threads=torch.get_num_threads(),
        device=settings.model.device,
    )


def _asked(settings: Settings, loaded: LoadedModel, ours: str, suites: Sequence[Suite]) -> Asked:
    """What every side of the run is asked, and what a tokenizer makes of it."""
    texts = [loaded.tokenizer.decode(part[0].prompt) for suite in suites for part in suite.parts()]
    if settings.scores_tokens or settings.continues:
        texts += [load_corpus(protocol_of(each, loaded).corpus).text for each in each_corpus(settings.corpus)]

    def theirs(tokenizer: Any) -> str:
        side = replace(loaded, tokenizer=tokenizer)
        protocol, shards = token_work(settings.corpus, side) if settings.scores_tokens else (None, ())
        drift = _drift(settings, side)[0] if settings.continues else None
        return witness_of(shards, _suites(settings, side), protocol, drift)

    return Asked(texts, settings.corpus.bos, ours, theirs)


def _shape(loaded: LoadedModel, names: list[str]) -> Shape:
    parameters = weights_of(loaded.model)
    return Shape(
        layer_weights=sum(parameters[name].numel() for name in names),
        head_weights=loaded.model.get_output_embeddings().weight.numel(),
        parameters=sum(parameter.numel() for parameter in parameters.values()),
        bytes_per_parameter=next(iter(parameters.values())).element_size(),
    )


def _drift(settings: Settings, loaded: LoadedModel) -> tuple[DriftRecord, tuple[Part, ...]]:
    asked = settings.drift
    whole = asked.prompt_tokens + asked.tokens
    if whole > loaded.info.context_length:
        raise UsageError(
            f"Prompts of {asked.prompt_tokens} tokens and {asked.tokens} more are longer than the model's context of "
            f"{loaded.info.context_length}; give smaller --drift-prompt-tokens or --drift-tokens."
        )
    corpus = load_corpus(protocol_of(each_corpus(settings.corpus)[0], loaded).corpus)
    bos = bos_token(loaded.tokenizer, settings.corpus.bos)
    prompts = prompts_of(encode(loaded.tokenizer, corpus.text), asked.prompts, asked.prompt_tokens, bos)
    record = DriftRecord(
        corpus=corpus.name,
        corpus_sha256=corpus.sha256,
        tokens_sha256=tokens_sha256([token for prompt in prompts for token in prompt]),
        prompts=len(prompts),
        prompt_tokens=asked.prompt_tokens,
        generated=asked.tokens,
        bos=bos is not None,
    )
    return record, parts_of(prompts, asked.tokens)


def _suites(settings: Settings, loaded: LoadedModel) -> tuple[Suite, ...]:
    asked = settings.questions
    return tuple(
        load_suite(
            name,
            loaded.tokenizer,
            max_length=loaded.info.context_length,
            bos=settings.corpus.bos,
            shots=asked.shots,
            limit=asked.limit,
            folder=asked.mmlu_dir,
            subjects=asked.subjects,
        )
        for name in settings.question_tasks
    )


def calibration_of(asked: CalibrationChoice, loaded: LoadedModel) -> Calibration:
    """The calibration samples: the first tokens of the source, cut into sequences.

    Raises:
        UsageError: the text is too short.
    """
    text = load_calibration(asked.source)
    ids = encode(loaded.tokenizer, text.text)
    needed = asked.samples * asked.length
    if len(ids) < needed:
        raise UsageError(
            f"The calibration text '{text.name}' holds {len(ids)} tokens, fewer than {asked.samples} samples of "
            f"{asked.length}; give a longer text or fewer --calibration-samples."
        )
    samples = tuple(ids[start : start + asked.length] for start in range(0, needed, asked.length))
    record = CalibrationRecord(
        source=text.name,
        text_sha256=text.sha256,
        tokens_sha256=tokens_sha256(ids[:needed]),
        samples=asked.samples,
        length=asked.length,
    )
    return Calibration(samples, record.model_dump())

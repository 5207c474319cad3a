"""From settings to a plan: the model loaded, the texts tokenized, every bad input found before any long work."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import asdict, dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from qeval.backends.base import Backend, BaselineBackend
from qeval.backends.memory import require_bf16
from qeval.compare.backends import BackendInputs, backends_of, kinds_of
from qeval.compare.contamination import overlap_of, with_overlap
from qeval.compare.cost import Shape
from qeval.compare.endpoints import ServedVariant, find_endpoints
from qeval.compare.external_parts import parts_choice
from qeval.compare.external_paths import VariantPath, is_gguf, local_places
from qeval.compare.external_variants import read_onnx_folders, read_variants
from qeval.compare.loading import baseline_key, loaded_model
from qeval.compare.machine import with_limit
from qeval.compare.schemes import (
    refuse_schemes_off_torch,
    schemes_of,
)
from qeval.compare.scored_data import ScoredData, scored_data
from qeval.compare.settings import CalibrationChoice, Settings
from qeval.compare.sources import load_tasks
from qeval.compare.tokens import bos_warnings
from qeval.compare.variants import (
    BaselineModel,
    Calibration,
    VariantEntry,
    Workshop,
    check_recipes,
)
from qeval.errors import UsageError
from qeval.executors.cluster import require_ray
from qeval.models.in_memory import MemoryModel
from qeval.models.info import LoadedModel
from qeval.models.structure.weight_views import weights_of
from qeval.models.vocabulary import check_ids
from qeval.progress import Progress, Silent
from qeval.quantize.build import quantizable
from qeval.store.out import check_out
from qeval.store.run import (
    CalibrationRecord,
    ModelRecord,
    OverlapRecord,
    TaskRecord,
)
from qeval.tasks.corpus import CHAT, encode, load_calibration
from qeval.tasks.windows import tokens_sha256

if TYPE_CHECKING:
    from qeval.compare.onnx import OnnxVariant

_FINE_BITS = 8
_CORES = torch.get_num_threads()
"""What torch takes by itself."""


@dataclass(frozen=True, eq=False)
class Plan(ScoredData):
    """A run that can start: everything that was asked for is there and fits."""

    settings: Settings
    loaded: LoadedModel
    source: BaselineModel
    backend: BaselineBackend[Any]
    """What the baseline runs on."""
    backends: tuple[Backend[Any], ...]
    """What every variant runs on, in the order of the report."""
    floors: tuple[Backend[Any], ...]
    """What the baseline is scored on too: the least difference that the run can see."""
    model: ModelRecord
    tasks: tuple[TaskRecord, ...]
    places: tuple[VariantPath, ...]
    given: tuple[VariantEntry, ...]
    onnx_variants: "tuple[OnnxVariant, ...]"
    served: tuple[ServedVariant, ...]
    """Models behind endpoints."""
    calibration: Callable[[], Calibration]
    overlap: Callable[[], OverlapRecord]
    """What the calibration text shares with what is scored."""
    shape: Shape
    batch_tokens: int
    """Tokens a batch: what was asked for, else what suits the device and its free memory."""
    is_drawn: bool = False
    """Whether this is a part of what the settings name, drawn by a gate."""
    memory: MemoryModel | None = None
    """The model that the caller loaded; None where it is loaded from where the settings say."""

    @property
    def warnings(self) -> list[str]:
        """Sentences on the limits of the numbers, before any is made."""
        warnings = [*self.loaded.warnings, *self.backend.warnings, *self._cost_of_whole_questions]
        warnings += [*(warning for place in self.places for warning in place.warnings)]
        warnings += [*(warning for entry in self.given for warning in entry.warnings)]
        warnings += [*(warning for each in self.backends if each is not self.backend for warning in each.warnings)]
        warnings += self.response_warnings
        penalty = getattr(getattr(self.loaded.model, "generation_config", None), "repetition_penalty", None)
        if self.generated_tokens and penalty not in (None, 1.0):
            warnings.append(
                f"The model's generation config has a repetition_penalty of {penalty:g}, which lm-eval's `hf` model "
                "applies; answers here are plainly greedy, on every side."
            )
        if self.drift and self.drift.prompts < self.settings.drift.prompts:
            why = "--corpus chat has no more" if self.drift.corpus == CHAT else "the corpus repeats itself"
            warnings.append(
                f"{self.settings.drift.prompts} prompts were asked for, and there are {self.drift.prompts} distinct "
                f"ones: {why}, and no prompt is continued twice."
            )
        return [*warnings, *(bos_warnings(self.protocol, self.loaded) if self.protocol else ())]

    @property
    def baseline_key(self) -> str:
        """The identity of the baseline's numbers: weights, configuration, type of the arithmetic, kind of device."""
        return self.key_in(self.model.compute_dtype)

    @property
    def baseline_size_bytes(self) -> int:
        """Bytes of the baseline's weights in the checkpoint's type."""
        return self.shape.parameters * self.source.float_bits // 8

    @property
    def rounds(self) -> bool:
        """Return whether the model is computed in less than fp32, so that the noise of that is to be shown."""
        return self.model.compute_dtype in ("bfloat16", "float16")

    @property
    def near_the_floor(self) -> list[str]:
        """The recipes whose loss half precision may hide: all of their weights have 8 bits or more."""
        if not self.rounds:
            return []
        return [
            each.name
            for each in self.settings.every_recipe
            if not each.quant_method.mixes and each.low_grid.bits >= _FINE_BITS
        ]

    def key_in(self, compute: str) -> str:
        """Return the identity of the baseline's numbers in a compute type."""
        return baseline_key(self.loaded, self.settings.model.device, compute)

    def workshop(self, progress: Progress) -> AbstractContextManager[Workshop]:
        """Return what makes the run's variants; what calibrating left is let go of when the block ends."""
        return closing(self.source.workshop(self.calibration, self.settings.seed, progress))

    @property
    def asked_tokens(self) -> int:
        """Tokens that one model runs for questions and needles."""
        return self.question_tokens(shared=self.backend.shares_prefixes)

    @property
    def _cost_of_whole_questions(self) -> list[str]:
        """A sentence on what it costs that prefixes are not shared, where they aren't."""
        if self.backend.shares_prefixes or not (self.suites or self.haystacks):
            return []
        times = self.question_tokens(shared=False) / self.question_tokens(shared=True)
        return [f"Questions run whole: {times:.1f} times the tokens of a model whose questions share their examples."]

    @property
    def models(self) -> int:
        """The number of scored models: the baseline, and every variant on every backend."""
        variants, parts = len(self.settings.recipes) + len(self.given), len(self.settings.parts)
        return (
            1
            + len(self.floors)
            + self.rounds
            + len(self.backends) * variants
            + parts
            + len(self.onnx_variants)
            + len(self.served)
        )


def make_plan(settings: Settings, memory: MemoryModel | None = None, progress: Progress | None = None) -> Plan:
    """Load and check everything that `settings` names, and have the baseline answer prompts where it is to.

    Args:
        settings: What the run is to be.
        memory: The model, where the caller has loaded it already.
        progress: Hears of the answers; nobody without it.

    Raises:
        UsageError: something that was asked for is not there or does not fit.
    """
    _prepare_machine(settings)
    tasks = load_tasks(settings)  # what the hub lacks is told before a model is loaded
    places = local_places(settings.variants)
    _check_schemes(settings, places)
    choice = parts_choice(settings, has_gguf=any(is_gguf(place.path) for place in places))
    folds = any(recipe.quant_method.scales_inputs or recipe.rotations is not None for recipe in settings.every_recipe)
    loaded, source, backend = loaded_model(with_limit(settings), memory, folds=folds)
    fits = [kind.check_grid for kind in kinds_of(settings.backends.names) if kind.check_grid]
    check_recipes(settings.every_recipe, source, settings.calibration.samples, *fits)
    data, token_check = scored_data(settings, loaded, backend, tasks, progress or Silent())
    schemes = [recipe.scheme for recipe in settings.every_recipe]
    backend.reserve(data.most_positions, schemes)
    calibration = cache(lambda: calibration_of(settings.calibration, loaded))
    for recipe in settings.every_recipe:
        if recipe.calibrated:
            source.check_room(recipe, calibration().samples)
    given = read_variants(places, loaded, source, backend, token_check, fits, choice)
    backend.reserve(data.most_positions, [*schemes, *(each.target.effective_scheme for each in given if each.folder)])
    onnx_variants = read_onnx_folders(places, settings.backends.ep, loaded, source, token_check)
    served = find_endpoints(settings, loaded, int(source.head.weight.shape[0]), data.shards, data.suites)
    backends, floors = backends_of(BackendInputs(settings, loaded, source, backend, places))
    return Plan(
        **vars(data),
        settings=settings,
        loaded=loaded,
        source=source,
        backend=backend,
        backends=backends,
        floors=floors,
        model=ModelRecord(**asdict(loaded.info)),
        tasks=tuple(TaskRecord(**asdict(suite.info)) for suite in data.suites),
        places=places,
        given=tuple(with_overlap(each, data.texts) for each in given),
        onnx_variants=onnx_variants,
        served=served,
        calibration=calibration,
        overlap=cache(lambda: overlap_of(calibration().samples, data.texts)),
        batch_tokens=settings.batch_tokens or backend.batch_tokens,
        shape=_shape(loaded, quantizable(source.description)),
        memory=memory,
    )


def _prepare_machine(settings: Settings) -> None:
    """Check that the output can be written and the device computes, and take the threads that were asked for."""
    check_out(settings.out, "the report")
    _check_machine(settings)
    if settings.threads or settings.worker_count > 1:
        torch.set_num_threads(share_of_threads(settings))


def _check_machine(settings: Settings) -> None:
    """Refuse what this machine lacks: packages, GPUs, arithmetic in half precision."""
    if settings.executor == "ray":
        require_ray()
    _check_gpus(settings)
    for kind in kinds_of(settings.backends.names):
        if kind.require:
            kind.require()
    if settings.model.device == "cpu" and settings.model.compute == "bfloat16":
        require_bf16()


def _check_schemes(settings: Settings, places: Sequence[VariantPath]) -> None:
    """Refuse rounded activations, keys and values where only weights are."""
    folders = {place.name: place.path for place in places}
    names, ep = settings.backends.runners, settings.backends.ep
    refuse_schemes_off_torch(schemes_of(settings.recipes, folders), names, ep)
    refuse_schemes_off_torch(schemes_of(settings.parts, {}), names[:1], ep)  # parts are scored on the first alone


def _check_gpus(settings: Settings) -> None:
    """Refuse more local workers than there are GPUs, unless one GPU was named for all of them."""
    if settings.model.device != "cuda" or settings.executor == "ray":
        return
    count = torch.cuda.device_count()
    if settings.worker_count > max(count, 1):
        raise UsageError(
            f"--workers {settings.workers}: each worker takes a GPU of its own, and this machine has {count}; give "
            f"--workers {count}, or --device cuda:0 for all of them on one."
        )


def share_of_threads(settings: Settings) -> int:
    """Return the threads of each of a run's workers."""
    return max(1, default_threads(settings) // settings.worker_count)


def default_threads(settings: Settings) -> int:
    """Return the threads of a whole run: what was asked for, else all cores."""
    return settings.threads or _CORES


def _shape(loaded: LoadedModel, names: list[str]) -> Shape:
    parameters = weights_of(loaded.model)
    return Shape(
        layer_weights=sum(parameters[name].numel() for name in names),
        head_weights=loaded.model.get_output_embeddings().weight.numel(),
        parameters=sum(parameter.numel() for parameter in parameters.values()),
        bytes_per_parameter=next(iter(parameters.values())).element_size(),
    )


def calibration_of(choice: CalibrationChoice, loaded: LoadedModel) -> Calibration:
    """Return the calibration samples: the first tokens of the source, cut into sequences.

    Raises:
        UsageError: the text is too short.
    """
    text = load_calibration(choice.source)
    ids = encode(loaded.tokenizer, text.text)
    needed = choice.samples * choice.length
    if len(ids) < needed:
        raise UsageError(
            f"The calibration text '{text.name}' holds {len(ids)} tokens, fewer than {choice.samples} samples of "
            f"{choice.length}; give a longer text or fewer --calibration-samples."
        )
    check_ids(ids[:needed], loaded.info.vocab_size, loaded.tokenizer, f"The calibration text '{text.name}'")
    samples = tuple(ids[start : start + choice.length] for start in range(0, needed, choice.length))
    record = CalibrationRecord(
        source=text.name,
        text_sha256=text.sha256,
        tokens_sha256=tokens_sha256(ids[:needed]),
        samples=choice.samples,
        length=choice.length,
    )
    return Calibration(samples, record.model_dump(), choice.all_experts)

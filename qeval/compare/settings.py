"""Everything that a run was asked for, checked once at the door."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qeval.backends.onnx.providers import PROVIDERS
from qeval.config import Recipe, check_distinct
from qeval.errors import UsageError, unknown
from qeval.paths import check_place

_SCHEME = re.compile(r"([a-z][a-z0-9+.-]+):/")
"""How an address begins once it was read as a path: `s3://bucket` is `s3:/bucket` then."""

Bos = Literal["auto", "always", "never"]
Format = Literal["nbits", "qdq"]
Precision = Literal["fp32", "fp16"]
Executor = Literal["local", "ray"]
BACKENDS = ("torch", "ort", "llama.cpp")
EXPORTERS = ("auto", "genai", "dynamo")
FORMATS = ("nbits", "qdq")
TOKEN_METRICS = ("kl", "ppl")
"""What one pass over a corpus gives."""
DRIFT = "drift"
"""Greedy continuations; everything else in `tasks` is a task of questions."""


@dataclass(frozen=True)
class ModelChoice:
    """Which weights, where they run and in what type they compute."""

    name: str
    revision: str | None = None
    device: str = "cpu"
    compute: str | None = None
    stream: bool = False
    """Whether decoder layers are read one at a time, for a model that memory does not hold."""
    max_memory: int | None = None
    """Bytes that weights, activations and logits of a streamed model may take; None: half of what is free."""

    def __post_init__(self) -> None:
        """Refuse a limit that nothing keeps to.

        Raises:
            UsageError: a limit without streaming.
        """
        if self.max_memory is not None and not self.stream:
            raise UsageError("--max-memory is the limit of a streamed model; add --stream.")


@dataclass(frozen=True)
class CorpusChoice:
    """Which text and windows; `protocol` excludes `window`, `stride` and another `convention`."""

    corpus: str | None = None
    protocol: str | None = None
    window: int | None = None
    stride: int | None = None
    max_windows: int | None = None
    bos: Bos = "auto"
    convention: str | None = None


@dataclass(frozen=True)
class TaskChoice:
    """Which questions."""

    mmlu_dir: Path | None = None
    subjects: tuple[str, ...] = ()
    limit: int | None = None
    shots: int = 5


@dataclass(frozen=True)
class DriftChoice:
    """How many prompts are continued, how long they are, and by how many tokens."""

    prompts: int = 32
    prompt_tokens: int = 64
    tokens: int = 64


@dataclass(frozen=True)
class CalibrationChoice:
    """What quantizers may see."""

    source: str = "pydoc"
    samples: int = 16
    length: int = 512


@dataclass(frozen=True)
class BackendChoice:
    """Which backends score the variants; the rest says how ONNX Runtime does it."""

    names: tuple[str, ...] = ("torch",)
    accuracy_levels: tuple[int, ...] = (1,)
    ep: str = "cpu"
    exporter: str = "auto"
    format: Format = "nbits"
    precision: Precision | None = None
    """Of a graph's activations and floats; None means fp32 for the CPU and fp16 for every other provider."""

    def __post_init__(self) -> None:
        """Refuse what no backend is.

        Raises:
            UsageError: an unknown backend, exporter, format or accuracy level.
        """
        for kind, value, choices in (
            *(("backend", name, BACKENDS) for name in self.names or ("",)),
            ("exporter", self.exporter, EXPORTERS),
            ("format", self.format, FORMATS),
            ("execution provider", self.ep, PROVIDERS),
        ):
            if value not in choices:
                raise unknown(kind, value, choices)
        if not self.accuracy_levels or set(self.accuracy_levels) - {1, 4}:
            raise UsageError("--accuracy-level takes 1 (fp32 activations), 4 (int8 activations), or 1,4.")

    @property
    def uses_torch(self) -> bool:
        """Whether fake-quantized weights are scored in torch."""
        return "torch" in self.names

    @property
    def uses_ort(self) -> bool:
        """Whether ONNX Runtime scores the variants."""
        return "ort" in self.names

    @property
    def uses_llama(self) -> bool:
        """Whether llama.cpp scores the variants."""
        return "llama.cpp" in self.names


@dataclass(frozen=True)
class Settings:
    """One run."""

    model: ModelChoice
    recipes: tuple[Recipe, ...]
    variants: tuple[tuple[str, Path], ...]
    tasks: tuple[str, ...]
    corpus: CorpusChoice
    questions: TaskChoice
    calibration: CalibrationChoice
    out: Path
    backends: BackendChoice = BackendChoice()
    drift: DriftChoice = DriftChoice()
    batch_tokens: int | None = None
    threads: int | None = None
    seed: int = 0
    workers: int = 1
    """Processes that score; the threads are shared out among them."""
    executor: Executor = "local"
    worker_gpus: float | None = None
    """GPUs that a Ray worker takes; None: one where the device is a GPU."""
    command: str = ""

    def __post_init__(self) -> None:
        """Refuse a run that could not say anything.

        Raises:
            UsageError: nothing to compare or to score, two variants of one name, numbers below one, a file as --out.
        """
        check_distinct((*self.recipes, *(Recipe(name, "rtn") for name, _ in self.variants)))
        if not self.recipes and not self.variants:
            raise UsageError("Nothing to compare: give --methods, --config or --variant.")
        if not self.tasks:
            raise UsageError("Nothing to score: give --tasks, for example --tasks kl,ppl,mmlu.")
        if self.model.stream:
            self._check_stream()
        if scheme := _SCHEME.match(str(self.out)):
            raise UsageError(
                f"--out {self.out} is an address, and a run's ledger needs a folder whose file system locks files; "
                f"mount what {scheme[1]} names, on every node of a cluster, and give its path."
            )
        check_place(self.out, "the report")
        for flag, value in {
            "--limit": self.questions.limit,
            "--max-windows": self.corpus.max_windows,
            "--calibration-samples": self.calibration.samples,
            "--calibration-length": self.calibration.length,
            "--drift-prompts": self.drift.prompts,
            "--drift-prompt-tokens": self.drift.prompt_tokens,
            "--drift-tokens": self.drift.tokens,
            "--batch-tokens": self.batch_tokens,
            "--threads": self.threads,
            "--workers": self.workers,
        }.items():
            if value is not None and value < 1:
                raise UsageError(f"{flag} must be at least 1, not {value}.")
        if self.worker_gpus is not None and self.executor != "ray":
            raise UsageError("--worker-gpus is for --executor ray.")
        if self.worker_gpus is not None and self.worker_gpus < 0:
            raise UsageError(f"--worker-gpus must not be below 0, as {self.worker_gpus} is.")

    def _check_stream(self) -> None:
        """Refuse what needs the whole model in memory."""
        if set(self.backends.names) - {"torch"}:
            raise UsageError(
                "--stream runs in torch; files for other backends are written of the whole model: leave out "
                f"--backend {','.join(self.backends.names)}."
            )
        if self.workers > 1 or self.executor == "ray":
            raise UsageError("--stream runs all jobs in one pass over the layers: leave out --workers and --executor.")
        if self.continues:
            raise UsageError(
                "--tasks drift generates one token after another, and --stream would read every layer for each: leave "
                "one of them out."
            )
        check_streamed(self.recipes)

    @property
    def scores_tokens(self) -> bool:
        """Whether a corpus is run."""
        return any(task in TOKEN_METRICS for task in self.tasks)

    @property
    def question_tasks(self) -> tuple[str, ...]:
        """The tasks of questions, in the order given."""
        return tuple(task for task in self.tasks if task not in (*TOKEN_METRICS, DRIFT))

    @property
    def continues(self) -> bool:
        """Whether the baseline's greedy continuations are run."""
        return DRIFT in self.tasks


def check_streamed(recipes: Sequence[Recipe]) -> None:
    """Refuse recipes that a streamed model can't be quantized by.

    Raises:
        UsageError: another tool quantizes.
    """
    if tools := [recipe.name for recipe in recipes if recipe.tool]:
        raise UsageError(
            f"{', '.join(tools)}: other tools quantize models that are in memory; leave them or --stream out."
        )

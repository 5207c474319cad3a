"""The settings of one run, checked when they are built; each is described by its option."""

import math
import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal

from qeval.backends.onnx.providers import PROVIDERS
from qeval.compare import arguments as read
from qeval.compare.chat_choice import ChatChoice
from qeval.compare.endpoint_choice import EndpointChoice, check_endpoint_run, endpoint_urls, is_address
from qeval.compare.generation_choice import DriftChoice, TraceChoice
from qeval.compare.large_models import check_spread, check_stream
from qeval.compare.needle_choice import NeedleChoice
from qeval.compare.options import Checked, Option
from qeval.compare.task_choice import TaskChoice
from qeval.compare.vllm_choice import VllmChoice, check_vllm
from qeval.config import Recipe, check_distinct
from qeval.errors import UsageError, unknown
from qeval.paths import check_place
from qeval.recipe_parts import added_parts
from qeval.tasks.corpus import CHAT, corpus_names
from qeval.tasks.names import TRACE_TASKS
from qeval.types import OnnxFormat, OnnxPrecision, Sampler

_SCHEME = re.compile(r"([a-z][a-z0-9+.-]+):/")
"""How an address begins once it was read as a path: `s3://bucket` is `s3:/bucket` then."""

Bos = Literal["auto", "always", "never"]
Exporter = Literal["auto", "genai", "dynamo"]
Executor = Literal["local", "ray"]
DeviceMapKind = Literal["auto"]
ExportForm = Literal["onnx", "hf", "gguf"]
"""The forms of `export`: an ONNX folder, a checkpoint in compressed-tensors' layouts, or a GGUF file."""
ExternalParts = Literal["split", "all", "weights"]
AUTO = "auto"
"""Of a device or a provider: whatever serves this machine; `compare.machine` says which."""
BACKENDS = ("torch", "ort", "llama.cpp", "vllm")
TOKEN_METRICS = ("kl", "ppl")
"""What one pass over a corpus gives."""
DRIFT, NEEDLE = "drift", "needle"
"""Greedy continuations, and needles in haystacks; everything else in `tasks` is a task of questions."""

EP = Option(
    "ONNX Runtime's provider: auto, cpu, cuda, tensorrt, trt-rtx, dml, openvino, qnn, webgpu; auto: cuda where "
    "--device is, else cpu.",
    keyword="ep",
)
OUT = Option("Where the result goes.", type=Path | None)
SEED = Option("Decides the calibration sketch and the bootstrap.", least=0)
THREADS = Option("CPU threads; default: all cores.", parse=read.few_threads, least=1)


@dataclass(frozen=True)
class ModelChoice(Checked):
    """The weights, the device that they run on and the type that they compute in."""

    name: Annotated[
        str,
        Option(
            "An alias (see `qeval models`), a hub id (of GGUF files ORG/REPO:TYPE), a local folder, or a .gguf file.",
            keyword="model",
            parse=str,
        ),
    ]
    revision: Annotated[str | None, Option("Branch, tag or commit of a hub model.")] = None
    device: Annotated[str, Option("auto, cpu, cuda, cuda:1, mps; auto: a CUDA GPU, else Apple's, else the CPU.")] = (
        "cpu"
    )
    compute: Annotated[
        str | None,
        Option(
            "fp32, bf16 or fp16; on the CPU fp32, elsewhere the checkpoint's.",
            flags=("--compute", "--dtype"),
            parse=read.compute_type,
        ),
    ] = None
    stream: Annotated[bool, Option("Read decoder layers one at a time: for a model that memory does not hold.")] = False
    max_memory: Annotated[
        int | None,
        Option(
            "With --stream: what weights, activations and logits may take beside the program itself, such as 2GiB, in "
            "each worker; default: half of the free memory.",
            type=str | None,
            parse=read.size_bytes,
        ),
    ] = None
    """Bytes."""
    device_map: Annotated[
        DeviceMapKind | None,
        Option("auto: spread the layers over all CUDA GPUs, for a model that no single one holds, in one process."),
    ] = None

    def __post_init__(self) -> None:
        """Refuse a limit that nothing keeps to, and two ways at once to run a model that a GPU does not hold.

        Raises:
            UsageError: A limit without streaming, or streaming and a device map.
        """
        if self.stream and self.device_map is not None:
            raise UsageError(
                "--stream holds one layer at a time and --device-map auto all layers, on several GPUs; leave one of "
                "them out."
            )
        if self.max_memory is not None and not self.stream:
            raise UsageError("--max-memory is the limit of a streamed model; add --stream.")


@dataclass(frozen=True)
class CorpusChoice(Checked):
    """The text and its windows; `protocol` excludes `window`, `stride` and another `convention`."""

    corpus: Annotated[
        str | None,
        Option(
            "wikitext2 (the default), c4, pydoc, code, chat (the baseline's own answers), or a text file; several with "
            "commas.",
            parse=read.corpus_text,
        ),
    ] = None
    protocol: Annotated[str | None, Option("A named protocol; see `qeval tasks`.")] = None
    window: Annotated[int | None, Option("Tokens a window.")] = None
    stride: Annotated[int | None, Option("Tokens between windows; equal: no overlap.")] = None
    max_windows: Annotated[int | None, Option("Only the first N windows.", least=1, range_shown=False)] = None
    bos: Annotated[Bos, Option("BOS token; auto: as the tokenizer does.", kind="BOS policy")] = "auto"
    convention: Annotated[str | None, Option("How perplexity is counted, and its windows; see `qeval tasks`.")] = None


@dataclass(frozen=True)
class CalibrationChoice(Checked):
    """The calibration text of quantizers."""

    source: Annotated[
        str,
        Option(
            "pile-val, wikitext2, cnn_dailymail, pydoc, or a text file; default: pile-val (demo, --offline: pydoc).",
            keyword="calibration",
            type=str | None,
            parse=read.text_or_none,
        ),
    ] = "pydoc"
    samples: Annotated[
        int,
        Option(
            "Calibration sequences; default: 128, of pydoc 16.",
            keyword="calibration_samples",
            type=int | None,
            least=1,
        ),
    ] = 16
    length: Annotated[int, Option("Tokens in each.", keyword="calibration_length", least=1)] = 512
    all_experts: Annotated[
        bool,
        Option(
            "Calibrate each expert of a mixture on every token, not on those routed to it alone.",
            keyword="calibrate_all_experts",
        ),
    ] = False


@dataclass(frozen=True)
class BackendChoice(Checked):
    """The backends that score the variants, and the settings of ONNX Runtime."""

    names: Annotated[
        tuple[str, ...],
        Option(
            "torch (fake-quantized weights), ort (ONNX Runtime's kernels), llama.cpp (its own, on GGUF files), vllm "
            "(its own, on checkpoints), http://HOST:PORT (the model that a server runs); or several, comma-separated.",
            keyword="backend",
            type=str,
            parse=read.names,
        ),
    ] = ("torch",)
    accuracy_levels: Annotated[
        tuple[int, ...],
        Option(
            "ONNX Runtime's: 1, fp32 activations; 4, int8 activations; 1,4.",
            keyword="accuracy_level",
            type=str,
            parse=read.accuracy_levels,
        ),
    ] = (1,)
    ep: Annotated[str, EP] = "cpu"
    exporter: Annotated[
        Exporter, Option("Who makes the ONNX graph; auto: the GenAI model builder, else torch's exporter.")
    ] = "auto"
    format: Annotated[OnnxFormat, Option("nbits: MatMulNBits; qdq: DequantizeLinear + MatMul.")] = "nbits"
    precision: Annotated[
        OnnxPrecision | None, Option("Of an ONNX graph's activations and floats; fp32 on the CPU, elsewhere fp16.")
    ] = None

    def __post_init__(self) -> None:
        """Refuse what no backend is.

        Raises:
            UsageError: An unknown backend, exporter, format or accuracy level.
        """
        for name in self.names or ("",):
            if not is_address(name) and name not in BACKENDS:
                raise unknown("backend", name, BACKENDS)
        super().__post_init__()
        if self.ep not in (AUTO, *PROVIDERS):
            raise unknown("execution provider", self.ep, (AUTO, *PROVIDERS))
        if not self.accuracy_levels or set(self.accuracy_levels) - {1, 4}:
            raise UsageError("--accuracy-level takes 1 (fp32 activations), 4 (int8 activations), or 1,4.")

    @property
    def runners(self) -> tuple[str, ...]:
        """The backends that variants run on: all but endpoints, which run what they serve."""
        return tuple(name for name in self.names if not is_address(name))

    @property
    def endpoints(self) -> tuple[str, ...]:
        """The addresses of endpoints."""
        return endpoint_urls(self.names)


@dataclass(frozen=True)
class ExportChoice(Checked):
    """The form that a variant is exported in, and the run whose card goes beside it."""

    to: Annotated[
        ExportForm,
        Option(
            "onnx: an ONNX folder; hf: a checkpoint that transformers and vLLM load (compressed-tensors); gguf: a file "
            "for llama.cpp.",
            kind="form",
        ),
    ] = "onnx"
    run: Annotated[
        Path | None,
        Option(
            "With hf or gguf: the folder of a finished run that scored this very variant; its card becomes README.md.",
            parse=read.path_or_none,
        ),
    ] = None


@dataclass(frozen=True)
class Settings(Checked):
    """One run."""

    model: ModelChoice
    recipes: tuple[Recipe, ...]
    variants: Annotated[
        tuple[tuple[str, Path], ...],
        Option(
            "NAME=PATH: a variant made before, an ONNX folder, a quantized checkpoint, a GGUF file; or, fetched from "
            "the hub, NAME=ORG/REPO[@REVISION][:WHAT], WHAT: a folder there, or a file or its type (Q4_K_M).",
            flags=("--variant",),
            type=list[str] | None,
            parse=read.variant_paths,
        ),
    ]
    tasks: Annotated[
        tuple[str, ...],
        Option(
            "Comma-separated: kl, ppl, drift, needle, reasoning, grammar, mmlu, an lm-eval task, or its YAML file.",
            type=str,
            parse=read.names,
        ),
    ]
    corpus: CorpusChoice
    questions: TaskChoice
    calibration: CalibrationChoice
    out: Annotated[Path, OUT]
    backends: BackendChoice = BackendChoice()
    drift: DriftChoice = field(default_factory=DriftChoice)
    needle: NeedleChoice = field(default_factory=NeedleChoice)
    chat: ChatChoice = field(default_factory=ChatChoice)
    traces: TraceChoice = field(default_factory=TraceChoice)
    sampling: Annotated[
        Sampler | None,
        Option(
            "With kl: compare also as a sampler does, such as top_p=0.9,temperature=0.7.",
            type=str | None,
            parse=read.sampling,
        ),
    ] = None
    endpoint: EndpointChoice = field(default_factory=EndpointChoice)
    vllm: VllmChoice = field(default_factory=VllmChoice)
    external_parts: Annotated[
        ExternalParts,
        Option(
            "Of a checkpoint by --variant that rounds activations, keys or values too; all: it as a whole; weights: "
            "its weights alone; split: both, as NAME and NAME@weights."
        ),
    ] = "split"
    kv_types: Annotated[
        tuple[str, ...],
        Option(
            "Keys and values of GGUF files by --variant: one of ggml's types or two, comma-separated: q8_0, q4_0, f16.",
            type=str | None,
            parse=read.several,
        ),
    ] = ()
    batch_tokens: Annotated[int | None, Option("Tokens a batch.", least=1, range_shown=False)] = None
    threads: Annotated[int | None, THREADS] = None
    seed: Annotated[int, SEED] = 0
    workers: Annotated[
        int, Option("Processes that score, each with its share of the threads; 0: one on each GPU, else one.", least=0)
    ] = 0
    executor: Annotated[Executor, Option("Where workers run: this machine, or a Ray cluster.")] = "local"
    worker_gpus: Annotated[float | None, Option("GPUs of a Ray worker; default: 1 on --device cuda, else 0.")] = None
    split: Annotated[
        bool, Option("Score the parts of each recipe alone too: its weights, activations, keys and values.")
    ] = False
    command: str = ""

    def __post_init__(self) -> None:
        """Refuse a run that could not say anything.

        Raises:
            UsageError: Nothing to compare or to score, two variants of one name, numbers below one, a file as --out.
        """
        check_distinct((*self.every_recipe, *(Recipe(name, "rtn") for name, _ in self.variants)))
        has_variants = bool(self.recipes or self.variants)
        if not has_variants and not self.backends.endpoints:
            raise UsageError("Nothing to compare: give --methods, --config or --variant.")
        many, on_nothing = self.workers > 1 or self.executor == "ray", has_variants and not self.backends.runners
        generating = [task for task in self.tasks if task in (DRIFT, *TRACE_TASKS)]
        flags = [(f"--tasks {task}", True) for task in self.tasks if task in (*generating, NEEDLE)]
        flags += [("--workers", many), ("--methods or --variant", on_nothing)]
        check_endpoint_run(self.backends.names, flags, self.endpoint)
        check_vllm(self.backends.names, self.vllm)
        if not self.tasks:
            raise UsageError("Nothing to score: give --tasks, for example --tasks kl,ppl,mmlu.")
        if self.chat != ChatChoice() and not (self.answers or self.traced):
            raise UsageError(
                "--prompts, --template, --chat-tokens and --chat-temperature are for --corpus chat (of them --template "
                "for --tasks reasoning, and all but the last for grammar too); add it, or leave them out."
            )
        self.traces.check_tasks(self.tasks)
        if self.sampling is not None and not self.scores_tokens:
            raise UsageError("--sampling compares distributions over a corpus; add kl to --tasks, or leave it out.")
        if self.needle != NeedleChoice() and NEEDLE not in self.tasks:
            raise UsageError("--needle-lengths and its kin are for --tasks needle; add it, or leave them out.")
        if self.model.stream:
            check_stream(self.backends.runners, self.recipes, answers=self.answers, generating=generating)
        if self.model.device_map is not None:
            check_spread(self.backends.names, self.executor, self.workers)
        if scheme := _SCHEME.match(str(self.out)):
            raise UsageError(
                f"--out {self.out} is an address, and a run's ledger needs a folder whose file system locks files; "
                f"mount what {scheme[1]} names, on every node of a cluster, and give its path."
            )
        check_place(self.out, "the report")
        super().__post_init__()
        if self.worker_gpus is not None and self.executor != "ray":
            raise UsageError("--worker-gpus is for --executor ray.")
        if self.worker_gpus is not None and not 0 <= self.worker_gpus < math.inf:
            raise UsageError(f"--worker-gpus must not be below 0, nor endless, as {self.worker_gpus} is.")

    @property
    def worker_count(self) -> int:
        """The number of processes that score; one until `settings_here` has counted the GPUs."""
        return max(self.workers, 1)

    @cached_property
    def parts(self) -> tuple[Recipe, ...]:
        """The recipes that `split` adds: parts of the others, scored alone to tell where their loss comes from."""
        return added_parts(self.recipes) if self.split else ()

    @property
    def every_recipe(self) -> tuple[Recipe, ...]:
        """The recipes that were asked for, and the parts of them."""
        return (*self.recipes, *self.parts)

    @property
    def scores_tokens(self) -> bool:
        """Return whether a corpus is run."""
        return any(task in TOKEN_METRICS for task in self.tasks)

    @property
    def question_tasks(self) -> tuple[str, ...]:
        """Return the tasks of questions, in their order."""
        return tuple(task for task in self.tasks if task not in (*TOKEN_METRICS, DRIFT, NEEDLE, *TRACE_TASKS))

    @property
    def answers(self) -> bool:
        """Return whether the baseline answers prompts."""
        return CHAT in corpus_names(self.corpus.corpus or "") and (self.scores_tokens or self.continues)

    @property
    def traced(self) -> tuple[str, ...]:
        """Return the tasks along text that is forced on every model."""
        return tuple(task for task in self.tasks if task in TRACE_TASKS)

    @property
    def continues(self) -> bool:
        """Return whether the baseline's greedy continuations are run."""
        return DRIFT in self.tasks

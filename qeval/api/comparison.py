"""Compare variants of a model with its baseline."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from qeval.api.keywords import run_settings
from qeval.api.process import call_text, torch_settings_restored
from qeval.compare import arguments as read
from qeval.compare.arguments import Names, PathLike, Variants
from qeval.compare.defaults import takes_shipped_texts
from qeval.compare.endpoint_choice import is_address
from qeval.compare.options import from_keywords
from qeval.compare.recipe_choice import RecipeChoice
from qeval.compare.settings import AUTO, Settings
from qeval.progress import Logged, Progress
from qeval.store.out import check_out

if TYPE_CHECKING:
    from qeval.compare.plan import Plan
    from qeval.models.in_memory import MemoryModel
    from qeval.results import Run

DEFAULT_TASKS = "kl,ppl,mmlu"


def compare(
    model: Any,
    *,
    tokenizer: Any = None,
    revision: str | None = None,
    methods: Names | None = None,
    config: PathLike | None = None,
    variants: Variants | None = None,
    external_parts: str = "split",
    kv_types: Names | None = None,
    backend: Names = "torch",
    endpoint_model: str | None = None,
    endpoint_top: int = 20,
    endpoint_key_variable: str = "OPENAI_API_KEY",
    endpoint_timeout: float = 120.0,
    endpoint_requests: int = 8,
    vllm_python: PathLike | None = None,
    vllm_dtype: str = "auto",
    vllm_tensor_parallel: int = 1,
    vllm_kv_cache: str = "auto",
    accuracy_level: str | int | Iterable[int] = "1",
    ep: str = AUTO,
    exporter: str = "auto",
    format: str = "nbits",
    precision: str | None = None,
    device: str = AUTO,
    compute: str | None = None,
    stream: bool = False,
    max_memory: str | int | None = None,
    device_map: str | None = None,
    tasks: Names = DEFAULT_TASKS,
    corpus: Names | PathLike | None = None,
    protocol: str | None = None,
    convention: str | None = None,
    window: int | None = None,
    stride: int | None = None,
    max_windows: int | None = None,
    bos: Literal["auto", "always", "never"] = "auto",
    sampling: str | Mapping[str, float] | None = None,
    mmlu_dir: PathLike | None = None,
    subjects: Names | None = None,
    limit: int | None = None,
    shots: int = 5,
    apply_chat_template: bool = False,
    fewshot_as_multiturn: str = "true",
    system_instruction: str | None = None,
    drift_prompts: int = 32,
    drift_prompt_tokens: int = 64,
    drift_tokens: int = 64,
    needle_lengths: str | int | Iterable[int] = "1024,4096",
    needle_depths: int = 5,
    needle_haystacks: int = 8,
    prompts: PathLike | None = None,
    template: PathLike | None = None,
    chat_tokens: int = 256,
    chat_temperature: float = 0.0,
    reasoning_questions: PathLike | None = None,
    reasoning_tokens: int = 1024,
    grammar_calls: int = 4,
    calibration: PathLike | None = None,
    calibration_samples: int | None = None,
    calibration_length: int = 512,
    calibrate_all_experts: bool = False,
    offline: bool = False,
    budget: str | float | None = None,
    importance: str = "measured",
    quantize_head: bool = False,
    batch_tokens: int | None = None,
    threads: int | None = None,
    workers: int = 0,
    executor: str = "local",
    worker_gpus: float | None = None,
    split: bool = False,
    seed: int = 0,
    out: PathLike | None = None,
    progress: Progress | None = None,
    on_plan: Callable[["Plan"], None] | None = None,
    command: str | None = None,
) -> "Run":
    """Quantize a model each way, score every variant against the baseline, and write a report.

    The keywords are the flags of `qeval compare`, with its defaults. The same call goes on where it stopped: what is
    in the cache or in `out` is not computed again.

    Args:
        model: A name of `qeval models`, a hub id, a folder, a .gguf file; or a transformers causal language model that
            is loaded already, with its `tokenizer`. Of a loaded model the weights are read and, while a variant is
            scored, written over; they are put back bit for bit. It is copied where `compute` is not its own type.
        tokenizer: The tokenizer of a loaded model; for no other.
        revision: Branch, tag or commit of a hub model.
        methods: Methods such as "awq:int4-g64"; default: rtn, awq, mixed.
        config: YAML file of recipes.
        variants: Variants that were made before: path by name, or texts "NAME=PATH".
        external_parts: Of a variant from elsewhere that rounds activations, keys or values too: all (it as a whole),
            weights (its weights alone), or split (both, as NAME and NAME@weights).
        kv_types: Keys and values of variants that are GGUF files: one of ggml's types (q8_0, q4_0, f16), or two.
        backend: torch, ort, llama.cpp, vllm, an OpenAI-compatible endpoint's address ("http://host:8000"), or several.
        endpoint_model: Of an endpoint that serves several models: which.
        endpoint_top: Of an endpoint: likeliest tokens to ask for at each position.
        endpoint_key_variable: Of an endpoint: the environment variable that holds its key.
        endpoint_timeout: Of an endpoint: seconds that an answer may take.
        endpoint_requests: Of an endpoint: requests that are under way at once.
        vllm_python: With vllm: the interpreter that has it; default: this one.
        vllm_dtype: With vllm: the type that it computes in.
        vllm_tensor_parallel: With vllm: GPUs that each layer is split over.
        vllm_kv_cache: With vllm: the type of keys and values.
        accuracy_level: ONNX Runtime's: 1 (fp32 activations), 4 (int8 activations), or both.
        ep: ONNX Runtime's provider.
        exporter: Who makes the ONNX graph: auto, genai, dynamo.
        format: Of the ONNX graph: nbits or qdq.
        precision: Of the graph's floats: fp32 or fp16.
        device: auto, cpu, cuda, cuda:1 or mps; a loaded model stays where it is.
        compute: fp32, bf16 or fp16; default: fp32 on the CPU, elsewhere the checkpoint's.
        stream: Read decoder layers one at a time.
        max_memory: With `stream`: bytes, or a text such as "2GiB".
        device_map: "auto": spread the layers over all CUDA GPUs.
        tasks: kl, ppl, drift, needle, reasoning, grammar, mmlu, any lm-eval task, or the path of a YAML file of one.
        corpus: wikitext2, c4, pydoc, code, chat (the baseline's own answers), or a text file, or several.
        protocol: A named protocol; excludes `window`, `stride`, `convention`.
        convention: How perplexity is counted, and its windows.
        window: Tokens a window.
        stride: Tokens between the starts of windows.
        max_windows: Only the first windows.
        bos: Whether windows begin with BOS: auto (as the tokenizer does), always, never.
        sampling: With kl: the sampler to compare under too, "top_p=0.9,temperature=0.7" or a mapping of the same.
        mmlu_dir: Folder in MMLU's csv layout.
        subjects: MMLU subjects; default: all.
        limit: Questions a subject; prompts of grammar.
        shots: Examples in a prompt.
        apply_chat_template: Whether tasks are asked under the model's chat template.
        fewshot_as_multiturn: Whether each example is a turn of its own there ("true") or all stand in one ("false").
        system_instruction: What stands before every prompt of a task.
        drift_prompts: With drift: prompts to continue.
        drift_prompt_tokens: With drift: tokens of each prompt.
        drift_tokens: With drift: tokens that each is continued by.
        needle_lengths: With needle: tokens of the haystacks.
        needle_depths: With needle: depths, from the start to the end of a haystack.
        needle_haystacks: With needle: haystacks of each length.
        prompts: With the corpus "chat": a file of JSON lines, a hub data set, or "parallel"; default: shipped ones.
        template: With the corpus "chat": a chat template in place of the model's own.
        chat_tokens: With the corpus "chat": the most tokens of an answer.
        chat_temperature: With the corpus "chat": 0 for greedy answers; above, sampled by `seed`.
        reasoning_questions: With reasoning: a file of JSON lines, or a hub data set; default: shipped ones.
        reasoning_tokens: With reasoning: the most tokens of a chain of thought.
        grammar_calls: With grammar: calls that are sampled for each prompt.
        calibration: pile-val, wikitext2, cnn_dailymail, pydoc, or a text file.
        calibration_samples: Calibration sequences.
        calibration_length: Tokens in each.
        calibrate_all_experts: Whether each expert of a mixture sees every calibration token.
        offline: Ask nothing of the hub.
        budget: Size of mixed variants in bits per weight.
        importance: How mixed variants rank layers: measured, fisher, positional.
        quantize_head: Quantize the head too.
        batch_tokens: Tokens a batch.
        threads: CPU threads; default: all cores.
        workers: Processes that score; 0: one on each GPU, else one.
        executor: Where workers run: local or ray.
        worker_gpus: GPUs of a Ray worker.
        split: Score the parts of each recipe alone too: weights, activations, keys, values.
        seed: Decides the calibration sketch and the bootstrap.
        out: The run's folder; default: reports/ and the model's name.
        progress: Hears of phases and warnings; default: warnings go to the logger "qeval".
        on_plan: Called with the plan before the work starts.
        command: What the record names as its command; default: this call.

    Returns:
        The run: its tables, figures, rows and folder. A variant that failed is in `failed`; the others are scored.

    Raises:
        UsageError: Something that was asked for is not there or does not fit.
        QevalError: The run failed.
    """
    values = dict(locals())
    command = command or call_text(compare, values)
    memory = _in_memory(model, tokenizer, revision=revision, device=device)
    name = memory.name if memory else str(model)
    if memory:
        values |= {"model": name, "device": str(memory.device)}
    made_before = read.variant_paths(variants)
    only_endpoints = all(is_address(name) for name in read.names(backend))
    recipes = from_keywords(RecipeChoice, values).recipes(has_variants=bool(made_before) or only_endpoints)
    shipped = offline if memory else takes_shipped_texts(name, offline=offline)
    settings = run_settings(
        values,
        shipped=shipped,
        recipes=tuple(recipes),
        variants=made_before,
        workers=read.few_workers(workers, on_ray=executor == "ray"),
        out=read.path(out) if out else Path("reports") / read.slug(name),
        command=command,
    )
    return _run(settings, progress or Logged(), memory, on_plan, offline=offline)


def _run(
    settings: Settings,
    progress: Progress,
    memory: "MemoryModel | None",
    on_plan: Callable[["Plan"], None] | None,
    *,
    offline: bool,
) -> "Run":
    from qeval.compare.hub_access import hub_access, needs_of  # noqa: PLC0415 - the client of the hub

    if memory is not None:
        memory.check_fits(settings.backends.runners, stream=settings.model.stream, processes=_processes(settings))
    check_out(settings.out, "the report")  # before the hub is asked
    with hub_access(needs_of(settings), progress, is_offline=offline), torch_settings_restored():
        # torch, transformers and lm-eval take seconds to import, which a command that is refused need not wait for
        from qeval.compare.machine import settings_here  # noqa: PLC0415
        from qeval.compare.plan import make_plan  # noqa: PLC0415
        from qeval.compare.run import membership, run_comparison  # noqa: PLC0415
        from qeval.report import build_paired  # noqa: PLC0415
        from qeval.report.render import write_report  # noqa: PLC0415
        from qeval.report.run_rows import PairedRun  # noqa: PLC0415
        from qeval.results import Run  # noqa: PLC0415

        plan = make_plan(settings_here(settings, progress), memory, progress)
        if on_plan is not None:
            on_plan(plan)
        with membership(plan, progress, shared=memory is None) as ledger:
            record = run_comparison(plan, progress, ledger)
            with progress.phase("report", 1), ledger.alone("record"):  # nobody writes a record meanwhile
                rows = PairedRun(settings.out, is_running=True)
                report = build_paired(rows)
                write_report(report, settings.out, rows)
    return Run(settings.out, record, report)


def _in_memory(model: Any, tokenizer: Any, *, revision: str | None, device: str) -> "MemoryModel | None":
    """Return a model that is loaded already, checked; None for the name of one."""
    if isinstance(model, str | Path) and tokenizer is None:
        return None
    from qeval.models.in_memory import memory_model  # noqa: PLC0415 - torch takes seconds to import

    return memory_model(model, tokenizer, revision=revision, device=device)


def _processes(settings: Settings) -> str | None:
    """Return the flag by which other processes would have to load the model."""
    if settings.executor == "ray":
        return "--executor ray"
    return f"--workers {settings.workers}" if settings.worker_count > 1 else None

"""The record of a run beside its rows: `OUT/run.json`, written by `compare`, read by every report.

The rows hold the measurements; this record holds what they were measured on and with. Unknown keys are refused,
so that a record of another version is an error and not a half-read one. Since version 2 the record names the digest of
everything that belongs to it (`store/chain.py`), carries a seal of its own content, and is replaced last.
"""

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from qeval.errors import BrokenRecordError, UsageError
from qeval.files.atomic import write_text
from qeval.parsing import first_fault
from qeval.store.seal import has_valid_seal, parse_object, seal
from qeval.store.trace_records import GrammarRecord, ReasoningRecord

RUN_VERSION: Literal[2] = 2
RECORD = "run.json"


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelRecord(_Record):
    """The baseline's weights: where they came from and what they are; None is what an imported run does not know."""

    name: str  # as the user typed it
    source: str  # "hub", "folder", "gguf", "demo", "imported"
    hub_id: str | None
    revision: str | None
    architecture: str  # "LlamaForCausalLM"
    weights_sha256: str
    weight_dtype: str  # "float16"
    compute_dtype: str  # "float32"
    layers: int | None
    hidden_size: int | None
    vocab_size: int | None
    parameters: int | None
    tied_embeddings: bool | None
    context_length: int | None
    notes: list[str]  # what a reader must know, such as weights that come from a Q4_1 file


class CorpusPart(_Record):
    """One of several texts: the numbers of its windows, `windows` of them from `first` on."""

    corpus: str
    corpus_sha256: str
    tokens_sha256: str
    first: int
    windows: int
    windows_available: int


class AnswerRecord(_Record):
    """One answer of the baseline: the window that holds it, and where it lies among the window's tokens."""

    window: int
    prompt: int  # the number of its conversation; answers of one conversation are one cluster
    kind: str  # "code"
    language: str  # "de"
    first: int  # the position of its first token
    final: int  # the position of the first token after its thinking; `first` where it does not think
    ended: bool  # False: it reached the limit, and is cut there


class ChatRecord(_Record):
    """The prompts that the baseline answered, how, and its answers, one a window."""

    source: str  # "shipped", a file's name, a hub id
    template: str | None  # the file that it was given in; None: the model's own
    template_sha256: str
    prompts: int
    prompts_with_tools_left_out: int  # since the template takes none
    longest_answer: int  # tokens
    temperature: float  # 0: greedy
    in_bytes: dict[
        str, float
    ]  # language -> share of its prompts' tokens that are parts of characters, where it's large
    answers: list[AnswerRecord]


class ProtocolRecord(_Record):
    """The protocol of the token rows."""

    name: str  # "wikitext2-1024/512", or "pydoc-1024/1024" for a window and stride of the user's
    corpus: str
    corpus_sha256: str  # of the text
    tokens_sha256: str  # of the token ids
    window: int
    stride: int
    windows: int
    windows_available: int
    bos: bool  # whether a BOS token is put in at all
    kl_positions: int
    nll_positions: int
    convention: str = "token-mean"  # how one perplexity is made of the rows: a name of `tasks.protocols.CONVENTIONS`
    bos_policy: str | None = None  # "auto", "always", "never": what was asked for
    bos_placement: str | None = None  # "text": once; "window": each; "replace": each first token; "document"
    bos_token: str | None = None  # "<s>"
    words: int | None = None  # of the scored documents as they were, where the convention counts them
    bytes: int | None = None
    parts: list[CorpusPart] = []  # where several texts are scored; empty for one
    chat: ChatRecord | None = None  # where one of them is the baseline's answers to prompts
    sampling: str | None = None  # "top_p=0.9,temperature=0.7": the sampler under which models are compared too


class TaskRecord(_Record):
    """The settings of one task's item rows."""

    name: str  # "mmlu"
    source: str  # "hub", a folder's name, "mmlu_sample"
    title: str  # "MMLU 5-shot", "MMLU-style sample 5-shot"
    shots: int | None  # None: an imported run does not know
    subjects: list[str]
    categories: dict[str, str]  # subject -> category ("stem", "humanities", "social_sciences", "other")
    items: int
    items_with_fewer_shots: int
    choices: int  # how many choices a question has, 0 when it varies
    harness: str  # "lm-eval 0.4.13"


class DriftRecord(_Record):
    """The settings of the greedy continuations' rows."""

    corpus: str
    corpus_sha256: str  # of the text
    tokens_sha256: str  # of the prompts' token ids, one after another
    prompts: int
    prompt_tokens: int  # BOS included
    generated: int  # tokens a prompt
    bos: bool


class NeedleRecord(_Record):
    """The settings of the needles' rows."""

    lengths: list[int]  # tokens, as asked for
    depths: list[float]  # 0: the start of a haystack, 1: its end
    haystacks: int  # of each length; each holds a needle at every depth
    tokens_sha256: str  # of all prompts and answers
    bos: bool


class ResponseRecord(_Record):
    """The settings of a task without choices that this run asked."""

    name: str  # "gsm8k"
    source: str  # "hub" or "file"
    output: str  # the harness's type of its requests: "generate_until"
    shots: int
    items: int
    cut_prompts: int  # items whose context was cut on the left to fit
    longest_answer: int | None  # tokens; None where nothing is generated
    chat_template: str | None  # its sha256; None: plain text
    multiturn: bool  # whether each example is a turn of its own
    system: str | None
    harness: str  # "lm-eval 0.4.13"


class ScoreRecord(_Record):
    """The settings of one score's rows: a task's metric under a filter, or another program's (`qeval import`)."""

    name: str  # as rows and policies have it: "gsm8k_exact_match_strict_match"
    title: str  # "gsm8k, exact_match, strict-match"
    better: Literal["higher", "lower"]
    unit: str  # "fraction" for scores of 0 to 1, "nats", else "score"
    subjects: list[str]
    items: int
    harness: str  # "lm-eval", "inspect", "csv"
    task: ResponseRecord | None = None  # None: another program's


class ImportedFile(_Record):
    """A file that rows came from, and the model that they are of."""

    model: str
    name: str  # without the place where it lay
    sha256: str
    format: str  # "lm-eval", "inspect", "csv", "jsonl", "parquet"


class ImportRecord(_Record):
    """The source of an imported run: what another program measured, and which hashes vouch for equal prompts."""

    files: list[ImportedFile]
    hashes: list[str]  # of "doc_hash", "prompt_hash", "target_hash": those that were compared between sides


class GroupRecord(_Record):
    """One group of linears that is quantized together, as the mixed-precision choice saw it."""

    layer: int
    kind: str  # "qkv", "o", "gate_up", "down"
    names: list[str]
    parameters: int
    kl_low: float | None  # mean KL (nats) with this group alone at the low bit width; None when not measured
    kl_high: float | None
    bits: int  # the choice
    format: str | None = None  # the choice in a mix of formats, "nvfp4" or "float"; None in one of two widths
    kls: dict[str, float] = {}  # mean KL (nats) with this group alone, by format; empty in a mix of two widths
    sensitivity_floor: bool = False  # the measured KL does not exceed the noise floor


class KeptRecord(_Record):
    """A weight that stays in float, and why."""

    name: str
    parameters: int
    reason: str


class RuntimeRecord(_Record):
    """The runtime that ran a model: ONNX Runtime or llama.cpp, and its settings."""

    runtime: str  # "onnxruntime 1.31.1", "llama-cpp-python 0.3.36"
    provider: str  # "CPUExecutionProvider"; llama.cpp's "CPU" or "GPU"
    nodes: dict[str, int]  # how many nodes each provider was given; llama.cpp tells of none
    exporter: str | None  # "genai" or "dynamo", "qeval" for a GGUF file; None for what was made elsewhere
    format: str | None  # "nbits" or "qdq"
    accuracy_level: int | None  # 1: fp32 activations; 4: int8 activations; None elsewhere
    shares_prefixes: str  # "batch": several questions continue one at once; "one": one at a time; "none"
    facts: list[str]  # what the folder holds, in sentences


class OverlapRecord(_Record):
    """The text that calibration shares with the scored tokens: runs of `ngram` tokens."""

    ngram: int
    shared_tokens: int  # scored tokens that lie in such a run; by a fingerprint at least so many
    tokens: int  # scored tokens, questions' included
    where: str | None  # "window 3", "question 7 of mmlu anatomy": the first; None where nothing is shared


class VariantRecord(_Record):
    """A quantized model: how it was made and how big it is; None is what an imported run does not know."""

    name: str  # unique in the run, as typed: "awq", "rtn:int8-channel"
    method: str  # "rtn", "awq", "mixed", "mixed-rtn"
    backend: str  # "torch"
    role: Literal["variant", "floor", "part"] = "variant"
    """`floor`: the baseline itself in another type or backend; `part`: scored to tell others' losses apart."""
    status: Literal["done", "failed"]
    error: str | None
    key: str  # the identity of the quantized weights
    grid: str  # "int4-g128", "int4-g128 + int8-g128"
    granularity: str  # "block 128", "per channel", "block 128 + per channel"
    symmetric: bool | None
    bits_per_weight: float | None  # of the quantized matrices, scales and zero points counted
    bits_per_weight_model: float | None  # of all parameters, head and embedding included
    size_bytes: int | None  # of the variant's weights on disk, float parts in the checkpoint's dtype
    quantized_weights: int | None
    quantized_parameters: int | None
    kept: list[KeptRecord]
    input_scales: list[str]  # linears whose input is multiplied explicitly
    details: dict[str, str]  # what else a reader may ask: the method's options, in words
    importance: str | None  # "measured", "positional"; None when the method is not mixed
    budget_bits_per_weight: float | None
    groups: list[GroupRecord]
    quantize_seconds: float
    score_seconds: float
    twin: str | None = None  # the same weights on torch: what `kernel_kl_nats` compares with
    runtime: RuntimeRecord | None = None  # None on torch
    parts: dict[str, str] = {}  # the variants that are a part of this one alone: weights, activations, keys, values
    witness: str | None = None  # of what it was asked; None in older records
    calibration_sha256: str | None = None  # of the token ids that its quantizer saw; None where it saw none
    overlap: OverlapRecord | None = None  # by the fingerprint of a variant made before; None: that has none
    expert_tokens: dict[str, list[int]] = {}  # calibration tokens that reached each expert, by stack; empty: no experts


class CalibrationRecord(_Record):
    """The calibration text that the quantizers saw."""

    source: str
    text_sha256: str
    tokens_sha256: str
    samples: int
    length: int
    overlap: OverlapRecord | None = None  # None: it was not looked for


class EnvironmentRecord(_Record):
    """The machine and the software."""

    qeval: str
    python: str
    torch: str
    transformers: str
    lm_eval: str
    platform: str
    processor: str
    cores: int
    threads: int
    memory_bytes: int
    device: str
    gpus: int | None = None  # that torch sees; the four that follow are None off CUDA, and in records of qeval 0.1
    cuda: str | None = None  # the version that torch was built for
    driver: str | None = None  # NVIDIA's
    peak_gpu_bytes: int | None = None  # the largest that torch held in this process, all GPUs together


class Chain(_Record):
    """The sha256 of each file that belongs to a run, and of its settings."""

    index: str  # of rows/index.json
    shards: dict[str, str]  # "tokens/KEY-DIGEST.parquet" -> of the whole file
    manifests: dict[str, str]  # a variant's key -> of manifests/KEY.json
    texts: dict[str, str]  # "windows.parquet" -> of the file
    settings: str | None  # of what was asked for; None where the run is a part that a gate drew


class RunRecord(_Record):
    """All of `OUT/run.json`. Records of version 1 have neither `chain` nor `sha256`."""

    run_version: Literal[1, 2]
    command: str
    started: str  # ISO 8601, UTC
    finished: str | None
    seconds: float
    peak_rss_bytes: int
    seed: int
    model: ModelRecord
    baseline_label: str  # "FP16 weights computed in fp32"
    baseline_size_bytes: int | None
    baseline_bits_per_weight: float | None
    baseline_seconds: float | None
    protocol: ProtocolRecord | None
    tasks: list[TaskRecord]
    calibration: CalibrationRecord | None
    variants: list[VariantRecord]
    environment: EnvironmentRecord
    metrics: list[str]  # what was asked for: "kl", "ppl", "mmlu", ..., and the names of scores
    warnings: list[str]
    drift: DriftRecord | None = None
    needle: NeedleRecord | None = None
    reasoning: ReasoningRecord | None = None
    grammar: GrammarRecord | None = None
    settings: dict[str, Any] | None = None  # what was asked for, so that `verify` can make it again
    witness: str | None = None  # the hash of token ids, positions and BOS of all that was scored; None in older records
    scores: list[ScoreRecord] = []
    imported: ImportRecord | None = None  # None: qeval measured it itself
    chain: Chain | None = None
    sha256: str | None = None  # of all the rest of the record


def write_run(folder: Path, record: RunRecord) -> None:
    """Put a record in the place of the one in `folder`, sealed."""
    content = json.loads(record.model_dump_json())
    write_text(folder / RECORD, json.dumps(seal(content), indent=1, ensure_ascii=False) + "\n")


def read_run(folder: Path) -> RunRecord:
    """Return the record of a run folder.

    Raises:
        UsageError: `folder` holds no run.
        BrokenRecordError: The record is torn, was changed by hand, or is of another version.
    """
    path = folder / RECORD
    try:
        data = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UsageError(f"'{folder}' holds no run: there is no {path.name} in it.") from error

    try:
        record = RunRecord.model_validate_json(data)
        content = parse_object(data)
    except ValidationError as error:
        raise BrokenRecordError(_torn(path, ": ".join(first_fault(error.errors())))) from error
    except ValueError as error:
        raise BrokenRecordError(_torn(path, str(error))) from error

    if record.run_version == 1 and record.chain is None and record.sha256 is None:
        return record
    if record.run_version == 1 or record.chain is None:
        raise BrokenRecordError(_torn(path, "chain: it names no digests, or is of two versions at once"))
    if not has_valid_seal(content):
        raise BrokenRecordError(
            f"{path} was changed after it was written: its checksum does not fit it; run the same command again."
        )
    return record


def _torn(path: Path, reason: str) -> str:
    return f"{path} is torn or of another version ({reason}); run the same command again."

"""The flags that several commands share, with one help text each."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer

from qeval.config import Defaults, Recipe, parse_budget
from qeval.config import Importance as ImportanceName
from qeval.errors import UsageError, unknown

_THREADS_A_CORE = 16

Model = Annotated[
    str,
    typer.Option(
        "--model",
        help="An alias (see `qeval models`), a hub id (of GGUF files ORG/REPO:TYPE), a local folder, or a .gguf file.",
    ),
]
Revision = Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit of a hub model.")]
Device = Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:1, mps.")]
Compute = Annotated[
    str | None,
    typer.Option("--compute", "--dtype", help="fp32, bf16 or fp16; on the CPU fp32, elsewhere the checkpoint's."),
]
Calibration = Annotated[
    str, typer.Option("--calibration", help="pydoc, wikitext2, pile-val, cnn_dailymail, or a text file.")
]
CalibrationSamples = Annotated[int, typer.Option("--calibration-samples", min=1, help="Calibration sequences.")]
CalibrationLength = Annotated[int, typer.Option("--calibration-length", min=1, help="Tokens in each.")]
Budget = Annotated[
    str | None,
    typer.Option("--budget", help="Size of mixed variants, such as 4.8bpw; else the positional rule's own."),
]
Importance = Annotated[
    Literal["measured", "fisher", "positional"],
    typer.Option("--importance", help="How mixed variants pick INT8 layers; fisher: predicted, then measured whole."),
]
QuantizeHead = Annotated[bool, typer.Option("--quantize-head", help="Quantize lm_head too (a tied embedding stays).")]
Ep = Annotated[
    str,
    typer.Option("--ep", help="ONNX Runtime's provider: cpu, cuda, tensorrt, trt-rtx, dml, openvino, qnn, webgpu."),
]
Exporter = Annotated[
    Literal["auto", "genai", "dynamo"],
    typer.Option("--exporter", help="Who makes the ONNX graph; auto: the GenAI model builder, else torch's exporter."),
]
Format = Annotated[
    Literal["nbits", "qdq"],
    typer.Option("--format", help="nbits: MatMulNBits; qdq: DequantizeLinear + MatMul."),
]
Precision = Annotated[
    Literal["fp32", "fp16"] | None,
    typer.Option("--precision", help="Of an ONNX graph's activations and floats; fp32 on the CPU, elsewhere fp16."),
]


def _few_enough(threads: int | None) -> int | None:
    """Refuse more threads than could ever help; OpenMP ends the program where it can't start them."""
    cores = os.cpu_count() or 1
    if threads is not None and threads > _THREADS_A_CORE * cores:
        raise UsageError(f"--threads {threads} is more than {_THREADS_A_CORE} for each of {cores} cores; give fewer.")
    return threads


Threads = Annotated[
    int | None, typer.Option("--threads", min=1, callback=_few_enough, help="CPU threads; default: all cores.")
]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Decides the calibration sketch and the bootstrap.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No plan, no progress; warnings and the result only.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show a traceback when something fails.")]
Run = Annotated[Path, typer.Argument(help="The folder of a finished run.", show_default=False)]
Out = Annotated[Path | None, typer.Option("--out", help="Where the result goes.")]

Stream = Annotated[
    bool,
    typer.Option("--stream", help="Read decoder layers one at a time: for a model that memory does not hold."),
]
MaxMemory = Annotated[
    str | None,
    typer.Option(
        "--max-memory",
        help="With --stream: what weights, activations and logits may take beside the program itself, such as 2GiB; "
        "default: half of the free memory.",
    ),
]

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]i?)?B?", re.IGNORECASE)
_COMPUTE = {"fp32": "float32", "float32": "float32", "bf16": "bfloat16", "bfloat16": "bfloat16"}
_COMPUTE |= {"fp16": "float16", "float16": "float16"}


def defaults(budget: str | None, importance: ImportanceName, quantize_head: bool) -> Defaults:
    """What recipes take that name none of their own, as the flags say it."""
    return Defaults(None if budget is None else parse_budget(budget), importance, quantize_head)


def check_used(given: Defaults, recipes: Sequence[Recipe]) -> None:
    """Refuse flags that no recipe takes.

    Raises:
        UsageError: a budget or a way to rank groups is given, and no recipe mixes widths.
    """
    if any(recipe.mixed for recipe in recipes):
        return
    for flag, is_given in (("--budget", given.budget is not None), ("--importance", given.importance != "measured")):
        if is_given:
            named = ", ".join(recipe.name for recipe in recipes) or "what was asked for"
            raise UsageError(f"{flag} is for mixed methods, and none is among {named}; add one, or leave {flag} out.")


def accuracy_levels(text: str) -> tuple[int, ...]:
    """The accuracy levels of `1`, `4` or `1,4`, each once."""
    words = dict.fromkeys(word.strip() for word in text.split(","))
    return tuple(int(word) if word.isdigit() else 0 for word in words)


def compute_type(text: str | None) -> str | None:
    """The torch name of a compute type, or None for the device's default."""
    if text is None or text in _COMPUTE:
        return None if text is None else _COMPUTE[text]
    raise unknown("compute type", text, ("fp32", "bf16", "fp16"))


def size_bytes(text: str | None) -> int | None:
    """The bytes of `2GiB`, `500MB` or `1.5G` (GB: 10^9; GiB and G: 2^30).

    Raises:
        UsageError: it is no size, or nothing.

    >>> size_bytes("2GiB"), size_bytes("500MB")
    (2147483648, 500000000)
    """
    if text is None:
        return None
    match = _SIZE.fullmatch(text.strip())
    if not match:
        raise UsageError(f"--max-memory takes a size such as 2GiB or 500MB, not '{text}'.")
    unit = (match[2] or "").upper()
    decimal = text.strip().upper().endswith("B") and not unit.endswith("I")
    size = int(float(match[1]) * (1000 if decimal else 1024) ** " KMGT".index((unit or " ")[0]))
    if size < 1:
        raise UsageError(f"--max-memory {text} leaves nothing; give a size such as 2GiB.")
    return size

"""`qeval methods`, `qeval tasks`: what can be named, with one line each."""

from collections.abc import Iterable

from rich.table import Table

from qeval.cli.printing import stdout
from qeval.methods import FLOAT_REASONS, METHODS
from qeval.tasks.names import TASKS
from qeval.tasks.protocols import CONVENTIONS, PROTOCOLS

_GRIDS = (
    ("rtn:int8-channel", "INT8, one scale a row"),
    ("rtn:int4-g32-asym", "INT4, blocks of 32, with zero points"),
    ("awq:noclip", "the scales alone, without the clip search"),
    ("awq:fold", "only scales that preceding weights take, so that the result is a plain model (export --to hf)"),
    ("gptq:noclip-noactorder", "as in the paper's first form: the full range, the columns as they stand"),
    ("gptq:int4-channel-damp0.05", "one scale a row, 5 % of the mean second moment added to every one (default 1 %)"),
    ("mixed-rtn:4.8bpw", "under a size budget in bits per weight"),
    ("mixed:int4-g128/fp8-tile128/bf16-5bpw", "one of several formats for each group; bf16 leaves it in float"),
    ("hqq:int4-g64", "HQQ at 4 bits in blocks of 64"),
    ("torchao:int8wo", "torchao's INT8, one scale a row"),
    ("ort:k_quant-g128", "ONNX Runtime's k_quant in blocks of 128"),
    ("nvfp4", "a format alone: its weights rounded to nearest, as rtn:nvfp4"),
    ("awq:fp8-tensor, gptq:mxfp4-rceil", "a format under another method"),
    ("rtn:int4-g128-full", "INT4 that spans its range as Model Optimizer does"),
    ("mixed:positional", "INT8 by position (first and last eighth, every third between), as other tools do"),
)
_SCHEMES = (
    ("int8-w8a8", "INT8 weights by row, INT8 activations with a scale a token"),
    ("smoothquant:int8-w8a8-alpha0.8", "the same after SmoothQuant with its alpha; plain smoothquant: 0.5"),
    ("rtn:int8-channel+a-fp8-token", "FP8 activations, a scale a token (dynamic)"),
    ("rtn:int8-channel+a-fp8-g128", "the same with a scale for each 128 inputs of a token"),
    (
        "rtn:int8-channel+a-fp8-static",
        "a scale a linear, from the largest input on calibration text; int8-static likewise",
    ),
    ("rtn+a-mxfp8-rceil", "blocks of 32 with a power of two: floor (OCP), even or rceil"),
    ("rtn+a-nvfp4", "blocks of 16 in E2M1 with E4M3 scales, under a static scale a linear"),
    ("awq+kv-int8", "keys and values in INT8, a scale a token and head (dynamic)"),
    ("fp16+kv-q4_0", "keys and values alone, in llama.cpp's Q4_0 (q8_0, q5_0, q5_1, q4_1, iq4_nl too), blocks of 32"),
    ("fp16+kv-q4_0-hadamard", "the same, heads rotated by llama.cpp's Hadamard matrix before"),
    (
        "fp16+kv-int8-tensor-ort",
        "INT8 or INT4 as ONNX Runtime's: a static scale a tensor or channel, amax / 128 or / 8",
    ),
    ("fp16+k-int8-channel+v-fp8-token", "keys with a static scale a channel, values in FP8 with a scale a token"),
)
_FORMATS = (
    ("fp8-tensor", "FP8 E4M3, one scale a matrix", "Model Optimizer (FP8_DEFAULT)"),
    ("fp8-channel, fp8", "the same, one scale a row", "Model Optimizer (FP8_PER_CHANNEL_PER_TOKEN)"),
    ("fp8-tile128", "the same, tiles of 128 x 128", "Model Optimizer (FP8_2D_BLOCKWISE)"),
    (
        "fp8-tensor-div, -channel-div, -tile128-div",
        "the same, divided by the scale",
        "compressed-tensors (FP8_DYNAMIC)",
    ),
    ("fp8e5m2-tensor, -channel, -tile128", "FP8 E5M2, which is coarser and reaches further", ""),
    ("mxfp8-floor, mxfp8", "FP8 in blocks of 32 that share a power of two", "OCP, torchao, AutoRound"),
    ("mxfp8-even", "the same, the exponent from the rounded magnitude", "compressed-tensors"),
    ("mxfp8-rceil", "the same, the exponent up, so that nothing saturates", "Model Optimizer, torchao's RCEIL"),
    ("mxfp8-e5m2, mxfp6-e2m3, mxfp6-e3m2, mxfp4", "other elements; -floor (default), -even or -rceil", "as above"),
    ("nvfp4", "E2M1 in blocks of 16, E4M3 scales under one of the matrix", "Model Optimizer, compressed-tensors"),
    ("nvfp4-46", "the same, each block's largest weight at 4 or at 6", "Four over Six (MIT)"),
    ("nf4, fp4", "a codebook of 16 values, blocks of 64", "bitsandbytes"),
)
_SPANS = (
    (
        "signed",
        "the weight of largest magnitude at -8 of INT4, so that scales may be negative (the default below INT8)",
        "ort:default, llama.cpp's Q4_0",
    ),
    (
        "full",
        "the largest magnitude at 7 of INT4, 127 of INT8 (INT8's default); no scale is negative",
        "Model Optimizer; of INT8 ONNX Runtime and Q8_0 too",
    ),
    ("half", "at 7.5, 127.5", "compressed-tensors, ort:rtn"),
)


_ROTATIONS = (
    ("rtn:int4-channel+r1r2", "the residual stream (R1) and each head's values (R2) rotated, folded into the weights"),
    ("quarot, quarot-rtn", "gptq:int4-channel+r1r2, rtn:int4-channel+r1r2"),
    ("quarot+a-int4+kv-int4-hadamard", "activations, keys and values in INT4 too; hadamard of keys is R3"),
    ("rtn:int4-channel+r1r2r4+a-int4", "R4 as well: the input of each feed-forward's last matrix, while running"),
    ("awq+r1r2-seed3", "another seed of the random signs; plain r1r2: 0"),
)


def methods() -> None:
    """The quantization methods, and how their names carry parameters."""
    show("method", ((name, method.description) for name, method in METHODS.items()))
    say("Plain names mean int4-g128-signed: INT4, blocks of 128, symmetric. The head and the embedding stay in float.")
    show("for example", _GRIDS)
    say(
        "Parameters: int2..int8, gN | channel | tensor, sym | asym, full | half | signed, clip | noclip, "
        "actorder | noactorder, dampN, fold, Nbpw, measured | positional, head; or a format of floats. A mix takes "
        "several grids and formats with a / between, and bf16 for what may stay in float."
    )
    show("format", _FORMATS, used_by="used by")
    say("Symmetric integers span their range in one of three ways; libraries differ, at the same bytes:")
    show("range", _SPANS, used_by="used by")
    show("with activations, keys, values", _SCHEMES)
    say(
        "After a +: a- (activations), k-, v- or kv-, then int2..int8, fp8 [e5m2], mxfp8, mxfp6 [e3m2], mxfp4, nvfp4, "
        "or llama.cpp's q8_0, q5_0, q5_1, q4_0, q4_1 and iq4_nl, "
        "then token | gN | channel | tensor (static), floor | even | rceil, ort, hadamard. Torch runs them all."
    )
    show("stays in float", ((kind, reason.partition(": ")[2]) for kind, reason in FLOAT_REASONS.items()))
    say("In every decoder layer, whatever a recipe says; a variant's manifest gives each weight's reason.")
    show("with rotations (QuaRot)", _ROTATIONS)
    say(
        "After a +: r1, r2 and r4 in one word, and -seedN. Torch and ONNX Runtime run rotated models, llama.cpp those "
        "without r4."
    )


def tasks() -> None:
    """The tasks, the named protocols and the conventions of perplexity."""
    show("task", TASKS.items())
    show("protocol", ((p.name, p.description) for p in PROTOCOLS.values()))
    show("convention", ((c.name, f"{c.description} ({c.source})") for c in CONVENTIONS.values()))


def show(kind: str, rows: Iterable[tuple[str, ...]], used_by: str | None = None) -> None:
    """Print a table of names and what they are.

    Args:
        kind: What the names are.
        rows: A name, a line, and where `used_by` heads a third column, who uses it.
        used_by: The head of that column.
    """
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column(kind, no_wrap=used_by is None)
    table.add_column("what it is")
    if used_by:
        table.add_column(used_by)
    for row in rows:
        table.add_row(*row)
    stdout().print(table)


def say(line: str) -> None:
    """Print a line between blank ones."""
    stdout().print(f"\n{line}\n")

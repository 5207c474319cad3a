"""Tensors rounded beside the weights: the inputs of quantized linears, and the keys and values of attention.

A part of a recipe's name says how: `a-fp8-token`, `kv-int8`, `k-int8-channel`, `v-q4_0-hadamard`; `r1r2` is a rotation
of the model before its weights are rounded, and `r4` one of inputs while it runs. Dynamic scales are
those of a token alone (and of a head, for keys and values), so that no score depends on how sequences are batched.
Scales that span tokens are static: they come from calibration text.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from qeval.errors import UsageError, unknown
from qeval.quant.elements import E2M1, E2M3, E3M2, E4M3, E5M2, POWER_RULES, Minifloat, Scaling

Span = Literal["token", "block", "channel", "tensor"]
"""The numbers that share a scale: a token's (of one head); blocks of them; all tokens' in one place; everything."""
PartName = Literal["activations", "keys", "values"]
"""The fields of a recipe that hold a format."""

W8A8 = "w8a8"
"""The word of a grid's name for weights by channel and activations by token, of the same 8 bits."""

ROTATION = "rotation"
"""The field of a recipe that names the places of rotations."""
_INPUTS = "inputs"
"""The name of rotations while running in a stored scheme."""
_PREFIXES: Mapping[str, tuple[PartName, ...]] = {
    "a": ("activations",), "k": ("keys",), "v": ("values",), "kv": ("keys", "values"),
}  # fmt: skip
_ELEMENTS: Mapping[str, Minifloat] = {"fp8": E4M3, "mxfp8": E4M3, "mxfp6": E2M3, "mxfp4": E2M1, "nvfp4": E2M1}
_OTHER_ELEMENTS: Mapping[str, tuple[str, Minifloat]] = {"e5m2": ("fp8", E5M2), "e3m2": ("mxfp6", E3M2)}
"""Words that name the other element of a kind, with the kind."""
_OWN_ELEMENTS = {"e4m3": "fp8", "e2m3": "mxfp6"}
"""Words that name the element that a kind has anyway."""
GGML_KINDS = ("q8_0", "q5_0", "q5_1", "q4_0", "q4_1", "iq4_nl")
"""ggml's block types, which llama.cpp has for keys and values."""
_INTEGERS = tuple(f"int{bits}" for bits in range(2, 9))
_KINDS = (*_INTEGERS, *_ELEMENTS, *GGML_KINDS)
_SPANS = ("token", "block", "channel", "tensor", "static")
_WORDS = (*_SPANS, "gN", *POWER_RULES, *_OWN_ELEMENTS, *_OTHER_ELEMENTS, "ort", "hadamard")
_ORT_KINDS = ("int4", "int8")
"""The integers that ONNX Runtime's GroupQueryAttention keeps keys and values in."""
_SIZES = {"mxfp8": 32, "mxfp6": 32, "mxfp4": 32, "nvfp4": 16, **dict.fromkeys(GGML_KINDS, 32)}
_BLOCK = 32
_ROTATIONS = ("r1", "r2", "r4")
"""The places of rotations that a recipe may name; R3 is the `hadamard` of keys' formats."""
_ONLINE = "r4"
_SCALE_BITS = {
    "mxfp8": 8, "mxfp6": 8, "mxfp4": 8, "nvfp4": 8, "q8_0": 16, "q5_0": 16, "q5_1": 32, "q4_0": 16, "q4_1": 32,
    "iq4_nl": 16,
}  # fmt: skip
"""Bits of a block's scale: E8M0, E4M3, ggml's fp16, of which two where a block has a least number too. Others are fp32,
as weights' scales are."""


@dataclass(frozen=True)
class TensorFormat:
    """A format that one kind of tensor is rounded to along its last dimension.

    Attributes:
        kind: `int2` to `int8`, `fp8`, `mxfp8`, `mxfp6`, `mxfp4`, `nvfp4`, or one of ggml's types (`q8_0`, `iq4_nl`).
        span: What shares a scale.
        size: Numbers of a block; 0 where the span is no block.
        rule: How a float's scale is made of the largest magnitude.
        element: The float type; None for integers and ggml's types.
        hadamard: Whether heads are rotated by a Hadamard matrix before they are rounded, and back afterwards.
        ort: Whether integers have ONNX Runtime's scale of keys and values, amax / 2^(bits-1), by which the largest
            positive number is one code too large and clipped; others have amax / (2^(bits-1) - 1).
    """

    kind: str
    span: Span = "token"
    size: int = 0
    rule: Scaling = "fp32"
    element: Minifloat | None = None
    hadamard: bool = False
    ort: bool = False

    @property
    def bits(self) -> int:
        """Bits of a number without its share of a scale."""
        return self.element.bits if self.element else int(re.sub(r"\D*(\d+).*", r"\1", self.kind))

    @property
    def steps(self) -> int:
        """The largest magnitude over an integer's scale."""
        return (1 << (self.bits - 1)) - (0 if self.ort else 1)

    @property
    def is_static(self) -> bool:
        """Return whether calibration text must say how large numbers get."""
        return self.span in ("channel", "tensor") or self.kind == "nvfp4"

    @property
    def divides_heads(self) -> bool:
        """Return whether blocks must divide a head: ggml's types have no short ones."""
        return self.kind in GGML_KINDS

    def bits_per_number(self, width: int) -> float:
        """Return the bits of a number of rows of `width`, with its share of scales that are stored with each token."""
        if self.span in ("channel", "tensor"):
            return float(self.bits)
        scales = -(-width // self.size) if self.size else 1
        return self.bits + scales * _SCALE_BITS.get(self.kind, 32) / width

    def describe(self, whole: str) -> str:
        """Return the format in words; `whole` is what a dynamic scale without blocks spans: `token`."""
        spans = {"channel": "a static scale a channel", "tensor": "a static scale a tensor"}
        where = spans.get(self.span, f"a scale {f'a block of {self.size}' if self.size else f'a {whole}'}")
        return str(self) + f" ({where}{', under a static one a tensor' if self.kind == 'nvfp4' else ''})"

    def __str__(self) -> str:
        """Return the name that `parse_format` takes: `fp8-token`, `int8-tensor-ort`, `mxfp4-rceil`, `q4_0-hadamard`."""
        words = [self.kind]
        words += [word for word, (_, other) in _OTHER_ELEMENTS.items() if self.element == other]
        if self.rule in POWER_RULES:
            words.append(self.rule)
        if self.kind not in _SIZES:
            words.append(f"g{self.size}" if self.size else self.span)
        if self.ort:
            words.append("ort")
        return "-".join([*words, *(["hadamard"] if self.hadamard else [])])


@dataclass(frozen=True)
class RotationPlaces:
    """The places in which a model is rotated: the residual stream (R1), values (R2), feed-forwards' inner states (R4).

    R1 and R2 are folded into the weights; R4 turns the input of the last matrix of every feed-forward while running.
    """

    residual: bool = False
    heads: bool = False
    online: bool = False
    seed: int = 0

    def __str__(self) -> str:
        """Return the name that `parse_rotation` takes: `r1r2`, `r1r2r4-seed3`."""
        used = zip(_ROTATIONS, (self.residual, self.heads, self.online), strict=True)
        return "".join(word for word, is_used in used if is_used) + (f"-seed{self.seed}" if self.seed else "")


@dataclass(frozen=True)
class Scheme:
    """The formats of what is rounded beside the weights; None leaves a kind of tensor as it is.

    `rotates_inputs`: whether inputs are turned while running (R4).
    """

    activations: TensorFormat | None = None
    keys: TensorFormat | None = None
    values: TensorFormat | None = None
    rotates_inputs: bool = False

    def __bool__(self) -> bool:
        """Return whether anything but weights differs from the float model."""
        return self.rotates_inputs or any(self.formats.values())

    @property
    def formats(self) -> dict[str, TensorFormat]:
        """The formats that are used, by their part."""
        parts = {part: getattr(self, part) for part in get_args(PartName)}
        return {part: how for part, how in parts.items() if how is not None}

    @property
    def is_static(self) -> bool:
        """Return whether any format needs calibration text."""
        return any(each.is_static for each in self.formats.values())

    @property
    def has_static_inputs(self) -> bool:
        """Return whether the inputs of linears need calibration text."""
        return self.activations is not None and self.activations.is_static

    @property
    def caches(self) -> bool:
        """Return whether keys or values are rounded."""
        return self.keys is not None or self.values is not None

    def names(self) -> dict[str, str]:
        """Return the formats' names by their part, and what turns inputs; `scheme_of` reads them."""
        turned = {_INPUTS: _ONLINE} if self.rotates_inputs else {}
        return {part: str(each) for part, each in self.formats.items()} | turned


def scheme_of(names: Mapping[str, str | None]) -> Scheme:
    """Return the scheme of formats' names by their part; None and what lacks is left as it is.

    Raises:
        UsageError: A name means nothing, or not for its part.
    """
    named = {part: name for part, name in names.items() if name is not None and part != _INPUTS}
    formats = {part: parse_format(name, part) for part, name in named.items()}
    return Scheme(**formats, rotates_inputs=names.get(_INPUTS) == _ONLINE)


def parse_parts(parts: Sequence[str]) -> dict[str, str]:
    """Return the formats' names, by the recipe's fields, of what follows the `+` of a recipe's name.

    >>> parse_parts(["a-fp8-token", "kv-int8"])
    {'activations': 'fp8-token', 'keys': 'int8-token', 'values': 'int8-token'}
    >>> parse_parts(["r2r1"])
    {'rotation': 'r1r2'}

    Raises:
        UsageError: A part begins or goes on with no word of the grammar (the nearest are listed), or comes twice.
    """
    formats: dict[str, str] = {}
    for part in parts:
        prefix, _, name = part.partition("-")
        if re.fullmatch(r"(r\d)+", prefix):
            if ROTATION in formats:
                raise UsageError(f"'+{part}' rotates a second time; name all places in one part, such as +r1r2.")
            formats[ROTATION] = str(parse_rotation(part))
            continue
        if prefix not in _PREFIXES:
            raise unknown(f"prefix of '+{part}'", prefix, [*_PREFIXES, *_ROTATIONS])
        for field in _PREFIXES[prefix]:
            if field in formats:
                raise UsageError(f"'+{part}' gives {field} a second format; give each one alone.")
            formats[field] = str(parse_format(name, field))
    return formats


def parse_rotation(name: str) -> RotationPlaces:
    """Return the places that a name such as `r1r2` or `r1r2r4-seed3` means.

    Raises:
        UsageError: A word means nothing (the nearest are listed), comes twice, or is R3, which keys' formats name.
    """
    places, *words = name.split("-")
    found = re.findall(r"r\d", places)
    if "r3" in found:
        raise UsageError(f"'{name}': R3 turns queries and keys; say +k-int4-hadamard, or +kv-int4-hadamard.")
    for place in found if "".join(found) == places else [places]:
        if place not in _ROTATIONS:
            raise unknown(f"rotation in '{name}'", place, _ROTATIONS)
    if len(set(found)) < len(found):
        raise UsageError(f"'{name}' names a rotation twice.")
    seeds = [re.fullmatch(r"seed(\d{1,9})", word) for word in words]
    if len(seeds) > 1 or not all(seeds):
        raise UsageError(f"'{name}': after the places of a rotation comes its seed alone, such as r1r2-seed1.")
    seed = next((int(match[1]) for match in seeds if match), 0)
    return RotationPlaces("r1" in found, "r2" in found, "r4" in found, seed)


def parse_format(name: str, part: str) -> TensorFormat:
    """Return the format that a name such as `fp8-token` or `mxfp8-rceil` means for activations, keys or values.

    Raises:
        UsageError: A word means nothing (the nearest are listed), or says what the part or the kind doesn't take.
    """
    kind, *words = name.split("-")
    if kind not in _KINDS:
        raise unknown(f"format of {part}", kind, _KINDS)
    span, size, options = _span_of(words, f"'{name}' of {part}")

    # what a kind fixes can't be said otherwise
    fixed = _SIZES.get(kind)
    if fixed and span and (span, size or fixed) != ("block", fixed):
        raise UsageError(f"'{name}': {kind} has a scale for each block of {fixed}; leave the other word out.")
    rules = [word for word in options if word in POWER_RULES]
    if len(rules) > 1 or (rules and not kind.startswith("mx")):
        raise UsageError(f"'{name}': one of {', '.join(POWER_RULES)} belongs to mxfp8, mxfp6 and mxfp4.")
    others = {word: of for word, (of, _) in _OTHER_ELEMENTS.items()} | _OWN_ELEMENTS
    if any(others.get(word, kind) != kind for word in options):
        raise UsageError(f"'{name}': e4m3 and e5m2 are the two forms of fp8, e2m3 and e3m2 those of mxfp6.")
    if part == "activations" and (span == "channel" or "hadamard" in options):
        raise UsageError(f"'{name}': a scale a channel and a rotation belong to keys and values, not to activations.")
    if "ort" in options and (part == "activations" or kind not in _ORT_KINDS or span not in ("channel", "tensor")):
        raise UsageError(
            f"'{name}' of {part}: ort is ONNX Runtime's rounding of keys and values to {' or '.join(_ORT_KINDS)} by "
            "a static scale; say for example +kv-int8-tensor-ort or +kv-int4-channel-ort."
        )

    rule: Scaling = "fp32"
    if kind.startswith("mx"):
        rule = next((each for each in ("even", "rceil") if each in rules), "floor")
    return TensorFormat(
        kind=kind,
        span="block" if fixed else span or "token",
        size=fixed or size,
        rule="e4m3" if kind == "nvfp4" else rule,
        element=next((_OTHER_ELEMENTS[word][1] for word in options if word in _OTHER_ELEMENTS), _ELEMENTS.get(kind)),
        hadamard="hadamard" in options,
        ort="ort" in options,
    )


def split_w8a8(name: str, grid: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Return the words of a grid's name without `w8a8`, and the recipe's fields that it stands for.

    >>> split_w8a8("int8-w8a8", ["int8", "w8a8"])
    (['int8', 'channel'], {'activations': 'int8-token'})

    Args:
        name: The recipe's, for errors.
        grid: The words.

    Raises:
        UsageError: The grid has no 8 bits.
    """
    words = [word for word in grid if word != W8A8]
    kind = next((word for word in words if word in ("int8", "fp8")), None)
    if kind is None:
        raise UsageError(f"'{name}': {W8A8} goes with a grid of 8 bits; say for example int8-{W8A8}.")
    has_span = any(re.fullmatch(r"g\d+|channel|tensor", word) for word in words)
    return words if has_span else [*words, "channel"], {"activations": f"{kind}-token"}


def _span_of(words: Sequence[str], where: str) -> tuple[Span | None, int, list[str]]:
    """Return what shares a scale (None: no word says it), the size of its blocks, and the other words."""
    span: Span | None = None
    size, options = 0, []
    for word in words:
        block = re.fullmatch(r"g([1-9]\d*)", word)
        if not block and word not in _WORDS:
            raise unknown(f"word in {where}", word, _WORDS)
        if not block and word not in _SPANS:
            options.append(word)
            continue
        if span is not None:
            raise UsageError(f"{where} says twice what shares a scale; leave '{word}' or the other word out.")
        if block or word == "block":
            span, size = "block", int(block[1]) if block else _BLOCK
        else:
            span = "token" if word == "token" else "channel" if word == "channel" else "tensor"
    return span, size, options

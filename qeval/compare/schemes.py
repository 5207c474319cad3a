"""Schemes of recipes and variants: what can't be run is refused before any work; calibration; words for reports."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from qeval.backends.install import installed
from qeval.backends.llamacpp.cache_types import cache_types
from qeval.backends.llamacpp.library import LLAMACPP
from qeval.backends.onnx.input_format import check_graph_scheme
from qeval.config import FORMAT_FIELDS, Recipe
from qeval.errors import QevalError, UsageError
from qeval.formats.scheme import ExternalScheme
from qeval.models.structure.forward import run_samples
from qeval.models.structure.graph import Description
from qeval.models.structure.kv_cache import HeadShape, check_cache
from qeval.progress import Advance
from qeval.quant.scheme import ROTATION, Scheme, TensorFormat, scheme_of
from qeval.quant.variant import Variant
from qeval.quantize.ranges import collect_ranges
from qeval.store.variants import Manifest, is_variant, read_manifest

HeadShapes = Callable[[], Sequence[HeadShape]]
"""Returns the shapes of a model's keys and values by layer; raises a UsageError where they can't be rounded."""
_TORCH, _ORT = "torch", "ort"
NOT_ROUNDED = "not rounded here"
"""The detail that says what a checkpoint's configuration rounds and qeval does not."""
_CACHED_TOKEN = "bits per cached token"
_SCHEME_DETAILS = (*FORMAT_FIELDS, _CACHED_TOKEN, "scales", NOT_ROUNDED)


def refuse_schemes(schemes: Mapping[str, Scheme], where: str) -> None:
    """Refuse schemes where weights alone are taken.

    Args:
        schemes: By the variant's name.
        where: What takes weights alone, as the beginning of a sentence: `qeval bench times`.

    Raises:
        UsageError: It names the variants.
    """
    named = ", ".join(name for name, scheme in schemes.items() if scheme)
    if named:
        raise UsageError(
            f"{where} weights alone, and these change activations, keys or values: {named}. Leave the parts after the "
            "first + out, or score them by compare with torch."
        )


def refuse_schemes_off_torch(schemes: Mapping[str, Scheme], backends: Sequence[str], ep: str) -> None:
    """Refuse schemes on backends that don't run them: llama.cpp and ONNX Runtime run keys and values of their own.

    Args:
        schemes: By the variant's name.
        backends: Their names.
        ep: ONNX Runtime's execution provider.

    Raises:
        UsageError: It names backends and variants.
    """
    if _ORT in backends:
        refuse_schemes_off_ort(schemes, ep, f"--backend {_ORT} can't run")
    if LLAMACPP in backends:
        _refuse_where(cache_types, schemes, f"--backend {LLAMACPP} can't run")


def refuse_schemes_off_ort(schemes: Mapping[str, Scheme], ep: str, where: str) -> None:
    """Refuse schemes that ONNX Runtime does not run.

    Args:
        schemes: By the variant's name.
        ep: The execution provider.
        where: What can't be done, as the beginning of a sentence: `qeval export can't write`.

    Raises:
        UsageError: It names the first such variant.
    """
    _refuse_where(partial(check_graph_scheme, ep=ep), schemes, where)


def _refuse_where(check: Callable[[Scheme], object], schemes: Mapping[str, Scheme], where: str) -> None:
    """Refuse the first scheme that `check` refuses, by its name; `where` is the beginning of the sentence."""
    for name, scheme in schemes.items():
        try:
            check(scheme)
        except UsageError as error:
            raise UsageError(f"{where} {name}: {error}") from error


def refuse_rotations(recipes: Sequence[Recipe], folders: Mapping[str, Path], where: str) -> None:
    """Refuse variants of rotated models where torch does not hold all of the model: other parts than linears differ.

    Args:
        recipes: What is asked for.
        folders: Folders by the variants' names; those that hold variants made before are looked at.
        where: What takes no rotated model, as the beginning of a sentence: `qeval export writes`.

    Raises:
        UsageError: There are such variants; it names them.
    """
    names = [recipe.name for recipe in recipes if recipe.rotation]
    names += [name for name, manifest in _manifests(folders).items() if ROTATION in manifest.recipe]
    if names:
        raise UsageError(
            f"{where} no rotated model: {', '.join(names)}. Leave the rotation out, or score it by compare with torch "
            "and without --stream."
        )


def schemes_of(recipes: Sequence[Recipe], folders: Mapping[str, Path]) -> dict[str, Scheme]:
    """Return the schemes by variant of recipes, and of folders (by their names) that hold variants made before."""
    return {recipe.name: recipe.scheme for recipe in recipes} | {
        name: scheme_of(manifest.scheme) for name, manifest in _manifests(folders).items()
    }


def _manifests(folders: Mapping[str, Path]) -> dict[str, Manifest]:
    """Return what the folders among `folders` that hold variants made before say of them, by name."""
    return {name: read_manifest(folder) for name, folder in folders.items() if is_variant(folder)}


def check_scheme(scheme: Scheme, model: Any, description: Description, head_shapes: HeadShapes) -> None:
    """Refuse a scheme that a model can't be run with, before any work.

    Args:
        scheme: What is rounded beside the weights.
        model: The model.
        description: Its structure.
        head_shapes: Returns the shapes of its keys and values, or refuses them; called where those are rounded.

    Raises:
        UsageError: Experts lie in stacks, attention is of an unknown kind, or heads don't divide into blocks.
    """
    if not scheme.caches:
        return
    shapes = head_shapes()
    for part, how in (("keys", scheme.keys), ("values", scheme.values)):
        sizes = {getattr(shape, part)[1] for shape in shapes}
        if how is not None and how.divides_heads and any(size % how.size for size in sizes):
            raise UsageError(
                f"{how.kind} has blocks of {how.size}, which don't divide the {part} of this model (a head of "
                f"{', '.join(map(str, sorted(sizes)))}); llama.cpp refuses them too."
            )


def with_scheme(
    variant: Variant,
    recipe: Recipe,
    model: Any,
    description: Description,
    samples: Sequence[Sequence[int]],
    advance: Advance,
) -> Variant:
    """Return a variant of weights alone with its recipe's scheme: calibrated, and described in its details.

    Static ranges are those of the float model's inputs, as Model Optimizer has them; where the method folds scales into
    its weights, whose inputs then are others, those of the quantized model.

    Args:
        variant: The weights.
        recipe: What names the scheme.
        model: The model.
        description: Its structure.
        samples: The calibration text, where the scheme is static.
        advance: Called with the tokens of each pass over it.
    """
    scheme = recipe.scheme
    ranges: Mapping[str, Tensor] = {}
    if scheme.is_static:
        names = [name for name in variant.activation_inputs if name != description.head]
        with _as_run(model, variant, description.head, turns=recipe.rotation is not None):
            ranges = collect_ranges(model, names, scheme, partial(run_samples, model, samples, advance))
        check_reached(recipe, ranges, names)
    details = scheme_details(scheme, model, partial(check_cache, model))
    return replace(variant, scheme=scheme, ranges=ranges, details={**variant.details, **details})


def check_reached(recipe: Recipe, ranges: Mapping[str, Tensor], names: Sequence[str]) -> None:
    """Refuse static activations of a linear that no calibration token reached, as an expert's may be."""
    if recipe.scheme.has_static_inputs and (missing := [name for name in names if name not in ranges]):
        raise QevalError(
            f"'{recipe.name}': no calibration token reached {missing[0]} ({len(missing)} in all), so its input has no "
            "range; give more --calibration-samples, or a dynamic format such as a-int8-token."
        )


def _as_run(model: Any, variant: Variant, head: str, *, turns: bool) -> AbstractContextManager[None]:
    """Have the model's linears see the inputs that they will see, up to rounding; `turns`: whether it is rotated."""
    if not (variant.input_scales or turns) and not (variant.floats and not variant.stored):
        return nullcontext()
    return installed(model, variant, skip=head, keep_dtype=next(model.parameters()).dtype)


def with_external_scheme(variant: Variant, read: ExternalScheme, model: Any) -> Variant:
    """Return a checkpoint's weights with the scheme that its configuration says, described in the details.

    Keys and values stay as they are where the model's attention is of a kind that qeval can't round; that is said.
    """
    if read.scheme.caches:
        try:
            check_cache(model)
        except UsageError as error:
            read = read.without_caches(f"keys and values: {error}")
    details = {**variant.details, **scheme_details(read.scheme, model, partial(check_cache, model))}
    if read.input_formats and read.scheme.activations:
        details["activations"] += f", but for {_other_inputs(read.input_formats)}"
    if read.notes:
        details["scales"] = "; ".join(read.notes)
    if read.limits:
        details[NOT_ROUNDED] = "; ".join(read.limits)
    formats = read.input_formats if read.scheme.activations else {}
    return replace(variant, scheme=read.scheme, ranges=read.ranges, input_formats=formats, details=details)


def _other_inputs(formats: Mapping[str, TensorFormat | None]) -> str:
    counts = Counter("as it is" if how is None else how.describe("token") for how in formats.values())
    return ", ".join(f"{count} linears {how}" for how, count in counts.most_common())


def details_of_weights(details: Mapping[str, str]) -> dict[str, str]:
    """Return a variant's details without what they say of activations, keys and values."""
    return {name: text for name, text in details.items() if name not in _SCHEME_DETAILS}


def scheme_details(scheme: Scheme, model: Any, head_shapes: HeadShapes) -> dict[str, str]:
    """Return a scheme in a report's words, with the bits of a cached token where keys or values are rounded."""
    details = {}
    if scheme.activations:
        details["activations"] = scheme.activations.describe("token")
    if scheme.keys:
        details["keys"] = scheme.keys.describe("token and head")
    if scheme.values:
        details["values"] = scheme.values.describe("token and head")
    if scheme.caches:
        bits, numbers = _cache_bits(scheme, head_shapes(), next(model.parameters()).element_size() * 8)
        details[_CACHED_TOKEN] = f"{bits:,.0f} ({bits / numbers:.2f} a number)"
    return details


def _cache_bits(scheme: Scheme, shapes: Sequence[HeadShape], float_bits: int) -> tuple[float, int]:
    """Return the bits of one token's keys and values in all layers, dynamic scales counted, and how many they are."""
    bits, numbers = 0.0, 0
    for shape in shapes:
        for (heads, size), how in ((shape.keys, scheme.keys), (shape.values, scheme.values)):
            bits += heads * size * (how.bits_per_number(size) if how else float_bits)
            numbers += heads * size
    return bits, numbers

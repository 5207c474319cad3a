"""A variant as a plain checkpoint folder in compressed-tensors' layouts, which transformers and vLLM load.

Every tensor is the source checkpoint's own, bit for bit and by its own name, save what the variant changed: quantized
matrices, and floats that scales were folded into (in fp32 where the checkpoint's type does not hold them).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from qeval.errors import UsageError
from qeval.formats.checkpoint import CheckpointTensors
from qeval.formats.compressed_layouts import (
    Layout,
    cache_args,
    cache_scale,
    compress_weight,
    input_parts,
    layout_of,
)
from qeval.formats.names import TensorNames
from qeval.models.structure.graph import Description
from qeval.models.structure.weight_views import is_expert
from qeval.quant.grid import WeightGrid
from qeval.quant.scheme import Scheme
from qeval.quant.variant import Variant

_METHOD = "compressed-tensors"


@dataclass(frozen=True, eq=False)
class ModelShape:
    """The parts of a model that its checkpoint's words depend on.

    `linears`: the names of all its linear modules; `turned`: weights that files hold transposed; `prefix`: what the
    base model's names begin with.
    """

    description: Description
    linears: tuple[str, ...]
    turned: frozenset[str]
    prefix: str

    def layout(self, name: str, grid: WeightGrid, columns: int, scheme: Scheme) -> Layout:
        """Return the layout of one of the model's matrices; the head's input stays in float.

        Raises:
            UsageError: It has none.
        """
        if is_expert(name):
            raise UsageError(f"{name} is an expert in a stack, and qeval writes no checkpoints of mixtures yet.")
        if name in self.turned:
            raise UsageError(f"{name} is no matrix of a Linear module, which alone compressed-tensors quantizes.")
        if name == self.description.head and self.description.tied:
            raise UsageError(
                f"{name} is the embedding too, and a checkpoint holds such a matrix once; leave --quantize-head out."
            )
        return layout_of(name, grid, columns, None if name == self.description.head else scheme.activations)

    def attention_modules(self) -> list[str]:
        """Return the module of each layer that keys and values are made in.

        Raises:
            UsageError: They are not made by `k_proj` and `v_proj`.
        """
        names = [name for group in self.description.groups for name in group.names]
        modules = [name.removesuffix(".k_proj.weight") for name in names if name.endswith(".k_proj.weight")]
        if len(modules) != len(self.description.layers):
            raise UsageError("compressed-tensors knows the keys and values of k_proj and v_proj alone; leave +kv out.")
        return modules


def quantization_config(variant: Variant, shape: ModelShape) -> dict[str, Any]:
    """Return the `quantization_config` of a variant: a group for each layout, and what stays in float.

    Raises:
        UsageError: A matrix has no layout, or the variant does what no such checkpoint says.
    """
    _check_plain(variant)
    layouts = layouts_of(variant, shape)
    groups: list[tuple[Layout, list[str]]] = []
    for name, layout in layouts.items():
        module = name.removesuffix(".weight")
        same = next((modules for each, modules in groups if each == layout), None)
        if same is None:
            groups.append((layout, [module]))
        else:
            same.append(module)
    formats = {layout.format for layout, _ in groups}
    packed = {f"{name}.weight" for name in shape.linears} & layouts.keys()
    whole = len(groups) == 1 and len(packed) == len(layouts)
    return {
        "quant_method": _METHOD,
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{index}": layout.config_group(["Linear"] if whole else modules)
            for index, (layout, modules) in enumerate(groups)
        },
        "ignore": [name for name in shape.linears if f"{name}.weight" not in layouts],
        "kv_cache_scheme": cache_args(variant.scheme),
    }


def layouts_of(variant: Variant, shape: ModelShape) -> dict[str, Layout]:
    """Return the layout of each of a variant's matrices.

    Raises:
        UsageError: One has none.
    """
    return {
        name: shape.layout(name, weight.grid, weight.codes.shape[1], variant.scheme)
        for name, weight in variant.weights.items()
    }


def checkpoint_tensors(variant: Variant, source: CheckpointTensors, shape: ModelShape) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of the checkpoint by name, those of the source in its order, then the scales of the scheme.

    Raises:
        UsageError: A matrix has no layout, or is none of the source's tensors.
    """
    layouts, names = layouts_of(variant, shape), TensorNames(source, shape.prefix)
    weights = {names.stored(name): name for name in variant.weights}
    floats = {names.stored(name): name for name in variant.floats}
    head = shape.description.head
    if shape.description.tied and names.stored(head) is None:
        weights, floats = ({key: name for key, name in each.items() if name != head} for each in (weights, floats))
    if None in weights or None in floats:
        raise UsageError("A matrix of the variant lies in the checkpoint under no name that qeval knows.")
    for stored in source.named():
        if name := weights.get(stored):
            parts = compress_weight(variant.weights[name], layouts[name]) | _input_parts(variant, name)
            yield from ((f"{stored.removesuffix('.weight')}.{part}", tensor) for part, tensor in parts.items())
        elif name := floats.get(stored):
            yield stored, as_stored(variant.floats[name], source.load(stored))
        else:
            yield stored, source.load(stored)
    if head in variant.floats and head not in floats.values():
        yield head, as_stored(variant.floats[head], source.load(names.stored(shape.description.embedding) or ""))
    if variant.scheme.caches:
        for layer, module in enumerate(shape.attention_modules()):
            yield f"{module}.k_scale", cache_scale(variant.ranges[f"{layer}.keys"])
            yield f"{module}.v_scale", cache_scale(variant.ranges[f"{layer}.values"])


def as_stored(value: Tensor, like: Tensor) -> Tensor:
    """Return a changed float in the type of the tensor that it replaces if that loses nothing, else in fp32."""
    small = value.to(like.dtype)
    return small if bool((small.float() == value.float()).all()) else value.float()


def _check_plain(variant: Variant) -> None:
    """Refuse what no checkpoint of compressed-tensors says."""
    if variant.input_scales:
        raise UsageError(
            f"This variant multiplies the input of {next(iter(variant.input_scales))} while running, which "
            "compressed-tensors' layouts don't; add fold to the recipe, such as awq:int4-g128-fold."
        )
    if variant.input_rotations:
        raise UsageError(
            f"This variant turns the input of {next(iter(variant.input_rotations))} while running (R4), which "
            "compressed-tensors' layouts don't; leave r4 out, R1 and R2 are in the weights."
        )
    if variant.stored:
        raise UsageError(
            f"{variant.stored[0].name} is in a form of its own ({variant.stored[0].form}), which no compressed-tensors "
            "layout holds; take rtn, awq, gptq or mixed."
        )
    if not variant.weights:
        raise UsageError("This variant quantizes no weights, and the float model has a checkpoint already.")


def _input_parts(variant: Variant, name: str) -> dict[str, Tensor]:
    how = variant.scheme.activations
    if how is None or not how.is_static or name not in variant.ranges:
        return {}
    return input_parts(how, variant.ranges[name])

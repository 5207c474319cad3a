"""A variant's weights in the place of a transformers model's own: for good, or until a `with` block ends."""

from collections.abc import Iterator, Mapping, Set
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from qeval.backends.memory import with_room_made
from qeval.models.device import free_bytes, release_cached
from qeval.models.structure.head import Head
from qeval.models.structure.weight_views import modules_of, weights_of
from qeval.quant.variant import Variant
from qeval.quantize.rotating import turn_input


def variant_head(model: Any, variant: Variant, head: Head, name: str) -> Head:
    """Return the baseline's `head`, named `name`, or the variant's; a tied embedding's owner may hold it as a float."""
    owners = (owner for owner, tensor in model.named_parameters() if tensor is head.weight)
    floats = (variant.floats[each] for each in (name, *owners) if each in variant.floats)
    weight = variant.weights[name].dequantize() if name in variant.weights else next(floats, None)
    return head if weight is None else replace(head, weight=weight.to(head.weight))


@torch.inference_mode()
def install(model: Any, variant: Variant, *, head: Head, head_name: str) -> Head:
    """Put the variant's weights in place of the model's own for good, which takes no copy of these; its head."""
    parameters, own = weights_of(model), variant_head(model, variant, head, head_name)
    aside = _aside(model, variant, parameters)
    _put(parameters, variant, {head_name, *aside}, None)
    for name in aside:
        _replace(model, name, variant.floats[name])
    for name, core in variant.input_rotations.items():
        for module in modules_of(model, name):
            turn_input(module, core, model.device)
    for name, scales in variant.input_scales.items():
        for module in modules_of(model, name):
            _scale_input(module, scales.to(model.device))
    return own


@contextmanager
def installed(model: Any, variant: Variant, *, skip: str, keep_dtype: torch.dtype) -> Iterator[None]:
    """Install the variant's weights in place of the model's own, which are restored bit for bit at the end."""
    parameters = weights_of(model)
    aside = _aside(model, variant, parameters)
    replaced = [parameters[name] for name in variant.weights if name in parameters]
    place = with_room(model.device, sum(weight.numel() * weight.element_size() for weight in replaced))
    originals = _Originals(parameters, place, keep_dtype)
    with ExitStack() as stack, torch.inference_mode():
        try:
            _put(parameters, variant, {skip, *aside}, originals)
            for name in aside:
                stack.enter_context(_in_place_of(model, name, variant.floats[name]))
            for name, core in variant.input_rotations.items():  # before scales, which are those of turned inputs
                for module in modules_of(model, name):
                    stack.callback(turn_input(module, core, model.device).remove)
            for name, scales in variant.input_scales.items():
                for module in modules_of(model, name):
                    stack.enter_context(scaled_input(module, scales.to(model.device)))
            del variant
            yield
        finally:
            originals.restore()


class _Originals:
    """The weights that a variant replaces, kept to be put back: in host memory as soon as a GPU lacks room for them."""

    def __init__(self, parameters: Mapping[str, Tensor], place: torch.device, dtype: torch.dtype) -> None:
        """Keep nothing yet; copies will lie on `place`, in `dtype` where that loses nothing."""
        self._parameters, self._place, self._dtype = parameters, place, dtype
        self._saved: dict[str, Tensor] = {}

    def keep(self, name: str) -> None:
        """Keep a copy of a parameter that is about to be replaced."""
        if name not in self._saved:
            self._saved[name] = with_room_made(partial(self._copy_of, name), self.move_to_host)

    def move_to_host(self) -> None:
        """Make room on the GPU: what is kept, and what will be, lies in host memory."""
        self._place = torch.device("cpu")
        self._saved = {name: value.to(self._place) for name, value in self._saved.items()}

    def restore(self) -> None:
        """Put the originals back, bit for bit."""
        for name, value in self._saved.items():
            self._parameters[name].copy_(value)

    def _copy_of(self, name: str) -> Tensor:
        return _compact(self._parameters[name], self._dtype).to(self._place)


def _put(parameters: Mapping[str, Tensor], variant: Variant, skip: Set[str], originals: _Originals | None) -> None:
    """Write a variant's weights over the parameters, which `originals` keeps before where they are wanted back."""
    make_room = release_cached if originals is None else originals.move_to_host
    for name in (*variant.weights, *variant.floats):
        if name in skip:
            continue
        if originals is not None:
            originals.keep(name)
        parameters[name].copy_(with_room_made(partial(_value_of, variant, name), make_room))


def _value_of(variant: Variant, name: str) -> Tensor:
    return variant.floats[name] if name in variant.floats else variant.weights[name].dequantize()


def _aside(model: Any, variant: Variant, parameters: Mapping[str, Tensor]) -> list[str]:
    """Return the variant's floats that stand for the head, tied or not: it makes the baseline's logits meanwhile."""
    head = model.get_output_embeddings().weight
    return [name for name in variant.floats if parameters.get(name, head) is head]


def _replace(model: Any, name: str, value: Tensor) -> nn.Parameter:
    """Put another tensor under a parameter's name; the parameter that was there, left as it is."""
    place, _, leaf = name.rpartition(".")
    module = model.get_submodule(place)
    own: nn.Parameter = module._parameters[leaf]
    module._parameters[leaf] = nn.Parameter(value.to(own), requires_grad=False)
    return own


@contextmanager
def _in_place_of(model: Any, name: str, value: Tensor) -> Iterator[None]:
    own = _replace(model, name, value)
    try:
        yield
    finally:
        place, _, leaf = name.rpartition(".")
        model.get_submodule(place)._parameters[leaf] = own


def with_room(device: torch.device, size_bytes: int) -> torch.device:
    """Return a device, or the CPU where a CUDA GPU has not twice the room for so many bytes."""
    lacks = device.type == "cuda" and free_bytes(device) <= 2 * size_bytes
    return torch.device("cpu") if lacks else device


def _compact(parameter: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a copy in the checkpoint's type if that loses nothing, else in the parameter's own."""
    copy = parameter.detach().to(dtype, copy=True)
    return copy if torch.equal(copy.to(parameter.dtype), parameter) else parameter.detach().clone()


@contextmanager
def scaled_input(module: nn.Module, scales: Tensor) -> Iterator[None]:
    """Multiply a linear's input by `scales` [columns]."""
    handle = _scale_input(module, scales)
    try:
        yield
    finally:
        handle.remove()


def _scale_input(module: nn.Module, scales: Tensor) -> RemovableHandle:
    def multiply(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0] * scales.to(args[0].dtype), *args[1:])

    return module.register_forward_pre_hook(multiply)

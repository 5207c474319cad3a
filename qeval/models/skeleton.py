"""A model without its weights: every module and buffer is there, every parameter is on torch's meta device."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM

from qeval.models.places import places_of
from qeval.models.quiet import quiet
from qeval.models.weights import TensorEntry, listed


class _Weightless(TorchFunctionMode):
    """`torch.empty` makes tensors of no memory: it is what modules ask for their matrices with."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(kwargs or {})
        if function is torch.empty:
            given["device"] = "meta"
        return function(*args, **given)


def skeleton(config: Any, dtype: torch.dtype, entries: Sequence[TensorEntry], where: str) -> tuple[Any, list[str]]:
    """The model of a configuration without weights, and a note on tensors of the checkpoint that it does not use.

    Raises:
        UsageError: as `places_of`.
    """
    with quiet(), _Weightless():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.eval().requires_grad_(False)
    _clear(model)
    unused = places_of(model, entries, where).unused
    notes = [f"The model does not use some tensors of the checkpoint: {listed(unused)}."] if unused else []
    return model, notes


def put(model: nn.Module, name: str, value: nn.Parameter) -> None:
    """Make `value` the model's parameter of that name."""
    module, _, leaf = name.rpartition(".")
    model.get_submodule(module)._parameters[leaf] = value


def meta_like(parameter: torch.Tensor) -> nn.Parameter:
    """A parameter of the same shape and type that holds nothing."""
    return nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype, device="meta"), requires_grad=False)


def _clear(model: Any) -> None:
    """Small parameters that modules made by other means (a norm's ones) become weightless too; ties stay."""
    for name, parameter in list(model.named_parameters()):
        if parameter.device.type != "meta":
            put(model, name, meta_like(parameter))
    embedding = model.get_input_embeddings()
    embedding.padding_idx = None  # it says which row gets no gradient, and there are none

"""A model without its weights: every module and buffer is there, every parameter is on torch's meta device."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM

from qeval.models.checkpoint.fit import check_sizes
from qeval.models.checkpoint.weight_map import map_weights
from qeval.models.checkpoint.weights import TensorEntry
from qeval.models.silence_transformers import transformers_errors


class _Weightless(TorchFunctionMode):
    """A mode in which `torch.empty`, by which modules make their matrices, takes no memory."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = dict(kwargs or {})
        if function is torch.empty:
            options["device"] = "meta"
        return function(*args, **options)


def build_meta_model(
    config: Any, dtype: torch.dtype, entries: Sequence[TensorEntry], where: str
) -> tuple[Any, tuple[str, ...]]:
    """Build the model of a configuration without weights, and notes on what else the checkpoint holds.

    Raises:
        UsageError: As `check_sizes` and `map_weights`.
    """
    check_sizes(config, entries, where)
    with transformers_errors(f"'{where}' can't be loaded"), _Weightless():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.eval().requires_grad_(False)
    _clear(model)
    places = map_weights(model, entries, where)
    for name in places.untied:
        set_parameter(model, name, meta_like(model.get_parameter(name)))
        model.all_tied_weights_keys.pop(name)
    return model, places.notes


def set_parameter(model: nn.Module, name: str, value: nn.Parameter) -> None:
    """Make `value` the model's parameter of that name."""
    module, _, leaf = name.rpartition(".")
    model.get_submodule(module)._parameters[leaf] = value


def names_of_parameters(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Return all names of each parameter, by the first: one that is tied, or in a shared module, has several."""
    names: dict[int, list[str]] = {}
    parameters = list(model.named_parameters(remove_duplicate=False))
    for name, parameter in parameters:
        names.setdefault(id(parameter), []).append(name)
    return {own[0]: tuple(own) for own in names.values()}


def meta_like(parameter: torch.Tensor) -> nn.Parameter:
    """Return a parameter of the same shape and type that holds nothing."""
    return nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype, device="meta"), requires_grad=False)


def _clear(model: Any) -> None:
    """Make small parameters that modules made by other means (a norm's ones) weightless too; ties stay."""
    parameters = list(model.named_parameters(remove_duplicate=False))
    empty = {id(parameter): meta_like(parameter) for _, parameter in parameters if parameter.device.type != "meta"}
    for name, parameter in parameters:
        if id(parameter) in empty:
            set_parameter(model, name, empty[id(parameter)])
    embedding = model.get_input_embeddings()
    embedding.padding_idx = None  # it says which row gets no gradient, and there are none

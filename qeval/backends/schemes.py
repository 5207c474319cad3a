"""A variant's scheme in a transformers model: the inputs of its quantized linears rounded, and keys and values."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qeval.models.structure.kv_cache import KvChange
from qeval.models.structure.precision import outside_autocast
from qeval.models.structure.trace import text_config
from qeval.models.structure.weight_views import changed_expert_inputs, is_expert
from qeval.quant.fake_quant import fake_quantize_heads, fake_quantize_rows
from qeval.quant.scheme import Scheme, TensorFormat


def kv_changes(model: Any, scheme: Scheme, ranges: Mapping[str, Tensor], device: torch.device) -> list[KvChange]:
    """Return what rounds each layer's keys and values; none where the scheme leaves both as they are.

    Args:
        model: The model.
        scheme: The variant's.
        ranges: The largest magnitudes of static formats, as `Variant.ranges` holds them.
        device: Where the model computes.
    """
    if not scheme.caches:
        return []
    near = {name: amax.to(device) for name, amax in ranges.items() if name.endswith((".keys", ".values"))}
    layers = range(int(text_config(model).num_hidden_layers))
    return [_kv_change(scheme, near.get(f"{layer}.keys"), near.get(f"{layer}.values")) for layer in layers]


def _kv_change(scheme: Scheme, key_range: Tensor | None, value_range: Tensor | None) -> KvChange:
    def change(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        # what is computed in half precision is rounded in fp32 and handed on in its own type
        if scheme.keys is not None:
            keys = fake_quantize_heads(keys, scheme.keys, _near(key_range, keys), of_keys=True).to(keys.dtype)
        if scheme.values is not None:
            near = _near(value_range, values)
            values = fake_quantize_heads(values, scheme.values, near, of_keys=False).to(values.dtype)
        return keys, values

    return outside_autocast(change)


@contextmanager
def rounded_inputs(
    model: Any, formats: Mapping[str, TensorFormat], ranges: Mapping[str, Tensor], device: torch.device
) -> Iterator[None]:
    """Round the inputs of linears inside a `with` block.

    Hooks are called in the order in which they were set, so enter it after what multiplies inputs by scales.

    Args:
        model: The model.
        formats: By the weights of the linears; the head's input stays in float.
        ranges: The largest magnitudes of static formats by the weight's name.
        device: Where the model computes; a streamed model's parameters say nothing of it.
    """
    head, slot = model.get_output_embeddings(), _LastInput()
    experts = {name: _rounding(how, ranges.get(name), device) for name, how in formats.items() if is_expert(name)}
    with ExitStack() as stack:
        stack.callback(slot.clear)
        if experts:
            stack.enter_context(changed_expert_inputs(model, experts))
        for name in formats.keys() - experts.keys():
            module = model.get_submodule(name.removesuffix(".weight"))
            if module is not head:
                stack.callback(_round_input(module, slot, formats[name], ranges.get(name), device))
        yield


class _LastInput:
    """The input that was rounded last, so that linears which read one tensor in one way have it rounded once."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Let go of both tensors."""
        self._input: Tensor | None = None
        self._rounded: Tensor | None = None
        self._way: _Way | None = None

    def rounded(self, inputs: Tensor, way: "_Way", compute: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the rounded `inputs`, computed unless they are the last ones and were rounded in the same way."""
        if self._input is not inputs or self._way != way or self._rounded is None:
            self._rounded = compute(inputs)
            self._input, self._way = inputs, way
        return self._rounded


class _Way(NamedTuple):
    """A way to round an input: the format, and the largest magnitude where it is static."""

    how: TensorFormat
    amax: float | None


def _round_input(
    module: nn.Module, slot: _LastInput, how: TensorFormat, amax: Tensor | None, device: torch.device
) -> Callable[[], None]:
    """Have a module's input rounded from now on; return what undoes it."""
    compute = _rounding(how, amax, device)
    way = _Way(how, None if amax is None else float(amax))

    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (slot.rounded(args[0], way, compute), *args[1:])

    return module.register_forward_pre_hook(hook).remove


def _rounding(how: TensorFormat, amax: Tensor | None, device: torch.device) -> Callable[[Tensor], Tensor]:
    """Return what rounds an input. `amax` lies in host memory."""
    return outside_autocast(partial(_rounded, how=how, amax=None if amax is None else amax.to(device)))


def _rounded(inputs: Tensor, how: TensorFormat, amax: Tensor | None) -> Tensor:
    return fake_quantize_rows(inputs, how, _near(amax, inputs)).to(inputs.dtype)


def _near(amax: Tensor | None, tensor: Tensor) -> Tensor | None:
    """Return a range where a tensor lies: the layers of a model may lie on several GPUs."""
    return None if amax is None else amax.to(tensor.device)

"""The largest magnitudes on calibration text of what a scheme rounds with static scales."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from qeval.models.structure.kv_cache import KvChange, passing_cache
from qeval.models.structure.trace import text_config
from qeval.models.structure.weight_views import Before, watch_products
from qeval.quant.fake_quant import rotate, rotation_size
from qeval.quant.floats import largest_magnitude
from qeval.quant.scheme import Scheme, TensorFormat


@torch.inference_mode()
def collect_ranges(
    model: Any, names: Sequence[str], scheme: Scheme, run: Callable[[Callable[[], Any]], None]
) -> dict[str, Tensor]:
    """Return the largest magnitudes, as `Variant.ranges` holds them, from one pass over calibration text.

    Args:
        model: The model as it is to be run, but with nothing rounded beside its weights.
        names: The matrices whose inputs are rounded.
        scheme: The formats; those that are not static need nothing.
        run: Runs the text, one sequence a forward pass, each with a cache that its argument makes (or None).

    Returns:
        fp32 on the CPU: one number a linear by the matrix's name; by `LAYER.keys` and `LAYER.values` one number, or
        [heads, 1, size] for a scale a channel, of rotated heads where the format rotates.
    """
    ranges = _Ranges(scheme)
    listeners = {name: ranges.listener(name) for name in names} if scheme.has_static_inputs else {}
    changes = [ranges.watcher(layer) for layer in range(int(text_config(model).num_hidden_layers))]
    with watch_products(model, before=listeners):
        run(lambda: passing_cache(changes) if scheme.caches else None)
    return {name: amax.cpu() for name, amax in ranges.amax.items()}


class _Ranges:
    """Largest magnitudes by name, on the device."""

    def __init__(self, scheme: Scheme) -> None:
        self._scheme = scheme
        self.amax: dict[str, Tensor] = {}

    def listener(self, name: str) -> Before:
        """Return what looks at the inputs of a product."""
        return lambda inputs: self._widen(name, inputs.float().abs().amax())

    def watcher(self, layer: int) -> KvChange:
        """Return what looks at a layer's keys and values, and leaves them as they are."""

        def look(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
            self._look(f"{layer}.keys", keys, self._scheme.keys, of_keys=True)
            self._look(f"{layer}.values", values, self._scheme.values, of_keys=False)
            return keys, values

        return look

    def _look(self, name: str, heads: Tensor, how: TensorFormat | None, *, of_keys: bool) -> None:
        if how is None or not how.is_static:
            return
        if how.hadamard:
            heads = rotate(heads, rotation_size(heads.shape[-1], of_keys=of_keys))
        if how.span == "channel":
            self._widen(name, largest_magnitude(heads.float().permute(1, 3, 0, 2).flatten(2)).unsqueeze(1))
        else:
            self._widen(name, heads.float().abs().amax())

    def _widen(self, name: str, amax: Tensor) -> None:
        self.amax[name] = torch.maximum(self.amax[name], amax) if name in self.amax else amax

"""Layer by layer: each group of linears is rounded by what reaches it through the rounded groups before it.

The calibration text's hidden states between two layers are all that is kept, in the type that the model computes in,
so they are what a whole pass would give, bit for bit. One input's second moments live at a time, columns^2 fp32
numbers summed over all tokens: exact ones, since the sketch of `quant.statistics` has rank 512 at most and GPTQ inverts
the matrix. Within a layer too a group's moments are taken after the groups before it were rounded ("true sequential").
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qeval.calibrate.recall import layers_of, recalled, replaced_by
from qeval.errors import QevalError
from qeval.models.graph import Description, Group
from qeval.progress import Advance
from qeval.quant.awq import choose_clip
from qeval.quant.gptq import Factor, Rounded, factorize, quantize
from qeval.quant.grid import Grid
from qeval.quant.statistics import add_moments


@dataclass(frozen=True)
class Options:
    """How GPTQ rounds: damping as a share of the mean second moment; whether the largest moments go first.

    `clip`: each block's range is searched first, for the least squared error of its own outputs.
    """

    damping: float
    act_order: bool
    clip: bool


class Outcome(NamedTuple):
    """What rounding one matrix came to, and the damping that it took."""

    name: str
    rounded: Rounded
    damping: float


@torch.inference_mode()
def quantize_in_order(
    model: Any,
    description: Description,
    samples: Sequence[Sequence[int]],
    grids: Mapping[str, Grid],
    options: Options,
    advance: Advance,
) -> list[Outcome]:
    """GPTQ over all linears that `grids` names, in the order of the computation; the model is left as it was.

    `advance` is told 1 for every group of the model.

    Raises:
        QevalError: no calibration token reaches a linear, or its inputs are not finite.
    """
    stream = _Stream(model, layers_of(model, description), samples)
    outcomes: list[Outcome] = []
    for layer in range(len(description.layers)):
        with ExitStack() as rounded:
            for group in (group for group in description.groups if group.layer == layer):
                found = _quantize_group(stream, group, grids, options)
                outcomes += found
                values = {outcome.name: outcome.rounded.weight.dequantize() for outcome in found}
                rounded.enter_context(replaced_by(stream.parameters, values))
                advance(1)
            stream.pass_layer()
    return outcomes


def _quantize_group(stream: "_Stream", group: Group, grids: Mapping[str, Grid], options: Options) -> list[Outcome]:
    names = [name for name in group.names if name in grids]
    if not names:
        return []
    try:
        moments = stream.moments(group)
        factor = factorize(moments, damping=options.damping, act_order=options.act_order)
    except QevalError as error:
        raise QevalError(f"{names[0]}: {error}") from error
    return [_outcome(name, stream.parameters[name].float(), grids[name], factor, options.clip) for name in names]


def _outcome(name: str, weight: Tensor, grid: Grid, factor: Factor, clip: bool) -> Outcome:
    shares = choose_clip(weight, grid, factor.sketch) if clip else None
    return Outcome(name, quantize(weight, grid, factor, shares), factor.damping)


class _Stream:
    """The calibration text on its way through the layers: each sample's hidden states before the next one."""

    def __init__(self, model: Any, layers: nn.ModuleList, samples: Sequence[Sequence[int]]) -> None:
        self.parameters: dict[str, nn.Parameter] = dict(model.named_parameters())
        self._model, self._layers, self._next = model, layers, 0
        self._ids = [torch.tensor([list(sample)], dtype=torch.long, device=model.device) for sample in samples]
        self._states: list[Any] = [None] * len(self._ids)

    def moments(self, group: Group) -> Tensor:
        """The mean over tokens of x x^T [columns, columns] fp32, x being the group's input."""
        linear = self._model.get_submodule(group.names[0].removesuffix(".weight"))
        total = torch.zeros(group.columns, group.columns, device=self._model.device)
        tokens = 0
        for sample in range(len(self._ids)):
            for given in self._run(
                sample, lambda stop: linear.register_forward_pre_hook(lambda _, args: stop(args[0]))
            ):
                inputs = given.reshape(-1, group.columns).float()
                add_moments(total, inputs)
                tokens += len(inputs)
        if not tokens:
            raise QevalError("no token of the calibration text reaches it, so GPTQ can't round it; calibrate on more.")
        return total.triu_().add_(total.triu(1).T).div_(tokens)

    def pass_layer(self) -> None:
        """Take every sample's states through the next layer, as its weights are now."""
        layer = self._layers[self._next]
        for sample in range(len(self._ids)):
            (self._states[sample],) = self._run(
                sample, lambda stop: layer.register_forward_hook(lambda _m, _a, output: stop(output))
            )
        self._next += 1

    def _run(self, sample: int, listen: Callable[[Callable[[Any], None]], Any]) -> list[Any]:
        """Run a sample from its kept states on, until what `listen` hooks up calls back; what it was called with."""
        seen: list[Any] = []

        def stop(value: Any) -> None:
            seen.append(value)
            raise _Reached

        handle = listen(stop)
        try:
            with recalled(self._layers, self._next, self._states[sample]):
                self._model.base_model(input_ids=self._ids[sample], use_cache=False)
        except _Reached:
            pass
        finally:
            handle.remove()
        return seen


class _Reached(Exception):  # noqa: N818 - no error: nothing after this point of a pass is needed
    """A pass has come as far as it was to go."""

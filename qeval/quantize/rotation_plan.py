"""The plan of a rotation: the steps that each weight of a model goes through, found from its trace."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call

from qeval.arithmetic import dtype_name, with_fp64
from qeval.errors import UsageError
from qeval.models.structure.graph import Description, Fold, Group
from qeval.models.structure.trace import probe, text_config
from qeval.models.structure.weight_views import is_expert, weights_of
from qeval.quant.rotation import Rotation, random_rotation
from qeval.quant.scheme import RotationPlaces

_NORM_TOLERANCE = 2.0**-5
"""Of a norm's output, which half precision rounds; a mean that is subtracted changes it by far more."""
_STATE_TOLERANCE = 2.0**-5
"""By which final states may move, of the largest, where heads' values are turned that nothing else reads."""
_ROWS_AT_ONCE = 1 << 14


class WeightStep(Protocol):
    """One change of a weight, fp64 to fp64."""

    def changed(self, weight: Tensor) -> Tensor:
        """Return another tensor of the same shape."""
        ...


@dataclass(frozen=True, eq=False)
class UnitGain:
    """A norm's gain becomes one, which some norms write as a weight of zero."""

    weight: float

    def changed(self, weight: Tensor) -> Tensor:
        """As `WeightStep.changed`."""
        return torch.full_like(weight, self.weight)


@dataclass(frozen=True, eq=False)
class TakenGain:
    """The columns of a matrix are multiplied by the gain [columns] of the norm before it."""

    gain: Tensor

    def changed(self, weight: Tensor) -> Tensor:
        """As `WeightStep.changed`."""
        return weight * self.gain.to(weight)


@dataclass(frozen=True, eq=False)
class TurnedColumns:
    """A matrix takes inputs that are turned."""

    rotation: Rotation

    def changed(self, weight: Tensor) -> Tensor:
        """As `WeightStep.changed`."""
        return self.rotation.turn(weight)


@dataclass(frozen=True, eq=False)
class TurnedRows:
    """A matrix, or a bias, gives outputs that are turned; with a fold, those of its rows that carry values alone."""

    rotation: Rotation
    fold: Fold | None = None

    def changed(self, weight: Tensor) -> Tensor:
        """As `WeightStep.changed`."""
        places = torch.arange(len(weight), device=weight.device)
        places = places if self.fold is None else self.fold.carried(places)
        turned = weight.clone()
        turned[places] = (
            self.rotation.turn(weight[places].T).T if weight.dim() == 2 else self.rotation.turn(weight[places])
        )
        return turned


_BY_ROW = (TakenGain, TurnedColumns)
"""Steps that take each row by itself."""


def take_steps(weight: Tensor, steps: Sequence[WeightStep]) -> Tensor:
    """Return a weight after all of its steps, which are computed in fp64, in its own type and place."""
    by_row = weight.dim() == 2 and takes_rows_alone(steps)
    parts = torch.split(weight.detach(), _ROWS_AT_ONCE if by_row else len(weight))
    return torch.cat([_stepped(part, steps) for part in parts])


def takes_rows_alone(steps: Sequence[WeightStep]) -> bool:
    """Return whether each row of a matrix takes its steps whatever the others are."""
    return all(isinstance(step, _BY_ROW) for step in steps)


def _stepped(part: Tensor, steps: Sequence[WeightStep]) -> Tensor:
    wide = with_fp64(part).double()
    for step in steps:
        wide = step.changed(wide)
    return wide.to(part.device, part.dtype)


@dataclass(frozen=True, eq=False)
class RotationPlan:
    """The steps of each weight, by name, and of the head; and the linears whose input is turned while running."""

    steps: Mapping[str, Sequence[WeightStep]]
    head: Sequence[WeightStep]
    inputs: Mapping[str, Rotation]
    words: Sequence[str]


class Weights(Protocol):
    """A model's weights, wherever they lie."""

    model: Any

    def whole(self, name: str) -> Tensor:
        """Return a weight as it is now."""
        ...

    def states(self) -> Tensor:
        """Return the final states of a few fixed tokens, as `probe`."""
        ...

    def turned(self, steps: Mapping[str, Sequence[WeightStep]]) -> AbstractContextManager[None]:
        """Let weights take their steps inside a `with` block."""
        ...


class WeightsInMemory:
    """The weights of a model that is in memory."""

    def __init__(self, model: Any) -> None:
        """Look at the model's parameters."""
        self.model, self._parameters = model, weights_of(model)

    def whole(self, name: str) -> Tensor:
        """As `Weights.whole`."""
        return self._parameters[name]

    def states(self) -> Tensor:
        """As `Weights.states`."""
        return probe(self.model)

    def turned(self, steps: Mapping[str, Sequence[WeightStep]]) -> AbstractContextManager[None]:
        """As `Weights.turned`."""
        return changed_weights(self._parameters, steps)


def plan_rotation(weights: Weights, description: Description, places: RotationPlaces) -> RotationPlan:
    """Return what turning a model in some places takes.

    The stream is turned by the matrix of the seed; a layer's values by that of the seed + 1 + the layer's number.

    Args:
        weights: The float model's.
        description: Its structure, with the folds that were found.
        places: The places, and the seed.

    Raises:
        UsageError: A place has no matrices that could be turned, or a norm is none that turning passes through.
    """
    build = _Builder(weights, description, places.seed)
    if places.residual:
        build.turn_stream()
    if places.heads:
        build.turn_values()
    if places.online:
        build.turn_inputs()
    return RotationPlan(build.steps, build.head, build.inputs, build.words)


class _Norm(NamedTuple):
    """An RMSNorm's gain, fp64, and the weight that would mean a gain of one."""

    gain: Tensor
    unit: float


class _Builder:
    """The steps of a plan, place by place."""

    def __init__(self, weights: Weights, description: Description, seed: int) -> None:
        self._weights, self._description, self._seed = weights, description, seed
        model = self._model = weights.model
        self._name = type(model).__name__
        self._parameters = weights_of(model)
        self._width = int(model.get_output_embeddings().weight.shape[1])
        self._type = dtype_name(model.get_output_embeddings().weight.dtype)
        self.steps: dict[str, list[WeightStep]] = {}
        self.head: list[WeightStep] = []
        self.inputs: dict[str, Rotation] = {}
        self.words: list[str] = []

    def turn_stream(self) -> None:
        """Add R1."""
        rotation = random_rotation(self._width, self._seed)
        first = {group.layer: group for group in reversed(self._description.groups)}
        for group in self._description.groups:
            if self._reads_stream(group):
                norm = self._norm_before(group)
                for name in (*group.names, *group.followers):
                    self._add(name, TakenGain(norm.gain), TurnedColumns(rotation))
            elif group is first[group.layer]:
                # powers of two show what folds, unless half precision rounds 1 + weight, or small numbers in fp16
                where = "" if self._type == "float32" else f" (looked for in {self._type}; --compute fp32 sees more)"
                raise self._refused("R1", f"no norm with a gain comes before {group.names[0]}{where}")
            else:
                for name in filter(self._writes_stream, group.names):
                    self._add_rows(name, TurnedRows(rotation))
        self._add(self._description.embedding, TurnedColumns(rotation))

        name, module = self._final_norm()
        norm = self._norm(name, module)
        self.steps[f"{name}.weight"] = [UnitGain(norm.unit)]
        self.head = [TakenGain(norm.gain), TurnedColumns(rotation)]
        self.words.append(f"R1 of {self._width} channels ({rotation.words})")

    def turn_values(self) -> None:
        """Add R2."""
        size = self._head_size()
        groups = self._value_groups(size)
        if lacking := set(range(len(self._description.layers))) - groups.keys():
            raise self._refused("R2", f"layer {min(lacking)} has no matrix of values that feeds another one alone")
        for layer, group in groups.items():
            for name, steps in self._value_steps(group, random_rotation(size, self._seed + 1 + layer)).items():
                self._add(name, *steps)
        self.words.append(f"R2 of {size} channels a head ({random_rotation(size, self._seed).words})")

    def turn_inputs(self) -> None:
        """Add R4."""
        if experts := next((n for group in self._description.groups for n in group.names if is_expert(n)), None):
            raise self._refused("R4", f"its experts lie in stacks ({experts}), whose inputs qeval does not turn")
        values = self._value_groups(self._head_size()).values()
        last = {g.layer: g for g in self._description.groups if g not in values and self._is_inner(g)}
        if lacking := set(range(len(self._description.layers))) - last.keys():
            raise self._refused("R4", f"layer {min(lacking)} has no last matrix of a feed-forward")
        for group in last.values():
            rotation = random_rotation(group.columns, self._seed, signs=False)
            for name in group.names:
                self._add(name, TurnedColumns(rotation))
                self.inputs[name] = rotation
        sizes = {rotation.size: rotation.words for rotation in self.inputs.values()}
        of_sizes = ", ".join(f"{size} channels ({words})" for size, words in sizes.items())
        self.words.append(f"R4 of {of_sizes}, on the inputs of {len(self.inputs)} matrices while running")

    def _add(self, name: str, *steps: WeightStep) -> None:
        self.steps.setdefault(name, []).extend(steps)

    def _add_rows(self, name: str, step: TurnedRows) -> None:
        """Turn a matrix's rows, and its bias where it has one."""
        self._add(name, step)
        if (bias := f"{name.removesuffix('weight')}bias") in self._parameters:
            self._add(bias, step)

    def _writes_stream(self, name: str) -> bool:
        return len(self._parameters[name]) == self._width

    def _reads_stream(self, group: Group) -> bool:
        """Return whether a norm's gain of the stream's width comes before a group."""
        producers = group.fold.parameters if group.fold else ()
        return group.columns == self._width and any(self._parameters[name].dim() == 1 for name in producers[:1])

    def _is_inner(self, group: Group) -> bool:
        return not self._reads_stream(group) and all(map(self._writes_stream, group.names))

    def _norm_before(self, group: Group) -> _Norm:
        """Return the norm before a group, whose gain becomes one."""
        assert group.fold is not None
        name = group.fold.parameters[0].rpartition(".")[0]
        norm = self._norm(name, self._model.get_submodule(name))
        self.steps[f"{name}.weight"] = [UnitGain(norm.unit)]
        return norm

    def _norm(self, name: str, module: nn.Module) -> _Norm:
        """Return the gain of a norm that divides by the root of the mean square, and does nothing else."""
        parameters = dict(module.named_parameters(recurse=False))
        if parameters.keys() != {"weight"}:
            raise self._refused("R1", f"{name} adds a bias, as a LayerNorm does, which no matrix after it takes")
        weight = self._weights.whole(f"{name}.weight")
        inputs = torch.randn(4, self._width, generator=torch.Generator().manual_seed(0)) + 1
        inputs = inputs.to(weight.device, weight.dtype)
        with torch.inference_mode():
            outputs = with_fp64(functional_call(module, {"weight": weight}, inputs)).double()
        wide, gain = with_fp64(inputs).double(), with_fp64(weight.detach()).double()
        plain = wide * wide.square().mean(-1, keepdim=True).rsqrt()
        for unit in (1.0, 0.0):
            expected = plain * (gain + 1 - unit)
            if (outputs - expected).abs().max() <= _NORM_TOLERANCE * expected.abs().max():
                return _Norm(gain + 1 - unit, unit)
        raise self._refused("R1", f"{name} does more than divide by the root of the mean square, as a LayerNorm does")

    def _final_norm(self) -> tuple[str, nn.Module]:
        """Return the module outside the layers that gives the final states."""
        inside = self._description.layers[0].rpartition(".")[0] + "."
        outputs: dict[str, Tensor] = {}

        def noting(name: str) -> Any:
            return lambda _, __, output: outputs.__setitem__(name, output)

        with ExitStack() as hooks:
            for name, module in self._model.named_modules():
                if not name.startswith(inside) and not list(module.children()) and hasattr(module, "weight"):
                    hooks.callback(module.register_forward_hook(noting(name)).remove)
            states = self._weights.states()
        for name, output in outputs.items():
            if (
                isinstance(output, Tensor)
                and output.shape[1:] == states.shape
                and torch.equal(output[0].float().to(states.device), states)
            ):
                return name, self._model.get_submodule(name)
        raise self._refused("R1", "no norm gives its final states")

    def _head_size(self) -> int:
        config = text_config(self._model)
        return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)

    def _value_groups(self, size: int) -> dict[int, Group]:
        """Return the group that takes the values of heads of `size` by layer; kinds are tried on the first of them."""
        kinds: dict[str, bool] = {}
        groups: dict[int, Group] = {}
        for group in self._description.groups:
            if not self._may_take_values(group, size):
                continue
            if group.kind not in kinds:
                kinds[group.kind] = self._keeps_states(self._value_steps(group, random_rotation(size, self._seed)))
            if kinds[group.kind]:
                groups[group.layer] = group
        return groups

    def _may_take_values(self, group: Group, size: int) -> bool:
        fold = group.fold
        if fold is None or self._parameters[fold.parameters[0]].dim() != 2 or any(map(is_expert, group.names)):
            return False
        return fold.rows % size == 0 and group.columns % size == 0 and fold.head in (1, size)

    def _value_steps(self, group: Group, rotation: Rotation) -> dict[str, list[WeightStep]]:
        assert group.fold is not None
        rows: dict[str, list[WeightStep]] = {name: [TurnedRows(rotation, group.fold)] for name in group.fold.parameters}
        return {**rows, **{name: [TurnedColumns(rotation)] for name in (*group.names, *group.followers)}}

    def _keeps_states(self, steps: Mapping[str, Sequence[WeightStep]]) -> bool:
        """Return whether the final states of a few tokens stay, up to rounding, when some weights take their steps."""
        before = self._weights.states()
        with self._weights.turned(steps):
            after = self._weights.states()
        return bool((after - before).abs().max() <= _STATE_TOLERANCE * before.abs().max())

    def _refused(self, place: str, reason: str) -> UsageError:
        return UsageError(
            f"{self._name} can't be rotated by {place}: {reason}; leave {place.lower()} out of the recipe's name."
        )


@contextmanager
def changed_weights(parameters: Mapping[str, Tensor], steps: Mapping[str, Sequence[WeightStep]]) -> Iterator[None]:
    """Let weights take their steps inside a `with` block; they are put back bit for bit, from the host's memory."""
    saved: dict[str, Tensor] = {}
    try:
        with torch.inference_mode():
            for name, each in steps.items():
                saved[name] = parameters[name].detach().to("cpu", copy=True)
                parameters[name].copy_(take_steps(parameters[name], each))
        yield
    finally:
        with torch.inference_mode():
            for name, value in saved.items():
                parameters[name].copy_(value)

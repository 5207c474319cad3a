"""A model rotated as QuaRot does before it is quantized: folded into its weights, proved on a few tokens.

R1: every norm's gain goes into the matrices after it, and the residual stream is turned by an orthogonal Q: the
embedding and the matrices that read the stream are multiplied by Q on the right, those that write it by Q^T on the
left. An RMSNorm without a gain gives turned outputs for turned inputs. R2: the values of each head are turned by the
rows of v_proj and turned back by the columns of o_proj; all heads of a layer take one matrix, so that grouped queries
need nothing more. R4: the input of a feed-forward's last matrix is turned while running, and turned back by its
columns. The turned model's logits must be the float model's own, or nothing is quantized.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from qeval.errors import UsageError
from qeval.models.structure.graph import Description
from qeval.models.structure.head import Head
from qeval.models.structure.precision import outside_autocast
from qeval.models.structure.weight_views import modules_of, weights_of
from qeval.quant.rotation import turn_runs
from qeval.quant.scheme import RotationPlaces
from qeval.quant.variant import Variant
from qeval.quantize.rotation_plan import RotationPlan, Weights, WeightsInMemory, plan_rotation, take_steps

_TOLERANCES = {torch.bfloat16: 2.0**-3, torch.float16: 2.0**-5}
"""Shares by which logits may move where half precision rounds the turned weights and states: some 1 % in bf16."""
_TOLERANCE = 1e-4
_NAMED_AT_MOST = 3


@dataclass(frozen=True, eq=False)
class RotatedModel:
    """A model whose weights are turned for the length of a `with` block.

    Attributes:
        parameters: Its weights as they are now, without the head's.
        description: Its structure, as quantizers are to see it.
        head: Its head.
        changed: The weights that differ from the float model's.
        has_own_head: Whether the head differs too.
        inputs: The linears whose input is turned while running, with the cores that `Variant` holds.
        details: What was done, in words.
    """

    parameters: Mapping[str, Tensor]
    description: Description
    head: Head
    changed: tuple[str, ...]
    has_own_head: bool
    inputs: Mapping[str, Tensor]
    details: Mapping[str, str]

    def completed(self, variant: Variant) -> Variant:
        """Return a variant of the turned model as one of the float model: with every weight that turning changed."""
        turned = {name: self.parameters[name] for name in self.changed}
        if self.has_own_head:
            turned[self.description.head] = self.head.weight
        kept = {n: w.detach().clone() for n, w in turned.items() if n not in variant.quantized_matrices}
        return with_turned_floats(variant, kept, self.inputs, self.details)


def with_turned_floats(
    variant: Variant, kept: Mapping[str, Tensor], inputs: Mapping[str, Tensor], details: Mapping[str, str]
) -> Variant:
    """Return a turned model's variant as one of the float model.

    Args:
        variant: The variant of the turned model.
        kept: The turned weights that it leaves in float, whatever its method changed in them.
        inputs: As `RotatedModel.inputs`.
        details: What was done, in words.
    """
    return replace(
        variant,
        floats=dict(sorted({**kept, **variant.floats}.items())),
        details={**variant.details, **details},
        scheme=replace(variant.scheme, rotates_inputs=bool(inputs)),
        input_rotations=inputs,
    )


@contextmanager
def rotated_model(model: Any, description: Description, head: Head, places: RotationPlaces) -> Iterator[RotatedModel]:
    """Turn a model's weights inside a `with` block; they are put back bit for bit.

    Args:
        model: The float model.
        description: Its structure, with the folds that were found.
        head: Its head.
        places: The places, and the seed of the matrices.

    Raises:
        UsageError: The model has a part that can't be turned, or gives other logits when it is.
    """
    weights = WeightsInMemory(model)
    plan = plan_rotation(weights, description, places)
    turned_head = replace(head, weight=take_steps(head.weight, plan.head)) if plan.head else head
    with turned_weights(weights, description, places, plan, (head, turned_head)) as details:
        yield RotatedModel(
            parameters=weights_of(model),
            description=turned_description(description, plan),
            head=turned_head,
            changed=tuple(plan.steps),
            has_own_head=bool(plan.head),
            inputs={name: rotation.core.float() for name, rotation in plan.inputs.items()},
            details=details,
        )


class MakesLogits(Protocol):
    """A head, in memory or not."""

    def logits(self, states: Tensor) -> Tensor:
        """Return the fp32 logits [n, vocab] of states [n, d_model]."""
        ...


@contextmanager
def turned_weights(
    weights: Weights,
    description: Description,
    places: RotationPlaces,
    plan: RotationPlan,
    heads: tuple[MakesLogits, MakesLogits],
) -> Iterator[dict[str, str]]:
    """Let weights take a plan's steps inside a `with` block, where the logits stay; what was done is given in words.

    Args:
        weights: The float model's.
        description: Its structure.
        places: The places, and the seed of the matrices.
        plan: The steps.
        heads: The model's head, and what is the turned model's.

    Raises:
        UsageError: The turned model gives other logits.
    """
    model, matrix = weights.model, weights.model.get_output_embeddings().weight
    before = heads[0].logits(weights.states())
    with weights.turned(plan.steps), ExitStack() as hooks:
        for name, rotation in plan.inputs.items():
            for module in modules_of(model, name):
                hooks.callback(turn_input(module, rotation.core.float(), model.device).remove)
        moved = _moved(before, heads[1].logits(weights.states()))
        if not moved <= _TOLERANCES.get(matrix.dtype, _TOLERANCE):
            raise _changed_model(model, description, plan, moved)
        yield _details(plan, description, matrix.numel(), places, moved)


def _moved(before: Tensor, after: Tensor) -> float:
    """Return how far logits [tokens, vocab] are from what they were, as a share; what moves a whole row is none."""
    before, moved = (each - each.mean(-1, keepdim=True) for each in (before, after - before))
    return float(moved.norm() / before.norm())


def check_rotation(model: Any, description: Description, head: Head, places: RotationPlaces) -> None:
    """Refuse places in which a model can't be rotated, before any work.

    Raises:
        UsageError: As `rotated_model`.
    """
    with rotated_model(model, description, head, places):
        pass


def turn_input(module: nn.Module, core: Tensor, device: torch.device) -> RemovableHandle:
    """Have a linear's input [..., columns] turned from now on, in fp32 and back, by H x `core` (`turn_runs`)."""
    core = core.to(device)

    def turn(inputs: Tensor) -> Tensor:
        return turn_runs(inputs.float(), core, inputs.shape[-1]).to(inputs.dtype)

    compute = outside_autocast(turn)

    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (compute(args[0]), *args[1:])

    return module.register_forward_pre_hook(hook)


def turned_description(description: Description, plan: RotationPlan) -> Description:
    """Return a turned model's structure: no head is tied to what was turned, and no scale passes a turned input."""
    groups = tuple(replace(g, fold=None) if g.names[0] in plan.inputs else g for g in description.groups)
    return replace(description, groups=groups, tied=description.tied and not plan.head)


def _details(
    plan: RotationPlan, description: Description, head_weights: int, places: RotationPlaces, moved: float
) -> dict[str, str]:
    details = {
        "rotation": f"{'; '.join(plan.words)}; seed {places.seed}",
        "rotated float model": f"its logits moved by a share of {moved:.1e}",
    }
    if plan.head and description.tied:
        details["head"] = f"was tied with the embedding, is a matrix of its own of {head_weights:,} weights"
    return details


def _changed_model(model: Any, description: Description, plan: RotationPlan, moved: float) -> UsageError:
    """Return the error for a model that gives other logits, with vectors of the layers that nothing was folded into."""
    width, prefix = model.get_output_embeddings().weight.shape[1], description.layers[0] + "."
    left = [
        name
        for name, parameter in model.named_parameters()
        if name.startswith(prefix) and tuple(parameter.shape) == (width,) and name not in plan.steps
    ]
    named = f", such as {', '.join(left[:_NAMED_AT_MOST])}," if left else ""
    return UsageError(
        f"{type(model).__name__} can't be rotated: its logits would move by a share of {moved:.1g}, so parts beside "
        f"its norms and linears{named} act on what is turned; leave the rotation out of the recipe's name."
    )

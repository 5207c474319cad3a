"""A layer's experts as one node of ONNX Runtime's, com.microsoft's MoE: what a model must compute, and the node itself.

What the node computes on the CPU (onnxruntime 1.32.0, its kernel held against a plain loop in tests): a softmax over
the k largest of `router_probs` weighs the experts, whatever `normalize_routing_weights` says; an expert is `down_proj @
swiglu(gate_up_proj @ x + bias) + bias`, its gate's and up's rows taking turns. So a router's own weights w (of any sum)
are given as log(w), and the sum over the experts is multiplied by the sum of w: the routing is the model's own.
"""

from dataclasses import dataclass
from math import inf
from typing import Any

import torch
from torch import Tensor, nn

from qeval.errors import UsageError

DOMAIN = "com.microsoft"
FLOAT_EXPERTS, QUANTIZED_EXPERTS = "MoE", "QMoE"
STACKS = ("gate_up_proj", "down_proj")
"""The parameters that the node multiplies by, in its order; each may have a bias, `NAME_bias`."""
INTERLEAVED = "qeval.interleaved"
"""The property of a node whose gate and up rows take turns while the model has them one behind the other."""


@dataclass(frozen=True)
class SwiGlu:
    """The activation g * sigmoid(alpha * g) * (u + beta), with g at most `limit` and u within it."""

    alpha: float = 1.0
    beta: float = 0.0
    limit: float = inf

    def apply(self, gate: Tensor, up: Tensor) -> Tensor:
        """Return the activation of a gate and an up part, of one shape."""
        gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return gate * torch.sigmoid(self.alpha * gate) * (up + self.beta)

    def attributes(self, k: int) -> dict[str, Any]:
        """Return the attributes of a node that computes it for `k` experts a token."""
        attributes: dict[str, Any] = {
            "k": k,
            "activation_type": "swiglu",
            "swiglu_fusion": 1,
            "normalize_routing_weights": 1,
            "activation_alpha": self.alpha,
            "activation_beta": self.beta,
        }
        return attributes | ({"swiglu_limit": self.limit} if self.limit < inf else {})


class FusedExperts(nn.Module):
    """Stands for a module of experts while a model is traced; its product reaches the graph as one node."""

    def __init__(self, experts: Any, activation: SwiGlu) -> None:
        """Take a module's matrices, laid out as the node reads them.

        Args:
            experts: A module for which `activation_of` names the activation.
            activation: The activation.
        """
        super().__init__()
        self.activation = activation
        self.is_reordered: bool = experts.is_concatenated
        for name in STACKS:
            stack: Tensor = experts.get_parameter(name)
            stack = stack.mT if experts.is_transposed else stack
            bias = experts.get_parameter(f"{name}_bias") if experts.has_bias else None
            if name == STACKS[0] and self.is_reordered:
                stack, bias = interleave(stack), None if bias is None else interleave(bias)
            self.register_parameter(name, nn.Parameter(stack.contiguous(), requires_grad=False))
            self.register_parameter(
                f"{name}_bias", None if bias is None else nn.Parameter(bias.contiguous(), requires_grad=False)
            )

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return the experts' weighted sum.

        Args:
            hidden_states: [tokens, width].
            top_k_index: The experts of each token, [tokens, k].
            top_k_weights: Their weights, not negative, [tokens, k].
        """
        weights = top_k_weights.to(hidden_states.dtype)
        first, second = STACKS
        output: Tensor = torch.onnx.ops.symbolic(
            f"{DOMAIN}::{FLOAT_EXPERTS}",
            [
                hidden_states,
                self.scores(weights, top_k_index, len(self.get_parameter(first))),
                self.get_parameter(first),
                getattr(self, f"{first}_bias"),
                self.get_parameter(second),
                getattr(self, f"{second}_bias"),
            ],
            self.activation.attributes(top_k_index.shape[1]),
            dtype=hidden_states.dtype,
            shape=hidden_states.shape,
            version=1,
        )
        return output * weights.sum(1, keepdim=True)

    @staticmethod
    def scores(weights: Tensor, chosen: Tensor, experts: int) -> Tensor:
        """Return the node's `router_probs`, [tokens, experts]: the logarithms of the weights.

        Args:
            weights: The weights of each token's experts, not negative, [tokens, k].
            chosen: These experts, [tokens, k].
            experts: How many there are.
        """
        limits = torch.finfo(weights.dtype)
        others = weights.new_full((weights.shape[0], experts), limits.min)
        # A weight of 0 still comes before the experts that were not chosen.
        return others.scatter(1, chosen, weights.clamp(min=limits.tiny).log())


def interleave(rows: Tensor) -> Tensor:
    """Return [experts, 2n, ...] with the rows of the two halves taking turns."""
    first, second = rows.chunk(2, dim=1)
    return torch.stack([first, second], dim=2).flatten(1, 2)


def expert_modules(model: nn.Module) -> dict[str, Any]:
    """Return the modules that hold a layer's experts as transformers lays them out, by name."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "_apply_gate")}


def activation_of(name: str, experts: Any) -> SwiGlu:
    """Return the activation of a module's experts, found by calling it.

    Args:
        name: The module's name, for the sentence.
        experts: The module.

    Raises:
        UsageError: ONNX Runtime's node can't compute these experts.
    """
    if not (experts.has_gate and set(STACKS) <= dict(experts.named_parameters()).keys()):
        raise UsageError(_cannot(name, experts, "have no gate"))
    if getattr(experts, "has_post_expert_norm", False):
        raise UsageError(_cannot(name, experts, "are normed before they are summed"))
    limits = [getattr(experts, key, None) for key in ("limit", "swiglu_limit")]
    limit = next((float(value) for value in limits if value is not None), inf)
    alpha = float(getattr(experts, "alpha", 1.0))
    tried = [SwiGlu(a, b, c) for a in {1.0, alpha} for b in (0.0, 1.0) for c in {inf, limit}]
    gate, up = torch.meshgrid(torch.linspace(-12, 12, 49), torch.linspace(-12, 12, 49), indexing="ij")
    gate, up = gate.flatten(), up.flatten()
    joined = torch.cat([gate, up]) if experts.is_concatenated else torch.stack([gate, up], dim=-1).flatten()
    own = experts._apply_gate(joined[None])[0]
    for activation in tried:
        if torch.allclose(own, activation.apply(gate, up), rtol=1e-5, atol=1e-6):
            return activation
    raise UsageError(_cannot(name, experts, "are activated by something else than SwiGLU"))


def _cannot(name: str, experts: Any, why: str) -> str:
    return (
        f"The experts of {name} ({type(experts).__name__}) {why}, which ONNX Runtime's MoE on the CPU doesn't compute; "
        "leave ONNX out (--backend torch)."
    )

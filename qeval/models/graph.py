"""Which linears share an input, and what precedes them that can take a scale; found by tracing, not by class.

One short forward pass records which linears of a decoder layer were handed the very same tensor. What can take their
input's scales (a norm's gain, v_proj before o_proj, up_proj before down_proj) is proposed from shapes and accepted only
if folding random powers of two leaves the model's output unchanged. Powers of two make that test exact in any float
type, and a family that follows Llama's pattern needs no new line.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qeval.errors import UsageError

_PROBE_TOKENS = 8
_PROBE_TOLERANCE = 1e-5


@dataclass(frozen=True)
class Fold:
    """What takes the inverse of a group's input scales, and how its channels map to the group's.

    `parameters` are the producer's tensors that are divided (a norm's gain, or a linear's rows and bias). Rows
    `offset` to `offset + rows` of them carry the input; with grouped queries each run of `head` rows feeds `repeat`
    runs of the input's channels. `plus_one`: the gain is 1 + weight.
    """

    parameters: tuple[str, ...]
    offset: int
    rows: int
    repeat: int = 1
    head: int = 1
    plus_one: bool = False

    def tie(self, values: Tensor) -> Tensor:
        """`values` [columns] averaged over the input channels that one producer row feeds, [rows]."""
        return values.reshape(-1, self.repeat, self.head).mean(1).reshape(-1)

    def spread(self, values: Tensor) -> Tensor:
        """`values` [rows] as the input sees them, [columns]."""
        return values.reshape(-1, 1, self.head).expand(-1, self.repeat, -1).reshape(-1)

    def folded(self, tensor: Tensor, scales: Tensor) -> Tensor:
        """A producer tensor with its rows divided by `scales` [rows], in fp32 and back."""
        result = tensor.float().clone()
        part = result[self.offset : self.offset + self.rows]
        divisor = scales.reshape(-1, *[1] * (tensor.dim() - 1))
        part.copy_((part + 1) / divisor - 1 if self.plus_one else part / divisor)
        return result.to(tensor.dtype)


@dataclass(frozen=True)
class Group:
    """Linears (by parameter name) that share an input of `columns` channels and are quantized together."""

    layer: int
    kind: str
    names: tuple[str, ...]
    columns: int
    fold: Fold | None


@dataclass(frozen=True)
class Description:
    """A model as the quantizers see it: its groups in the order of the computation, its layers, head, embedding."""

    groups: tuple[Group, ...]
    layers: tuple[str, ...]
    head: str
    embedding: str
    tied: bool


Probe = Callable[[], Tensor]
"""A few fixed tokens through the model as its weights are now; what comes out of it, fp32."""
ProbedAt = Callable[[int], AbstractContextManager[Probe]]
"""What shows for a while whether a change of the weights of a decoder layer leaves its output unchanged."""


def describe(model: Any, *, folds: bool = True, probed_at: ProbedAt | None = None) -> Description:
    """Trace `model` (a causal language model in eval mode) with a few tokens.

    Without `folds` no group is given any: finding them takes forward passes with changed weights. `probed_at` is for a
    model whose layers are not all in memory; by default the whole model is run.

    Raises:
        UsageError: no decoder layers, or no linears in them, are found.
    """
    layers_name, layers = decoder_layers(model)
    at = probed_at or (lambda _: nullcontext(lambda: probe(model)))
    traces = _trace(model, layers_name, layers)
    patterns: dict[tuple[Any, ...], Fold | None] = {}
    groups = []
    for layer, trace in enumerate(traces):
        prefix = f"{layers_name}.{layer}."
        for proposal in trace:
            signature = (proposal.kind, proposal.columns, tuple(_relative(f, prefix) for f in proposal.folds))
            if signature not in patterns:
                tried = proposal.folds if folds else ()
                accepted = _first_that_holds(model, proposal, tried, at(layer)) if tried else None
                patterns[signature] = None if accepted is None else _relative(accepted, prefix)
            groups.append(proposal.group(layer, _absolute(patterns[signature], prefix)))
    if not groups:
        raise UsageError(f"No linear layers were found in the decoder layers of {type(model).__name__}.")
    modules = {id(module): name for name, module in model.named_modules()}
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    return Description(
        groups=tuple(groups),
        layers=tuple(f"{layers_name}.{index}" for index in range(len(layers))),
        head=f"{modules[id(head)]}.weight",
        embedding=f"{modules[id(embedding)]}.weight",
        tied=head.weight is embedding.weight,
    )


@dataclass(frozen=True)
class _Proposal:
    kind: str
    names: tuple[str, ...]
    columns: int
    folds: tuple[Fold, ...]

    def group(self, layer: int, fold: Fold | None) -> Group:
        return Group(layer, self.kind, self.names, self.columns, fold)


def decoder_layers(model: Any) -> tuple[str, nn.ModuleList]:
    """The name and the list of a model's decoder layers.

    Raises:
        UsageError: there is no such list.
    """
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    expected = getattr(model.config, "num_hidden_layers", None)
    for name, module in lists:
        if len(module) == expected:
            return name, module
    raise UsageError(f"{type(model).__name__} has no list of {expected} decoder layers that qeval could find.")


def _trace(model: Any, layers_name: str, layers: nn.ModuleList) -> list[list[_Proposal]]:
    """For each layer its groups in the order in which they run, with the folds that shapes allow."""
    calls: list[tuple[str, nn.Module, Tensor, Any]] = []  # holding the tensors keeps their ids distinct

    def record(name: str) -> Any:
        return lambda module, args, output: calls.append((name, module, args[0], output))

    handles = [
        module.register_forward_hook(record(name))
        for name, module in layers.named_modules(prefix=layers_name)
        if not list(module.children())
    ]
    try:
        probe(model)
    finally:
        for handle in handles:
            handle.remove()
    by_layer = [[c for c in calls if c[0].startswith(f"{layers_name}.{index}.")] for index in range(len(layers))]
    return [_proposals(model, calls_of_layer) for calls_of_layer in by_layer]


def _proposals(model: Any, calls: list[tuple[str, nn.Module, Tensor, Any]]) -> list[_Proposal]:
    shared: dict[int, list[str]] = {}
    linears: dict[str, nn.Linear] = {}
    for name, module, given, _ in calls:
        if isinstance(module, nn.Linear):
            linears[name] = module
            shared.setdefault(id(given), []).append(name)
    proposals = []
    for key, names in shared.items():
        columns = linears[names[0]].in_features
        norms = [(n, m) for n, m, _, out in calls if id(out) == key and not isinstance(m, nn.Linear)]
        folds = [fold for name, norm in norms for fold in _norm_folds(name, norm, columns)]
        if not folds:
            earlier = list(linears)[: list(linears).index(names[0])]
            folds = [f for n in reversed(earlier) for f in _linear_folds(model, n, linears[n], columns)]
        kind = "/".join(name.rpartition(".")[2].removesuffix("_proj") for name in names)
        proposals.append(_Proposal(kind, tuple(f"{n}.weight" for n in names), columns, tuple(folds)))
    return proposals


def _norm_folds(name: str, norm: nn.Module, columns: int) -> Iterator[Fold]:
    parameters = dict(norm.named_parameters(recurse=False))
    if "weight" not in parameters or any(tuple(p.shape) != (columns,) for p in parameters.values()):
        return
    names = tuple(f"{name}.{key}" for key in parameters)
    yield Fold(names, 0, columns)
    if "bias" not in parameters:
        yield Fold(names, 0, columns, plus_one=True)


def _linear_folds(model: Any, name: str, linear: nn.Linear, columns: int) -> Iterator[Fold]:
    config = model.config
    names = tuple(f"{name}.{key}" for key, _ in linear.named_parameters(recurse=False))
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    values = (getattr(config, "num_key_value_heads", None) or config.num_attention_heads) * head
    rows = linear.out_features
    if rows in (columns, 2 * columns):
        yield from (Fold(names, offset, columns) for offset in range(0, rows, columns))
    if columns % values == 0 and rows in (values, columns + 2 * values):
        yield Fold(names, rows - values, values, repeat=columns // values, head=head)


def _first_that_holds(
    model: Any, proposal: _Proposal, folds: tuple[Fold, ...], probed: AbstractContextManager[Probe]
) -> Fold | None:
    with probed as run:
        return next((fold for fold in folds if _leaves_output(model, run, proposal, fold)), None)


def _leaves_output(model: Any, run: Probe, proposal: _Proposal, fold: Fold) -> bool:
    """Whether dividing the producer and multiplying the group's columns by random powers of two changes nothing."""
    generator = torch.Generator().manual_seed(0)
    exponents = torch.randint(-2, 3, (fold.rows,), generator=generator)
    before = run()
    parameters = dict(model.named_parameters())
    scales = torch.pow(2.0, exponents).to(before.device)
    with _restored([parameters[n] for n in (*proposal.names, *fold.parameters)]):
        for name in fold.parameters:
            parameters[name].copy_(fold.folded(parameters[name], scales))
        for name in proposal.names:
            parameters[name].mul_(fold.spread(scales).to(parameters[name].dtype))
        after = run()
    return bool((after - before).abs().max() <= _PROBE_TOLERANCE * before.abs().max())


@contextmanager
def _restored(parameters: list[nn.Parameter]) -> Iterator[None]:
    saved = [parameter.detach().clone() for parameter in parameters]
    with torch.inference_mode():
        try:
            yield
        finally:
            for parameter, value in zip(parameters, saved, strict=True):
                parameter.copy_(value)


@torch.inference_mode()
def probe(model: Any) -> Tensor:
    """The final hidden states [tokens, d_model] of a few fixed tokens, fp32."""
    tokens = probe_tokens(model, model.get_output_embeddings().weight.device)
    state: Tensor = model.base_model(input_ids=tokens, use_cache=False).last_hidden_state[0]
    return state.float()


def probe_tokens(model: Any, device: torch.device) -> Tensor:
    """The ids [1, tokens] of a few fixed tokens."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    tokens: Tensor = torch.arange(1, _PROBE_TOKENS + 1, device=device).mul(7919) % vocabulary
    return tokens.unsqueeze(0)


def _relative(fold: Fold, prefix: str) -> Fold:
    return _renamed(fold, tuple(name.removeprefix(prefix) for name in fold.parameters))


def _absolute(fold: Fold | None, prefix: str) -> Fold | None:
    return None if fold is None else _renamed(fold, tuple(prefix + name for name in fold.parameters))


def _renamed(fold: Fold, parameters: tuple[str, ...]) -> Fold:
    return Fold(parameters, fold.offset, fold.rows, fold.repeat, fold.head, fold.plus_one)

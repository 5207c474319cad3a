"""The linears that share an input, and what precedes them that can take a scale; by tracing, not by class.

One short forward pass records which matrices of a decoder layer were handed the very same tensor. What can take their
input's scales (a norm's gain, v_proj before o_proj, up_proj before down_proj) is proposed from shapes and accepted only
if folding random powers of two leaves the model's output unchanged. Powers of two make that test exact in any float
type, and a family that follows Llama's pattern needs no new line.

A layer's experts share one input, so what enters them is one group with whatever else is handed it; each expert's inner
matrix has an input of its own, and is a group by itself. The router, and a gate of a single row, stay in float: they
decide which experts run, and are a thousandth of the weights. Their columns are multiplied by the group's scales.
"""

from collections import Counter
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from qeval.errors import UsageError
from qeval.methods import FloatKind
from qeval.models.structure.float_kinds import kinds_of_products, kinds_of_rest
from qeval.models.structure.trace import (
    TensorKey,
    TracedCall,
    decoder_layers,
    key_of,
    layer_config,
    probe,
    shared_weight,
    trace,
)
from qeval.models.structure.weight_views import expert_name, is_expert, stack_of, stacks_of, weights_of

_PROBE_TOLERANCE = 1e-5


@dataclass(frozen=True)
class Fold:
    """The tensors that take the inverse of a group's input scales, and how their channels map to the group's.

    `parameters` are the producer's tensors that are divided (a norm's gain, or a linear's rows and bias). Rows
    `offset` to `offset + rows` of them carry the input; with grouped queries each run of `head` rows feeds `repeat`
    runs of the input's channels. Where queries, keys and values are fused head by head (GPT-NeoX), the runs of `head`
    rows begin `period` rows apart. `plus_one`: the gain is 1 + weight.
    """

    parameters: tuple[str, ...]
    offset: int
    rows: int
    repeat: int = 1
    head: int = 1
    plus_one: bool = False
    period: int = 0

    def tie(self, values: Tensor) -> Tensor:
        """Return `values` [columns] averaged over the input channels that one producer row feeds, [rows]."""
        return values.reshape(-1, self.repeat, self.head).mean(1).reshape(-1)

    def spread(self, values: Tensor) -> Tensor:
        """Return `values` [rows] as the input sees them, [columns]."""
        return values.reshape(-1, 1, self.head).expand(-1, self.repeat, -1).reshape(-1)

    def divisors(self, scales: Tensor, count: int) -> Tensor:
        """Return what each of the producer's `count` rows is divided by for `scales` [rows], fp32."""
        divisors = torch.ones(count, device=scales.device)
        if self.period:
            divisors[self.offset :].unfold(0, self.head, self.period).copy_(scales.reshape(-1, self.head))
        else:
            divisors[self.offset : self.offset + self.rows] = scales
        return divisors

    def carried(self, values: Tensor) -> Tensor:
        """Return those of a value for each of the producer's rows that belong to the input, [rows]."""
        rows = values[self.offset :]
        return rows.unfold(0, self.head, self.period).reshape(-1) if self.period else rows[: self.rows]

    def folded(self, tensor: Tensor, scales: Tensor) -> Tensor:
        """Return a producer tensor with its rows divided by `scales` [rows], in fp32 and back."""
        divisors = self.divisors(scales.float().to(tensor.device), len(tensor)).reshape(-1, *[1] * (tensor.dim() - 1))
        whole = tensor.float()
        return ((whole + 1) / divisors - 1 if self.plus_one else whole / divisors).to(tensor.dtype)


@dataclass(frozen=True)
class Group:
    """Linears (by weight name) that share an input of `columns` channels and are quantized together.

    `followers` share it too and stay in float. `entry`: the module that is handed the input where none of `names` sees
    all of it (a layer's experts).
    """

    layer: int
    kind: str
    names: tuple[str, ...]
    columns: int
    fold: Fold | None
    followers: tuple[str, ...] = ()
    entry: str | None = None

    @property
    def seen_at(self) -> str:
        """The weight or module whose input is the group's."""
        return self.entry or self.names[0]

    @property
    def is_one_expert(self) -> bool:
        """Return whether it is an expert's inner matrix, whose input is of the tokens routed to that expert."""
        return self.entry is None and len(self.names) == 1 and is_expert(self.names[0])

    @property
    def is_explicit(self) -> bool:
        """Return whether scales that nothing before takes can be applied to the input while running."""
        return not any(map(is_expert, self.names))


@dataclass(frozen=True)
class Description:
    """A model as the quantizers see it: its groups in the order of the computation, its layers, head, embedding.

    `float_kinds`: matrices of decoder layers that stay in float whatever a recipe says, by name (a stack's, where every
    one does). `in_turn`: whether layers, in one stack, run once each, with weights of their own: no loops, no ties.
    """

    groups: tuple[Group, ...]
    layers: tuple[str, ...]
    head: str
    embedding: str
    tied: bool
    float_kinds: Mapping[str, FloatKind] = field(default_factory=dict)
    in_turn: bool = True

    @property
    def units(self) -> tuple[Group, ...]:
        """Groups that are given their bits together: each by itself, but a layer's experts' inner matrices as one."""
        units: dict[str, Group] = {}
        for group in self.groups:
            key = stack_of(group.names[0])
            same = units.get(key)
            units[key] = replace(same, names=same.names + group.names, fold=None) if same else group
        return tuple(units.values())


Probe = Callable[[], Tensor]
"""A few fixed tokens through the model as its weights are now; what comes out of it, fp32."""
ProbedAt = Callable[[int], AbstractContextManager[Probe]]
"""What shows for a while whether a change of the weights of a decoder layer leaves its output unchanged."""


def describe_model(model: Any, *, folds: bool = True, probed_at: ProbedAt | None = None) -> Description:
    """Describe a model by tracing a few tokens.

    Args:
        model: A causal language model in eval mode.
        folds: Whether what can take input scales is looked for: that takes forward passes with changed weights.
        probed_at: For a model whose layers are not all in memory; by default the whole model is run.

    Raises:
        UsageError: No decoder layers, or no linears in them, are found.
    """
    layers = decoder_layers(model)
    names, traced = tuple(layers), trace(model, layers)
    probed = probed_at or (lambda _: nullcontext(lambda: probe(model)))
    experts = {name: len(stack) for name, stack in stacks_of(model).items()}

    patterns: dict[tuple[Any, ...], int | None] = {}
    groups: list[Group] = []
    kinds: dict[str, FloatKind] = {}

    # layers of one structure share the fold that was found for the first of them
    for layer, calls in enumerate(traced.calls):
        prefix = f"{names[layer]}."
        inside = {name: count for name, count in experts.items() if name.startswith(prefix)}
        config = layer_config(model, layer)
        in_float = kinds_of_products(model, config, calls, inside)
        proposals = _Layer(config, calls, inside, in_float).proposals()
        _qualify_kinds(proposals)
        structure = frozenset((stack_of(call.name).removeprefix(prefix), call.shape) for call in calls)
        for proposal in proposals:
            signature = (structure, proposal.signature(prefix))
            if signature not in patterns:
                tried = proposal.choices if folds else 0
                patterns[signature] = _first_valid_fold(model, proposal, probed(layer)) if tried else None
            groups += proposal.groups(layer, patterns[signature])
        kinds |= in_float

    if not groups:
        raise UsageError(f"No linear layers were found in the decoder layers of {type(model).__name__}.")
    modules = {id(module): name for name, module in model.named_modules()}
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    listed = (*kinds, *(name for group in groups for name in group.names))
    return Description(
        groups=tuple(groups),
        layers=names,
        head=f"{modules[id(head)]}.weight",
        embedding=f"{modules[id(embedding)]}.weight",
        tied=head.weight is embedding.weight,
        float_kinds=kinds | kinds_of_rest(model, names, listed),
        in_turn=traced.order == list(range(len(layers)))
        and len({name.rpartition(".")[0] for name in names}) == 1
        and shared_weight(layers) is None,
    )


@dataclass
class _Member:
    """One group of a proposal, with the folds that shapes allow."""

    names: list[str]
    followers: list[str] = field(default_factory=list)
    folds: list[Fold] = field(default_factory=list)


@dataclass
class _Proposal:
    """Groups of one kind that take the same fold: one, or one an expert."""

    columns: int
    members: list[_Member]
    entry: str | None = None
    parent: str = ""

    @property
    def choices(self) -> int:
        """The number of folds to choose from."""
        return min(len(member.folds) for member in self.members)

    @property
    def kind(self) -> str:
        """The last words of the names."""
        leaves = (stack_of(name.removesuffix(".weight")).rpartition(".")[2] for name in self.members[0].names)
        return self.parent + "/".join(dict.fromkeys(leaf.removesuffix("_proj") for leaf in leaves))

    def signature(self, prefix: str) -> tuple[Any, ...]:
        """Return what layers of one structure have in common."""
        folds = (replace(f, parameters=tuple(n.removeprefix(prefix) for n in f.parameters)) for f in self._folds())
        return self.kind, self.columns, tuple(folds)

    def groups(self, layer: int, choice: int | None) -> Iterator[Group]:
        """Yield the groups, with the fold that was chosen."""
        for member in self.members:
            fold = None if choice is None else member.folds[choice]
            names, followers = tuple(member.names), tuple(member.followers)
            yield Group(layer, self.kind, names, self.columns, fold, followers, self.entry)

    def _folds(self) -> Iterator[Fold]:
        return (fold for member in self.members for fold in member.folds)


class _Layer:
    """One decoder layer's calls, and what they say of its groups.

    `config`: the layer's. `experts`: how many each stack holds. `in_float`: matrices that stay so.
    """

    def __init__(
        self, config: Any, calls: Sequence[TracedCall], experts: dict[str, int], in_float: Container[str]
    ) -> None:
        self._config, self._calls, self._experts, self._in_float = config, calls, experts, in_float
        self._found: dict[TensorKey | str, _Proposal] = {}

    def proposals(self) -> list[_Proposal]:
        """Return the groups in the order in which their inputs appear."""
        seen: set[str] = set()
        for index, call in enumerate(self._calls):
            if call.shape is None or call.name in seen:  # one that runs twice is of the group of its first input
                continue
            if is_expert(call.name):
                self._add_expert(index, call)
                continue
            seen.add(call.name)
            if call.is_linear and call.name not in self._in_float:
                self._shared(index, call).names.append(call.name)
            else:
                self._shared(index, call).followers.append(call.name)
        return [proposal for proposal in self._found.values() if proposal.members[0].names]

    def _shared(self, index: int, call: TracedCall) -> _Member:
        """Return the group of what took the same tensor as `call`."""
        key, columns = key_of(call.input), call.input.shape[-1]
        assert key is not None
        if key not in self._found:
            norms = (
                c for c in self._calls[:index] if c.module is not None and c.shape is None and key_of(c.output) == key
            )
            folds = [fold for norm in norms for fold in _norm_folds(norm, columns)]
            folds = folds or [f for c in self._before(index) if not is_expert(c.name) for f in self._rows(c, columns)]
            self._found[key] = _Proposal(columns, [_Member([], folds=folds)])
        return self._found[key].members[0]

    def _add_expert(self, index: int, call: TracedCall) -> None:
        stack = stack_of(call.name)
        names = [expert_name(stack, expert) for expert in range(self._experts[stack])]
        if (entry := self._entry(call)) is not None:
            member = self._shared(index, entry)
            if names[0] not in member.names:
                member.names += names
                self._found[key_of(entry.input) or stack].entry = entry.name
        elif stack not in self._found:
            columns = call.input.shape[-1]
            inner = [self._inner(index, name, columns) for name in names]
            self._found[stack] = _Proposal(columns, inner)

    def _entry(self, call: TracedCall) -> TracedCall | None:
        """Return the call of the module that took the tokens of which this expert took some."""
        holder = stack_of(call.name).rpartition(".")[0]
        entered = next((c for c in self._calls if c.name == holder), None)
        if entered is None:
            return None
        tokens, some = entered.input, call.input
        if tokens.shape[-1] != some.shape[-1]:
            return None
        among = (some.reshape(-1, 1, some.shape[-1]) == tokens.reshape(1, -1, tokens.shape[-1])).all(-1).any(1)
        return entered if bool(among.all()) else None

    def _inner(self, index: int, name: str, columns: int) -> _Member:
        """Return an expert's inner matrix, after the stacks that were multiplied by before."""
        expert = name[len(stack_of(name)) :]
        before = {stack_of(c.name): c for c in self._before(index) if is_expert(c.name)}
        producers = (call._replace(name=f"{stack}{expert}") for stack, call in before.items())
        return _Member([name], folds=[fold for call in producers for fold in self._rows(call, columns)])

    def _before(self, index: int) -> list[TracedCall]:
        """Return the products before a call, the latest first."""
        return [c for c in reversed(self._calls[:index]) if c.shape and c.name not in self._in_float]

    def _rows(self, call: TracedCall, columns: int) -> Iterator[Fold]:
        return _linear_folds(self._config, call, columns)


def _qualify_kinds(proposals: Sequence[_Proposal]) -> None:
    """Put the module's name before kinds that several groups of a layer would have (GPT-2's two `c_proj`)."""
    counts = Counter(proposal.kind for proposal in proposals)
    for proposal in [proposal for proposal in proposals if counts[proposal.kind] > 1]:
        module = stack_of(proposal.members[0].names[0].removesuffix(".weight")).rpartition(".")[0]
        proposal.parent = module.rpartition(".")[2] + "."


def _norm_folds(norm: TracedCall, columns: int) -> Iterator[Fold]:
    assert norm.module is not None
    parameters = dict(norm.module.named_parameters(recurse=False))
    if "weight" not in parameters or any(tuple(p.shape) != (columns,) for p in parameters.values()):
        return
    names = tuple(f"{norm.name}.{key}" for key in parameters)
    yield Fold(names, 0, columns)
    if "bias" not in parameters:
        yield Fold(names, 0, columns, plus_one=True)


def _linear_folds(config: Any, call: TracedCall, columns: int) -> Iterator[Fold]:
    assert call.shape is not None
    rows, bias = call.shape[0], getattr(call.module, "bias", None) is not None
    names = (call.name, f"{call.name.removesuffix('weight')}bias") if bias else (call.name,)
    if rows in (columns, 2 * columns):
        yield from (Fold(names, offset, columns) for offset in range(0, rows, columns))
    if not (heads := getattr(config, "num_attention_heads", None)):  # every layer keeps a running state
        return
    head = getattr(config, "head_dim", None) or config.hidden_size // heads
    values = (getattr(config, "num_key_value_heads", None) or heads) * head
    if columns % values == 0 and rows in (values, columns + 2 * values):
        yield Fold(names, rows - values, values, repeat=columns // values, head=head)
    if rows == 3 * columns and columns % head == 0:
        yield Fold(names, 2 * head, columns, head=head, period=3 * head)


def _first_valid_fold(model: Any, proposal: _Proposal, probed: AbstractContextManager[Probe]) -> int | None:
    with probed as run:
        return next((n for n in range(proposal.choices) if _keeps_output(model, run, proposal, n)), None)


def _keeps_output(model: Any, run: Probe, proposal: _Proposal, choice: int) -> bool:
    """Return whether dividing the producers and multiplying the groups' columns by powers of two changes nothing."""
    generator = torch.Generator().manual_seed(0)
    before = run()
    weights = weights_of(model)
    folds = [member.folds[choice] for member in proposal.members]
    touched = [n for m, f in zip(proposal.members, folds, strict=True) for n in (*m.names, *m.followers, *f.parameters)]
    with _restored([weights[name] for name in touched]):
        for member, fold in zip(proposal.members, folds, strict=True):
            scales = torch.pow(2.0, torch.randint(-2, 3, (fold.rows,), generator=generator)).to(before.device)
            for name in fold.parameters:
                weights[name].copy_(fold.folded(weights[name], scales))
            for name in (*member.names, *member.followers):
                weights[name].mul_(fold.spread(scales).to(weights[name]))
        after = run()
    return bool((after - before).abs().max() <= _PROBE_TOLERANCE * before.abs().max())


@contextmanager
def _restored(tensors: list[Tensor]) -> Iterator[None]:
    saved = [tensor.detach().clone() for tensor in tensors]
    with torch.inference_mode():
        try:
            yield
        finally:
            for tensor, value in zip(tensors, saved, strict=True):
                tensor.copy_(value)

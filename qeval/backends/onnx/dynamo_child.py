"""torch's own exporter in a process of its own: `python -m qeval.backends.onnx.dynamo_child CHECKPOINT OUT`.

What the graph looks like is said in `dynamo`, which starts this process and passes on the last line of its stderr.
"""

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import onnx_ir as ir
import onnx_ir.passes.common
import onnxscript.optimizer
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from transformers import AutoModelForCausalLM
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer
from transformers.pytorch_utils import Conv1D

from qeval.backends.onnx.expert_nodes import (
    FLOAT_EXPERTS,
    INTERLEAVED,
    STACKS,
    FusedExperts,
    activation_of,
    expert_modules,
)
from qeval.errors import QevalError
from qeval.models.silence_transformers import quiet
from qeval.models.structure.forward import cache_arguments, returned_cache

OPSET = 21
BATCH, SEQUENCE, PAST, TOTAL = "batch_size", "sequence_length", "past_sequence_length", "total_sequence_length"

KeysValues = tuple[Tensor, Tensor]
"""A layer's keys and values, [batch, heads, tokens, size] each."""


def main() -> int:
    """Export the folder argv[1] to the folder argv[2]; 1 with one line on stderr if that fails."""
    try:
        export_graph(Path(sys.argv[1]), Path(sys.argv[2]))
    except Exception as error:  # noqa: BLE001 - whatever torch's exporter meets is told by the parent process
        print(_error_line(error), file=sys.stderr)  # noqa: T201
        return 1
    return 0


def export_graph(checkpoint: Path, out: Path) -> None:
    """Write `out`/model.onnx and model.onnx.data, the model of the folder `checkpoint` in fp32.

    Raises:
        QevalError: the model has experts that no node computes, keeps something else than keys and values, or has a
            size that is fixed.
        Exception: whatever torch's exporter stumbles on.
    """
    with quiet(), torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(
            checkpoint,
            dtype=torch.float32,
            use_safetensors=True,
            attn_implementation="eager",
            local_files_only=True,
            trust_remote_code=False,
        ).eval()
        layers = _cache_layers(model)
        reordered = _fuse_experts(model)
        _check_matrices(model)
        _turn_matrices(model)
        graph = _translated(_traced(model, layers), len(layers))
    onnxscript.optimizer.optimize_ir(graph, should_fold=_may_fold)
    _name_weights(graph.graph, _names(model))
    _name_sizes(graph.graph)
    ir.passes.common.ClearMetadataAndDocStringPass()(graph)
    _mark_experts(graph.graph, reordered)
    ir.save(graph, out / "model.onnx", external_data="model.onnx.data")


class TransposedLinear(nn.Module):
    """x @ weight + bias, the weight held as [inputs, outputs]: it reaches the graph as it is multiplied."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """`weight` [inputs, outputs] and `bias` [outputs] are taken as they are, not copied."""
        super().__init__()
        self.weight, self.bias = weight, bias

    def forward(self, states: Tensor) -> Tensor:
        """Return the product, [..., outputs]."""
        product = states @ self.weight
        return product if self.bias is None else product + self.bias


class PastLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer's keys and values from the first token on: what a sliding window leaves out is masked, not dropped.

    Nothing here branches on a length, which the trace would take for a constant.
    """

    is_sliding = False

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        """Keys and values of the past, [batch, heads, past, size] each; the past may be empty."""
        super().__init__()
        self.keys, self.values, self.is_initialized = keys, values, True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing: a layer is made with its keys and values."""

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> KeysValues:
        """Grow by the new tokens; all keys and values are returned."""
        self.keys = torch.cat([self.keys, key_states], dim=-2)
        self.values = torch.cat([self.values, value_states], dim=-2)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """Return the tokens held."""
        length: int = self.keys.shape[-2]
        return length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return how many keys a mask covers, and the position of the first."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """Return no maximum."""
        return -1


class WithPast(nn.Module):
    """A causal language model whose keys and values are plain inputs and outputs."""

    def __init__(self, model: Any) -> None:
        """`model` is called with a cache made of what `forward` is given."""
        super().__init__()
        self.model = model
        self._cache_arguments = cache_arguments(model.forward)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, past: list[KeysValues]
    ) -> tuple[Tensor, list[KeysValues]]:
        """Return the logits [batch, sequence, vocab], and each layer's keys and values with the new tokens'."""
        cache = Cache(layers=[PastLayer(keys, values) for keys, values in past])
        output = self.model(input_ids=input_ids, attention_mask=attention_mask, **self._cache_arguments(cache))
        return output.logits, [(layer.keys, layer.values) for layer in cache.layers]


def _fuse_experts(model: Any) -> frozenset[str]:
    """Replace each module of experts by a `FusedExperts`; return those whose rows lie in another order there."""
    fused = {
        name: FusedExperts(experts, activation_of(name, experts)) for name, experts in expert_modules(model).items()
    }
    for name, module in fused.items():
        model.set_submodule(name, module)
    return frozenset(name for name, module in fused.items() if module.is_reordered)


def _mark_experts(graph: ir.Graph, reordered: frozenset[str]) -> None:
    """Name the nodes of experts after their modules, and note which hold gate and up rows in turns."""
    for node in graph:
        if node.op_type == FLOAT_EXPERTS:
            stack = node.inputs[2]
            assert stack is not None and stack.name is not None
            node.name = stack.name.removesuffix(f".{STACKS[0]}")
            if node.name in reordered:
                node.metadata_props[INTERLEAVED] = "1"


def _check_matrices(model: Any) -> None:
    """Refuse many matrices in one tensor that nothing is known of."""
    for name, parameter in model.named_parameters():
        owner = model.get_submodule(name.rpartition(".")[0])
        if parameter.dim() > 2 and not isinstance(owner, nn.Conv1d | FusedExperts):
            shape = "x".join(map(str, parameter.shape))
            raise QevalError(f"{type(model).__name__} holds many matrices in one tensor ({name}, {shape})")


def _cache_layers(model: Any) -> list[KeysValues]:
    """Return each layer's keys and values, [1, heads, 1, size], as the model makes them for one token."""
    output = model(input_ids=torch.zeros(1, 1, dtype=torch.long), use_cache=True)
    layers = getattr(returned_cache(output), "layers", [])
    other = {type(layer).__name__ for layer in layers if not isinstance(layer, DynamicLayer)}
    if other or not layers:
        kept = ", ".join(sorted(other)) or "a state of its own"
        raise QevalError(f"{type(model).__name__} keeps {kept} where keys and values of every token are needed")
    return [(layer.keys, layer.values) for layer in layers]


def _turn_matrices(model: Any) -> None:
    """Replace each linear whose weight is its own by a `TransposedLinear`; a tied head keeps the embedding's layout."""
    uses = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and uses[id(module.weight)] == 1:
            turned = nn.Parameter(module.weight.t().contiguous(), requires_grad=False)
            model.set_submodule(name, TransposedLinear(turned, module.bias))
        elif type(module) is Conv1D:
            model.set_submodule(name, TransposedLinear(module.weight, module.bias))


def _traced(model: Any, layers: list[KeysValues]) -> ExportedProgram:
    """Return the model traced with all sizes but the widths left open; 2, 3 and 5 are told apart and mean nothing."""
    batch, sequence, past = 2, 3, 5
    tokens, mask = torch.zeros(batch, sequence, dtype=torch.long), torch.ones(batch, past + sequence, dtype=torch.long)
    keys_values = [tuple(part.new_zeros(batch, part.shape[1], past, part.shape[3]) for part in kv) for kv in layers]
    rows, of_past = Dim(BATCH), {0: Dim(BATCH), 2: Dim(PAST)}
    return torch.export.export(
        WithPast(model),
        (tokens, mask, keys_values),
        dynamic_shapes=({0: rows, 1: Dim(SEQUENCE)}, {0: rows, 1: Dim.DYNAMIC}, [(of_past, of_past)] * len(layers)),
        strict=False,
        prefer_deferred_runtime_asserts_over_guards=True,
    )


def _translated(exported: ExportedProgram, layers: int) -> ir.Model:
    program = torch.onnx.export(
        exported,
        dynamo=True,
        optimize=False,  # done below, where it leaves the embedding alone
        verbose=False,
        opset_version=OPSET,
        input_names=["input_ids", "attention_mask", *_cache_names("past_key_values", layers)],
        output_names=["logits", *_cache_names("present", layers)],
    )
    assert program is not None
    return program.model


def _cache_names(kind: str, layers: int) -> list[str]:
    return [f"{kind}.{layer}.{part}" for layer in range(layers) for part in ("key", "value")]


def _may_fold(node: ir.Node) -> bool | None:
    """Return whether to fold: a norm's 1 + weight, not a tied head's transpose; None: as the optimizer does."""
    given = [value for value in node.inputs if value is not None]
    if node.op_type == "Add" and all(value.shape is not None and value.shape.rank() <= 1 for value in given):
        return True
    return False if node.op_type == "Transpose" and len(given[0].uses()) > 1 else None


def _names(model: Any) -> dict[str, str]:
    """Return what each traced tensor is called: the first of its names, which for a tied head is the embedding's."""
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    first: dict[int, str] = {}
    for name, tensor in tensors:
        first.setdefault(id(tensor), name)
    return {f"model.{name}": first[id(tensor)] for name, tensor in tensors}


def _name_weights(graph: ir.Graph, names: dict[str, str]) -> None:
    """Give initializers the model's names, and each product the name of the linear whose weight it multiplies by."""
    for value in list(graph.initializers.values()):
        if value.name in names:
            value.name = names[value.name]
            for user, place in value.uses():
                if user.op_type == "MatMul" and place == 1:
                    user.name = value.name.removesuffix(".weight")


def _name_sizes(graph: ir.Graph) -> None:
    """Words in the place of the trace's symbols; what lies between inputs and outputs ONNX Runtime infers itself."""
    shapes = {value: _named(value) for value in (*graph.inputs, *graph.outputs)}
    for value in (*graph.inputs, *(value for node in graph for value in node.outputs)):
        value.shape = shapes.get(value)


def _named(value: ir.Value) -> ir.Shape:
    """Return the value's shape with the trace's symbols replaced by words, by what it is in the interface."""
    words = {
        "input_ids": (BATCH, SEQUENCE),
        "attention_mask": (BATCH, TOTAL),
        "logits": (BATCH, SEQUENCE, None),
        "past_key_values": (BATCH, None, PAST, None),
        "present": (BATCH, None, TOTAL, None),
    }[(value.name or "").partition(".")[0]]
    assert value.shape is not None
    for word, size in zip(words, value.shape, strict=True):
        if (word is None) != isinstance(size, int):
            raise QevalError(f"The graph has {value.shape} as {value.name}, where {word or 'a number'} was to be")
    return ir.Shape([size if word is None else word for word, size in zip(words, value.shape, strict=True)])


def _error_line(error: BaseException) -> str:
    """Return one line: the first that the innermost cause says."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = (line.strip() for line in str(error).splitlines())
    first = next((line.rstrip(".") for line in lines if line), "")
    return first if isinstance(error, QevalError) else f"{type(error).__name__}: {first}"


if __name__ == "__main__":
    sys.exit(main())

"""Facts of a folder with an ONNX decoder, whoever made it; read from the graph, never from names or claims.

The weights stay on the disk: onnx-ir maps external data, and only zero points are looked at.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import onnx_ir as ir

from qeval.backends.onnx.files import Files, content_files, data_folder, find_files, load_graph
from qeval.backends.onnx.matrices import GraphMatrix, Quantization, Stored, quantized_activations, stored_in
from qeval.errors import UsageError

_ATTENTION = (
    "GroupQueryAttention", "MultiHeadAttention", "Attention", "PagedAttention", "SparseAttention", "LinearAttention",
    "DecoderMaskedMultiHeadAttention", "Softmax",
)  # fmt: skip
"""Operators that attend; a plain graph has a Softmax instead."""
_NAMES = {
    "input_ids": "input_ids", "attention_mask": "attention_mask", "position_ids": "position_ids",
    "past_key_names": "past_key_values.%d.key", "past_value_names": "past_key_values.%d.value",
    "logits": "logits", "present_key_names": "present.%d.key", "present_value_names": "present.%d.value",
}  # fmt: skip
"""What inputs and outputs are called where genai_config.json doesn't say."""
_TYPES = {"FLOAT": "fp32", "FLOAT16": "fp16", "BFLOAT16": "bf16"}


_CONTEXT = ("context_length", "max_position_embeddings", "n_positions")
"""What configurations call it: onnxruntime-genai's, most, GPT-2's."""


@dataclass(frozen=True)
class Port:
    """An input or output of a graph: its type (`INT64`) and shape, a symbol's name where it varies, None unnamed."""

    name: str
    dtype: str
    shape: tuple[int | str | None, ...]


@dataclass(frozen=True)
class Ports:
    """A decoder's inputs and outputs by what they are for; the caches are pairs (key, value), layer by layer."""

    ids: Port
    mask: Port | None
    positions: Port | None
    past: tuple[tuple[Port, Port], ...]
    logits: Port
    present: tuple[tuple[Port, Port], ...]
    other_inputs: tuple[Port, ...]
    """Inputs that a language model's tokens don't determine."""


@dataclass(frozen=True)
class OnnxFacts:
    """The facts of an ONNX folder."""

    files: Files
    contents: tuple[Path, ...]
    """All files that decide what it computes: configuration, graph, external data."""
    data_folder: Path
    """The folder that holds what the graph's file doesn't: its own, or where links lead (the hub's `blobs`)."""
    producer: str
    """Who wrote the graph, with the version: `onnxruntime-genai 0.18.0`."""
    model_type: str | None
    vocab_size: int | None
    context_length: int | None
    head_size: int | None
    """Width of a head in the caches, which the graph itself may leave open."""
    ports: Ports
    matrices: tuple[GraphMatrix, ...]
    attention: Mapping[str, int]
    """Attention operators and how many there are."""
    windows: Mapping[int, int]
    """Sizes of sliding windows in GroupQueryAttention, in tokens, and how many layers have each."""
    windowed_caches: int
    """Layers whose cache holds no more than the window (`sliding_window_cache`), so that empty past inputs fail."""
    integer_caches: Mapping[str, int]
    """Forms of keys and values that are kept as integers, in words, and how many layers have each."""
    quantized_activations: int
    """Nodes that round activations to integers in the graph."""
    size_bytes: int
    """All initializers as stored."""

    @property
    def quantized(self) -> tuple[GraphMatrix, ...]:
        """The quantized matrices."""
        return tuple(matrix for matrix in self.matrices if matrix.quantization is not None)

    @property
    def kept(self) -> tuple[tuple[GraphMatrix, str], ...]:
        """The matrices in floats, each with the reason."""
        floats = (matrix for matrix in self.matrices if matrix.quantization is None)
        return tuple((matrix, _reason(matrix)) for matrix in floats)

    @property
    def head(self) -> GraphMatrix | None:
        """The matrix that makes the logits."""
        return next((matrix for matrix in self.matrices if matrix.role == "head"), None)

    @property
    def embedding(self) -> GraphMatrix | None:
        """The matrix that token ids are looked up in."""
        return next((matrix for matrix in self.matrices if matrix.role == "embedding"), None)

    @property
    def bits_per_weight(self) -> float | None:
        """Stored bits, padding, scales and zero points included, per quantized weight; None without any.

        A matrix that the head and the embedding share counts once.
        """
        own = {matrix.weight: matrix for matrix in self.quantized}.values()
        weights = sum(matrix.parameters for matrix in own)
        return 8 * sum(matrix.size_bytes for matrix in own) / weights if weights else None

    @property
    def gives_last_position_only(self) -> bool:
        """Return whether the logits are of the last position alone, as far as the graph's shapes say."""
        shape = self.ports.logits.shape
        return len(shape) < 3 or shape[1] == 1

    @property
    def weights(self) -> str:
        """The storage of the matrices, the commonest first: `5 x MatMulNBits: 4 bits, ...; 2 x MatMul: fp32`."""
        own = {matrix.weight: matrix for matrix in self.matrices}.values()
        kinds = Counter(f"{matrix.op}: {_how_held(matrix)}" for matrix in own)
        return "; ".join(f"{count} x {kind}" for kind, count in kinds.most_common())

    def describe(self) -> list[str]:
        """Return what a reader should know, a sentence each."""
        return list(_sentences(self))


class Parsed(NamedTuple):
    """A folder whose graph is in memory: what it holds, its graph, and where the numbers of its matrices are."""

    facts: OnnxFacts
    graph: ir.Graph
    stored: tuple[Stored, ...]


def inspect_folder(folder: Path, *, needs_tokenizer: bool = True) -> OnnxFacts:
    """Return what a decoder's folder holds; the graph is read and its external data only measured.

    Raises:
        UsageError: as `find_files` and `load_graph`; or the graph is no decoder of token ids.
    """
    return parse_folder(folder, needs_tokenizer=needs_tokenizer).facts


def parse_folder(folder: Path, *, needs_tokenizer: bool = True) -> Parsed:
    """Return what a decoder's folder holds, with its graph.

    Raises:
        UsageError: as `inspect_folder`.
    """
    files = find_files(folder, needs_tokenizer=needs_tokenizer)
    model = load_graph(files.model)
    try:
        ports = _ports(files, model.graph)
        stored = stored_in(model.graph, ports.ids.name, ports.logits.name)
        return Parsed(_facts(files, model, ports, stored), model.graph, stored)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise UsageError(f"{files.model} breaks the rules of its operators ({error}): export it again.") from error


def _facts(files: Files, model: ir.Model, ports: Ports, stored: Iterable[Stored]) -> OnnxFacts:
    settings, decoder = files.settings, files.decoder
    attending = [node for node in model.graph.all_nodes() if node.op_type in _ATTENTION]
    grouped = [node.attributes for node in attending if node.op_type == "GroupQueryAttention"]
    windows = Counter(size for each in grouped if (size := _number(each, "local_window_size", -1)) > 0)
    return OnnxFacts(
        files=files,
        contents=content_files(files, model),
        data_folder=data_folder(files.model, model),
        producer=" ".join(part for part in (model.producer_name, model.producer_version) if part) or "unknown",
        model_type=settings.get("type", settings.get("model_type")),
        vocab_size=settings.get("vocab_size"),
        context_length=next((settings[name] for name in _CONTEXT if name in settings), None),
        head_size=decoder.get("head_size") or _head_size(settings),
        ports=ports,
        matrices=tuple(each.matrix for each in stored),
        attention=_attention(attending),
        windows=dict(sorted(windows.items())),
        windowed_caches=sum(_number(each, "sliding_window_cache", 0) for each in grouped),
        integer_caches=Counter(filter(None, map(_integer_cache, grouped))),
        quantized_activations=quantized_activations(model.graph),
        size_bytes=_size_bytes(model),
    )


def _integer_cache(attributes: Mapping[str, Any]) -> str | None:
    """Return how a GroupQueryAttention keeps its keys and values, or None for floats."""
    if not (bits := _number(attributes, "kv_cache_bit_width", 0)):
        return None
    spans = (attributes[name].as_string() for name in ("k_quant_type", "v_quant_type") if name in attributes)
    return f"{bits} bits, " + ", ".join(
        dict.fromkeys(f"a scale {each.lower().replace('per_', 'a ')}" for each in spans)
    )


def _attention(nodes: Iterable[ir.Node]) -> dict[str, int]:
    counts = Counter(node.op_type for node in nodes)
    if len(counts) > 1:
        del counts["Softmax"]  # of a router or a sampler, not of attention
    return dict(counts)


def _ports(files: Files, graph: ir.Graph) -> Ports:
    named = {**_NAMES, **files.decoder.get("inputs", {}), **files.decoder.get("outputs", {})}
    inputs = {value.name or "": _port(value) for value in graph.inputs if value.name not in graph.initializers}
    outputs = {value.name or "": _port(value) for value in graph.outputs}
    ids, logits = inputs.get(named["input_ids"]), outputs.get(named["logits"])
    if ids is None:
        raise UsageError(
            f"{files.model} takes no '{named['input_ids']}' but {_listed(inputs)}: export it with token ids."
        )
    if logits is None:
        raise UsageError(f"{files.model} gives no '{named['logits']}' but {_listed(outputs)}: export it with its head.")
    past = _pairs(inputs, named["past_key_names"], named["past_value_names"])
    mask, positions = inputs.get(named["attention_mask"]), inputs.get(named["position_ids"])
    known = {ids, mask, positions, *(port for pair in past for port in pair)}
    present = _pairs(outputs, named["present_key_names"], named["present_value_names"])
    other = tuple(port for port in inputs.values() if port not in known)
    return Ports(ids, mask, positions, past, logits, present, other)


def _pairs(ports: Mapping[str, Port], key_pattern: str, value_pattern: str) -> tuple[tuple[Port, Port], ...]:
    """Return the ports of patterns such as `present.%d.key`, in the order of their layers."""
    expression = re.compile(re.escape(key_pattern).replace("%d", r"(\d+)"))
    layers = sorted(int(match[1]) for name in ports if (match := expression.fullmatch(name)))
    return tuple(
        (ports[key_pattern.replace("%d", str(layer))], ports[value])
        for layer in layers if (value := value_pattern.replace("%d", str(layer))) in ports
    )  # fmt: skip


def _port(value: ir.Value) -> Port:
    shape = () if value.shape is None else value.shape
    sizes = tuple(size if isinstance(size, int) else size.value for size in shape)
    return Port(value.name or "", "" if value.dtype is None else value.dtype.name, sizes)


def _listed(ports: Mapping[str, Port]) -> str:
    names = [name for name in ports if not re.search(r"\d", name)] or list(ports)
    return ", ".join(f"'{name}'" for name in names[:5])


def _number(attributes: Mapping[str, Any], name: str, default: int) -> int:
    attribute = attributes.get(name)
    return default if attribute is None else int(attribute.as_int())


def _head_size(config: Mapping[str, Any]) -> int | None:
    if config.get("head_dim"):
        return int(config["head_dim"])
    width, heads = config.get("hidden_size"), config.get("num_attention_heads")
    return width // heads if width and heads else None


def _size_bytes(model: ir.Model) -> int:
    """Return the bytes of all initializers, those that lie in the same place of a file once."""
    found: dict[tuple[Any, ...], int] = {}
    for graph in model.graphs():
        for value in graph.initializers.values():
            tensor = value.const_value
            if tensor is not None:
                place = (tensor.location, tensor.offset) if isinstance(tensor, ir.ExternalTensor) else (id(tensor),)
                found[place] = int(tensor.nbytes)
    return sum(found.values())


def _reason(matrix: GraphMatrix) -> str:
    return matrix.role if matrix.role != "body" else f"left in {_type(matrix)} by the exporter"


def _type(matrix: GraphMatrix) -> str:
    return _TYPES.get(matrix.dtype, matrix.dtype.lower())


def _sentences(facts: OnnxFacts) -> Iterator[str]:
    attention = ", ".join(f"{count} {op}" for op, count in facts.attention.items()) or "no attention operator"
    yield f"{facts.files.model.name} was made by {facts.producer}: {attention}, {facts.size_bytes:,} bytes of weights."
    yield from _quantized_sentences(facts)
    for part, matrix in (("head", facts.head), ("embedding", facts.embedding)):
        if matrix is not None:
            yield f"The {part} is {_how(matrix)}."
    left = [matrix for matrix, _ in facts.kept if matrix.role == "body"]
    if left and facts.quantized:
        yield f"{len(left)} matrices of the body are floats: {', '.join(matrix.node for matrix in left[:3])} ..."
    if facts.quantized_activations:
        yield f"{facts.quantized_activations} nodes round activations to integers in the graph."
    for form, count in facts.integer_caches.items():
        yield f"{count} layers keep keys and values as integers: {form}."
    for size, count in facts.windows.items():
        yield f"{count} layers attend to a window of {size} tokens."
    if facts.windowed_caches:
        yield f"{facts.windowed_caches} layers cache no more than their window, so no empty past can be given."


def _quantized_sentences(facts: OnnxFacts) -> Iterator[str]:
    body = [matrix for matrix in facts.matrices if matrix.role == "body"]
    kinds = Counter((matrix.op, matrix.quantization) for matrix in body if matrix.quantization is not None)
    for (op, how), count in kinds.items():
        yield f"{count} of {len(body)} matrices of the body are {op}: {_spelled(how)}."
    if any(op == "DequantizeLinear" for op, _ in kinds):
        yield "A DequantizeLinear has no accuracy level of its own: the session sets that of the kernel it fuses to."
    if facts.bits_per_weight is not None:
        yield f"That is {facts.bits_per_weight:.3f} bits per quantized weight, scales and zero points included."
    else:
        yield "No matrix is quantized."


def _how(matrix: GraphMatrix) -> str:
    if matrix.quantization is None:
        return f"in {_type(matrix)}"
    return f"quantized ({matrix.op}: {_spelled(matrix.quantization)})"


def _how_held(matrix: GraphMatrix) -> str:
    return _type(matrix) if matrix.quantization is None else _spelled(matrix.quantization)


def _spelled(how: Quantization) -> str:
    shared = f"blocks of {how.block}" if how.block else f"a scale a {how.granularity}"
    words = [f"{how.bits} bits", shared, "symmetric" if how.symmetric else "asymmetric"]
    if how.accuracy_level is not None:
        words.append(f"accuracy level {how.accuracy_level}")
    return ", ".join(words) + (" (activations in int8)" if how.accuracy_level == 4 else "")

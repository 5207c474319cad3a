"""An ONNX folder as users have it: opened on a provider, whoever made it."""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from qeval.backends.onnx.decoder import Decoder, read_decoder
from qeval.backends.onnx.files import CONFIG, load_graph
from qeval.backends.onnx.inspection import OnnxFacts, inspect_folder
from qeval.backends.onnx.packages import import_runtime
from qeval.backends.onnx.providers import Assignment, Provider, open_session, recorded_assignment
from qeval.backends.onnx.session import OrtSession
from qeval.errors import UsageError

_WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"
QDQ_LEVEL = "session.qdq_matmulnbits_accuracy_level"


@dataclass(frozen=True, eq=False)
class Opened:
    """A session on a folder, and which provider got which nodes of it."""

    session: OrtSession
    assignment: Assignment
    decoder: Decoder


@contextmanager
def opened(folder: Path, provider: Provider, *, threads: int, device_id: int = 0) -> Iterator[Opened]:
    """The folder's model on `provider`; its memory is let go when the block ends.

    Raises:
        UsageError: the folder or the graph can't be used.
        QevalError: ONNX Runtime refuses it, or nodes fell back to another provider.
    """
    facts = inspect_folder(folder, needs_tokenizer=False)
    if facts.context_length is None:
        raise UsageError(f"{facts.files.config} names no context length, so nothing can be scored safely.")
    decoder = read_decoder(facts)
    entries = {**session_entries(facts), _WEIGHTS_FOLDER: str(facts.files.model.parent)}
    body = open_session(decoder.body, provider, threads=threads, entries=entries, device_id=device_id)
    head = open_session(decoder.head, provider, threads=threads, entries=entries, device_id=device_id)
    place = _place(provider, device_id)
    runtime = import_runtime()

    def value_of(array: Any) -> Any:
        return runtime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array), *place)

    session = OrtSession(decoder, body, head, value_of, facts.context_length, rope_limit=_rope_limit(facts))
    session.find_sharing()
    yield Opened(session, _both(recorded_assignment(body), recorded_assignment(head)), decoder)


def session_entries(facts: OnnxFacts) -> dict[str, str]:
    """The session configuration entries that a folder's genai_config.json asks for, or its config.json without one."""
    options = (facts.files.decoder or facts.files.settings).get("session_options", {})
    return {key: str(value) for key, value in options.items() if key.startswith("session.")}


def _rope_limit(facts: OnnxFacts) -> float:
    """The length beyond which LongRoPE takes other frequencies, where the graph or a config.json tells; else infinite.

    The model builder's graphs choose by an If on the length; those of torch's exporter compute the choice.
    """
    conditions = [node.inputs[0] for node in load_graph(facts.files.model).graph if node.op_type == "If"]
    switches = [condition.producer() for condition in conditions if condition is not None]
    lengths = [switch.inputs[1] for switch in switches if switch is not None and switch.op_type == "Greater"]
    return min([_rope_limit_told(facts.files.folder), *(_constant(length) for length in lengths)])


def _constant(value: ir.Value | None) -> float:
    """A scalar that a graph holds; infinite where it computes it."""
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    return math.inf if tensor is None or tensor.size != 1 else float(tensor.numpy().item())


def _rope_limit_told(folder: Path) -> float:
    file = folder / CONFIG
    config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    ropes = (config.get("rope_parameters"), config.get("rope_scaling"))
    kinds = {rope.get("rope_type") or rope.get("type") for rope in ropes if rope}
    if not kinds & {"longrope", "su"}:
        return math.inf
    told = [place.get("original_max_position_embeddings") for place in (config, *ropes) if place]
    return min(filter(None, told), default=math.inf)


def _place(provider: Provider, device_id: int) -> tuple[str, int]:
    """Where values live: CUDA's own memory for its providers, else the host's."""
    return ("cuda", device_id) if provider.name in ("cuda", "tensorrt") else ("cpu", 0)


def _both(body: Assignment, head: Assignment) -> Assignment:
    keys = sorted({*body.counts, *head.counts})
    return Assignment({key: body.counts.get(key, 0) + head.counts.get(key, 0) for key in keys})

"""What an ONNX folder's configuration asks of the session that it is opened in; torch is not needed for it."""

import json
import math
from pathlib import Path

import onnx_ir as ir

from qeval.backends.onnx.files import CONFIG, load_graph
from qeval.backends.onnx.inspection import OnnxFacts
from qeval.backends.onnx.providers import Provider

QDQ_LEVEL = "session.qdq_matmulnbits_accuracy_level"
_WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"


def session_entries(facts: OnnxFacts) -> dict[str, str]:
    """The session configuration entries that a folder's genai_config.json asks for, or its config.json without one.

    The last of them says where the weights of a graph lie that is given as bytes.
    """
    options = (facts.files.decoder or facts.files.settings).get("session_options", {})
    asked = {key: str(value) for key, value in options.items() if key.startswith("session.")}
    return {**asked, _WEIGHTS_FOLDER: str(facts.data_folder)}


def rope_limit(facts: OnnxFacts) -> float:
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


def place_of(provider: Provider, device_id: int) -> tuple[str, int]:
    """Where values live: CUDA's own memory for its providers, else the host's."""
    return ("cuda", device_id) if provider.name in ("cuda", "tensorrt") else ("cpu", 0)

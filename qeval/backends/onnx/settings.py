"""Session settings that an ONNX folder's configuration asks for; torch is not needed for them."""

import math
from collections.abc import Mapping
from pathlib import Path

import onnx_ir as ir

from qeval.backends.onnx.files import CONFIG, load_graph
from qeval.backends.onnx.inspection import OnnxFacts
from qeval.backends.onnx.providers import Provider
from qeval.errors import UsageError
from qeval.parsing import load_object, one_sentence

QDQ_LEVEL = "session.qdq_matmulnbits_accuracy_level"
_WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"


def session_entries(facts: OnnxFacts) -> dict[str, str]:
    """Return the session's configuration entries of a folder's genai_config.json, or of its config.json without one.

    The last of them says where the weights of a graph lie that is given as bytes.
    """
    options = (facts.files.decoder or facts.files.settings).get("session_options", {})
    if not isinstance(options, Mapping):
        raise UsageError(f"{facts.files.config} has session_options that are no settings: copy or export it again.")
    asked = {key: str(value) for key, value in options.items() if key.startswith("session.")}
    return {**asked, _WEIGHTS_FOLDER: str(facts.data_folder)}


def onnx_rope_limit(facts: OnnxFacts) -> float:
    """Return the length beyond which LongRoPE takes other frequencies, where graph or config.json tells; else infinite.

    The model builder's graphs choose by an If on the length; those of torch's exporter compute the choice.
    """
    graph = load_graph(facts.files.model).graph
    with one_sentence(f"{facts.files.model} breaks the rules of its operators", after="Export it again."):
        conditions = [node.inputs[0] for node in graph if node.op_type == "If"]
        switches = [condition.producer() for condition in conditions if condition is not None]
        lengths = [switch.inputs[1] for switch in switches if switch is not None and switch.op_type == "Greater"]
        limits = [_constant(length) for length in lengths]
    return min([_stated_rope_limit(facts.files.folder), *limits])


def _constant(value: ir.Value | None) -> float:
    """Return a scalar that a graph holds; infinite where it computes it."""
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    return math.inf if tensor is None or tensor.size != 1 else float(tensor.numpy().item())


def _stated_rope_limit(folder: Path) -> float:
    file = folder / CONFIG
    config = load_object(file) if file.is_file() else {}
    ropes = [rope for name in ("rope_parameters", "rope_scaling") if isinstance(rope := config.get(name), dict)]
    kinds = {str(rope.get("rope_type") or rope.get("type")) for rope in ropes}
    if not kinds & {"longrope", "su"}:
        return math.inf
    told = [place.get("original_max_position_embeddings") for place in (config, *ropes)]
    return min((length for length in told if isinstance(length, int) and length > 0), default=math.inf)


def place_of(provider: Provider, device_id: int) -> tuple[str, int]:
    """Return where values live: CUDA's own memory for its providers, else the host's."""
    return ("cuda", device_id) if provider.name in ("cuda", "tensorrt") else ("cpu", 0)

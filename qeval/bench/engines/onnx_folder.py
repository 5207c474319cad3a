"""The ONNX folder that an engine runs: the user's own, or one exported once and kept in the cache.

This is what needs torch, transformers and the exporters; it runs before, and apart from, the process that is measured.
"""

from pathlib import Path

from qeval.backends.onnx.decoder import serialized
from qeval.backends.onnx.export import EXPORT_VERSION, ExportTarget, OnnxExporter
from qeval.backends.onnx.files import GENAI_CONFIG, load_graph
from qeval.backends.onnx.insert_weights import Style
from qeval.backends.onnx.providers import choose_provider, open_session, require_provider
from qeval.backends.onnx.settings import session_entries
from qeval.bench.engines.engine_spec import EngineSpec
from qeval.bench.engines.onnxruntime import device_id_of, facts_of
from qeval.errors import UsageError
from qeval.identity import digest
from qeval.models.checkpoint.cache import build_once
from qeval.models.load import load_model
from qeval.models.onnx_layout import is_onnx, onnx_folder
from qeval.models.structure.graph import describe_model
from qeval.store.variants import load_variant


def prepare_onnx_folder(spec: EngineSpec) -> Path:
    """Return the folder of a spec's variant or float model for `onnxruntime`.

    Raises:
        UsageError: the provider isn't there, or the precision is none that graphs are written in.
        QevalError: no exporter takes the model, or the graph has no place for the variant.
    """
    require_provider(choose_provider(spec.provider), device_id_of(spec.device))
    return _own(spec) or _exported(spec, "auto")


def prepare_genai(spec: EngineSpec) -> Path:
    """Return the same for `onnxruntime-genai`, which takes the model builder's graphs alone.

    It doesn't say on which provider a node runs, so for others than the CPU ONNX Runtime is tried here, once.

    Raises:
        UsageError: as `prepare_onnx_folder`; or the folder has no genai_config.json.
        QevalError: as `prepare_onnx_folder`; or nodes would fall back to another provider.
    """
    provider, device_id = choose_provider(spec.provider), device_id_of(spec.device)
    require_provider(provider, device_id)
    folder = _own(spec) or _exported(spec, "genai")
    if not (folder / GENAI_CONFIG).is_file():
        raise UsageError(f"'{folder}' has no {GENAI_CONFIG}, without which onnxruntime-genai opens nothing.")
    if provider.name != "cpu":
        facts = facts_of(folder)
        graph = serialized(load_graph(facts.files.model))
        open_session(graph, provider, threads=spec.threads, entries=session_entries(facts), device_id=device_id)
    return folder


def _own(spec: EngineSpec) -> Path | None:
    """Return the variant where it is an ONNX folder already."""
    variant = spec.variant
    if variant is None:
        return None
    if is_onnx(variant):
        return onnx_folder(variant)
    if not variant.is_dir():
        raise UsageError(f"'{variant}' is no folder; ONNX Runtime opens ONNX folders and qeval's own variants.")
    return None


def _exported(spec: EngineSpec, exporter_name: str) -> Path:
    loaded = load_model(spec.model)
    description = describe_model(loaded.model)
    names = [name for group in description.groups for name in group.names] + [description.head]
    exporter = OnnxExporter(loaded, names, exporter_name, spec.threads, _target(spec))
    source = exporter.float_folder()
    if spec.variant is None:
        return source
    variant, style = load_variant(spec.variant), Style(accuracy_level=spec.accuracy_level)
    made_from = {"export": EXPORT_VERSION, "float": source.name, "variant": variant.key, **vars(style)}
    name = f"onnx-variant-{digest(made_from)[:16]}"
    return build_once(name, (), lambda folder: exporter.write(variant, style, folder / "model")) / "model"


def _target(spec: EngineSpec) -> ExportTarget:
    """Return what graphs are exported for: on a CPU fp32, in which weights of half precision are exact."""
    if spec.provider == "cpu":
        return ExportTarget()
    if spec.precision == "bf16":
        raise UsageError("ONNX graphs are written in fp32 or fp16, not in bf16; take --precision fp16.")
    return ExportTarget(spec.provider, spec.precision)

"""The ONNX folder that an engine runs: the user's own, or one exported once and kept in the cache.

This is what needs torch, transformers and the exporters; it runs before, and apart from, the process that is measured.
"""

from pathlib import Path

from qeval.backends.onnx.decoder import serialized
from qeval.backends.onnx.export import EXPORT_VERSION, Exporter, Target
from qeval.backends.onnx.files import GENAI_CONFIG, load_graph
from qeval.backends.onnx.providers import choose, open_session, require_provider
from qeval.backends.onnx.settings import session_entries
from qeval.backends.onnx.swap import Style
from qeval.engines.onnxruntime import device_id_of, facts_of
from qeval.engines.opening import Opening
from qeval.errors import UsageError
from qeval.identity import digest
from qeval.models.cache import build_once
from qeval.models.graph import describe
from qeval.models.load import load
from qeval.store.variants import load_variant


def prepare(opening: Opening) -> Path:
    """The folder of an opening's variant, or of its float model, for `onnxruntime`.

    Raises:
        UsageError: the provider isn't there, or the precision is none that graphs are written in.
        QevalError: no exporter takes the model, or the graph has no place for the variant.
    """
    require_provider(choose(opening.provider), device_id_of(opening.device))
    return _own(opening) or _exported(opening, "auto")


def prepare_genai(opening: Opening) -> Path:
    """The same for `onnxruntime-genai`, which takes the model builder's graphs alone.

    It doesn't tell which provider a node was given, so on others than the CPU ONNX Runtime is asked here, once.

    Raises:
        UsageError: as `prepare`; or the folder has no genai_config.json.
        QevalError: as `prepare`; or nodes would fall back to another provider.
    """
    provider, device_id = choose(opening.provider), device_id_of(opening.device)
    require_provider(provider, device_id)
    folder = _own(opening) or _exported(opening, "genai")
    if not (folder / GENAI_CONFIG).is_file():
        raise UsageError(f"'{folder}' has no {GENAI_CONFIG}, without which onnxruntime-genai opens nothing.")
    if provider.name != "cpu":
        facts = facts_of(folder)
        graph = serialized(load_graph(facts.files.model))
        open_session(graph, provider, threads=opening.threads, entries=session_entries(facts), device_id=device_id)
    return folder


def _own(opening: Opening) -> Path | None:
    """The variant where it is an ONNX folder already."""
    variant = opening.variant
    if variant is not None and not variant.is_dir():
        raise UsageError(f"'{variant}' is no folder; ONNX Runtime opens ONNX folders and qeval's own variants.")
    return variant if variant is not None and any(variant.glob("*.onnx")) else None


def _exported(opening: Opening, asked: str) -> Path:
    loaded = load(opening.model)
    description = describe(loaded.model)
    names = [name for group in description.groups for name in group.names] + [description.head]
    exporter = Exporter(loaded, names, asked, opening.threads, _target(opening))
    source = exporter.float_folder()
    if opening.variant is None:
        return source
    variant, style = load_variant(opening.variant), Style(accuracy_level=opening.accuracy_level)
    made_from = {"export": EXPORT_VERSION, "float": source.name, "variant": variant.key, **vars(style)}
    name = f"onnx-variant-{digest(made_from)[:16]}"
    return build_once(name, (), lambda folder: exporter.write(variant, style, folder / "model")) / "model"


def _target(opening: Opening) -> Target:
    """What graphs are made for: on a CPU fp32, in which weights of half precision are exact."""
    if opening.provider == "cpu":
        return Target()
    if opening.precision == "bf16":
        raise UsageError("ONNX graphs are written in fp32 or fp16, not in bf16; take --precision fp16.")
    return Target(opening.provider, opening.precision)

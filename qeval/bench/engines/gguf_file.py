"""The GGUF file that llama.cpp's engine opens."""

from pathlib import Path

from qeval.backends.llamacpp.gguf_writer import written
from qeval.bench.engines.engine_spec import EngineSpec
from qeval.models.load import load_model
from qeval.store.variants import load_variant


def prepare_gguf(spec: EngineSpec) -> Path:
    """Return the GGUF file of a spec's variant or float model: the user's own, or one that is written once and cached.

    Raises:
        UsageError: the model is of another family, or the variant is one that a GGUF can't hold.
        QevalError: the cache can't be written.
    """
    if spec.variant is not None and spec.variant.suffix == ".gguf":
        return spec.variant
    variant = None if spec.variant is None else load_variant(spec.variant)
    return written(load_model(spec.model), variant, spec.precision)

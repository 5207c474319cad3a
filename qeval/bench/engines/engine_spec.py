"""The specification of an engine in plain values: it crosses to the process that the engine runs in."""

from dataclasses import dataclass
from pathlib import Path

from qeval.models.source import ModelSource
from qeval.types import FloatType


@dataclass(frozen=True)
class EngineSpec:
    """One model, one variant of it, and where and how large it is to run.

    `variant` is a folder that `store.variants` wrote, an ONNX folder, a GGUF file, or None for the float model; an
    engine refuses what it can't open. `precision` is the type of the float model's weights (on a CPU fp16 weights are
    computed in fp32), and of what a variant leaves in float. `device` is torch's (`cpu`, `cuda:0`), `provider` is
    ONNX Runtime's by our name (`backends.onnx.providers.PROVIDERS`). `batch` and `capacity` are the largest that will
    be asked of `Engine.reset`. `accuracy_level` is MatMulNBits's: 1 for fp32 activations, 4 for int8 in the product.
    """

    model: ModelSource
    variant: Path | None
    precision: FloatType = "fp32"
    device: str = "cpu"
    provider: str = "cpu"
    threads: int = 1
    batch: int = 1
    capacity: int = 512
    accuracy_level: int = 4

"""The noise floor of half precision: the baseline in fp32, with the rounding that variants are computed with."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from qeval.backends.base import Session, Target
from qeval.compare.loading import loaded_model
from qeval.compare.plan import Plan
from qeval.models.device import free_bytes
from qeval.models.device_map import devices_of
from qeval.models.structure.precision import with_rounding, with_tf32
from qeval.progress import Progress
from qeval.quantize.build import quantizable

EXACT_DTYPE = "float32"
"""The type that it is computed in."""


@dataclass(frozen=True, eq=False)
class ExactBackend:
    """Opens the plan's baseline in fp32, where all else is computed in bf16 or fp16."""

    plan: Plan
    name = "torch"
    fake_quantizes = True
    warnings = ()

    def identity(self, target: Target) -> dict[str, Any]:
        """Return the weights' identity in fp32, and that of the baseline whose rounding they have."""
        return {"weights": self.plan.key_in(EXACT_DTYPE), "against": self.plan.baseline_key, "rounded": 1}

    def prepare(self, progress: Progress) -> None:
        """Do nothing: the weights are read when they are opened."""

    def describe(self, session: Session, target: Target) -> None:
        """Return None: the run's environment says how torch runs."""

    @contextmanager
    def open(self, target: Target) -> Iterator[Session]:
        """Open the baseline in fp32, its quantizable weights rounded as a variant's are.

        It is streamed where the device has no room for it beside the model that is there.
        """
        plan = self.plan
        choice, device = replace(plan.settings.model, compute=EXACT_DTYPE), plan.source.device
        needed = plan.shape.parameters * torch.float32.itemsize * 5 // 4
        room = sum(map(free_bytes, devices_of(plan.source.model))) if choice.device_map else free_bytes(device)
        if device.type != "cpu" and needed > room:
            choice = replace(choice, stream=True, device_map=None)
        _, source, backend = loaded_model(choice, plan.memory)
        names = set(quantizable(source.description)) - {source.description.head}

        def add_rounding(name: str, weight: torch.Tensor) -> None:
            if name in names:
                weight.copy_(with_rounding(weight, plan.source.compute_dtype))

        backend.change_weights(add_rounding)
        with torch.inference_mode(), with_tf32(), backend.open(None) as session:
            yield session

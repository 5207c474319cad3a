"""Values of ONNX Runtime on the device that a session runs on, shared with torch without a copy (DLPack).

Where both are on one GPU, keys, values, states and logits never leave it. Where torch has no CUDA, outputs come to the
host, as ONNX Runtime gives them by default.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qeval.backends.onnx.packages import import_runtime
from qeval.backends.onnx.providers import Provider
from qeval.backends.onnx.settings import place_of

Feeds = Mapping[str, Any]
"""Values of ONNX Runtime by input name."""


class DeviceValues:
    """Makes values on a provider's device, and runs sessions whose outputs stay there."""

    def __init__(self, provider: Provider, device_id: int = 0) -> None:
        """`device_id` counts the provider's devices from 0."""
        self._type = import_runtime().OrtValue
        self._inputs = place_of(provider, device_id)
        self._outputs = self._inputs if torch.cuda.is_available() else ("cpu", 0)

    def from_array(self, array: NDArray[Any]) -> Any:
        """Copy an array to the device."""
        return self._type.ortvalue_from_numpy(np.ascontiguousarray(array), *self._inputs)

    def from_tensor(self, tensor: Tensor) -> Any:
        """Return a tensor as a value: the same memory where it lies on the device, else a copy there."""
        kind, number = self._outputs
        if kind == "cpu":
            return self.from_array(tensor.cpu().numpy())
        return self._type.from_dlpack(tensor.to(f"{kind}:{number}").contiguous())

    @staticmethod
    def to_tensor(value: Any) -> Tensor:
        """Return a session's output as a tensor on its device, in the same memory.

        The memory must be ONNX Runtime's, as that of outputs is: a value of `from_array` borrows NumPy's.
        """
        tensor: Tensor = torch.utils.dlpack.from_dlpack(value)
        return tensor

    def run(self, session: Any, outputs: Iterable[str], feeds: Feeds, on_host: Sequence[str] = ()) -> list[Any]:
        """Run a session once.

        Args:
            session: An `onnxruntime.InferenceSession`.
            outputs: The names of the outputs to return, in order.
            feeds: The inputs.
            on_host: Those of the outputs that the host reads.
        """
        if self._outputs[0] == "cuda":
            torch.cuda.current_stream(self._outputs[1]).synchronize()  # ONNX Runtime reads on a stream of its own
        binding = session.io_binding()
        for name, value in feeds.items():
            binding.bind_ortvalue_input(name, value)
        for name in outputs:
            binding.bind_output(name, *(("cpu", 0) if name in on_host else self._outputs))
        session.run_with_iobinding(binding)  # ends when the device has finished
        return list(binding.get_outputs())

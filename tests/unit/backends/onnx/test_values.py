"""Values on a session's device: shared with torch, and never brought to the host unless the host reads them."""

import numpy as np
import pytest
import torch

ort = pytest.importorskip("onnxruntime")

from qeval.backends.onnx.providers import choose_provider
from qeval.backends.onnx.values import DeviceValues


class Binding:
    """A record of what a session was bound to."""

    def __init__(self):
        self.inputs, self.outputs = {}, {}

    def bind_ortvalue_input(self, name, value):
        self.inputs[name] = value

    def bind_output(self, name, kind, number):
        self.outputs[name] = (kind, number)

    def get_outputs(self):
        return tuple(self.outputs)


class BoundSession:
    """A session that runs nothing."""

    def io_binding(self):
        self.binding = Binding()
        return self.binding

    def run_with_iobinding(self, binding):
        assert binding is self.binding


def test_a_value_and_its_tensor_are_one_memory():
    values = DeviceValues(choose_provider("cpu"))
    value = ort.OrtValue.ortvalue_from_shape_and_type([2, 3], np.float32)  # ONNX Runtime's own memory, as of outputs
    value.update_inplace(np.arange(6, dtype=np.float32).reshape(2, 3))
    tensor = values.to_tensor(value)
    assert tensor.data_ptr() == value.data_ptr()
    del value
    back = values.from_tensor(tensor.T)
    assert tensor.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert back.numpy().tolist() == [[0, 3], [1, 4], [2, 5]]


def test_outputs_stay_on_the_gpu_but_for_what_the_host_reads(monkeypatch):
    synchronized = []
    stream = type("Stream", (), {"synchronize": lambda self: synchronized.append(1)})()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda number: stream)
    session = BoundSession()
    found = DeviceValues(choose_provider("cuda"), 1).run(session, ["count", "states"], {"ids": 3}, on_host=["count"])
    assert found == ["count", "states"]
    assert session.binding.inputs == {"ids": 3}
    assert session.binding.outputs == {"count": ("cpu", 0), "states": ("cuda", 1)}
    assert synchronized, "what torch was writing must be there before ONNX Runtime reads it"


def test_outputs_come_to_the_host_where_torch_sees_no_gpu():
    session = BoundSession()
    DeviceValues(choose_provider("cuda")).run(session, ["states"], {})
    assert session.binding.outputs == {"states": ("cpu", 0)}

"""ONNX Runtime: export with the very integers of the fake-quant path, and sessions on the real kernels."""

"""The jobs besides `compare`: quantize, export, sensitivity, verify, selfcheck and conformance."""

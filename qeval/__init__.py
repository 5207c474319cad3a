"""qeval says, with error bars, what a quantized language model lost against its FP16 original."""

__version__ = "0.1.0"

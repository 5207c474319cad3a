"""Checkpoints that other tools quantized, read into a `Variant`: integers where a format has them, else values."""

"""Checkpoints: which stored tensors make each weight of a model, and how they are read."""

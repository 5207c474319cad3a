"""Backends: what computes a forward pass, and sessions that score token ids with it."""

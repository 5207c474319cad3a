"""The run folder: rows, states, variants and the record on disk."""

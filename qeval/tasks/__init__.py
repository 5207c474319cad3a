"""Tasks: corpora, windows, protocols and the harness's questions."""

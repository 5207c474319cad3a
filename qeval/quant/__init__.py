"""Quantization arithmetic: grids, rounding, AWQ, GPTQ and the mixed choice; pure."""

"""Quantization of whole models: calibration statistics, methods, and variants from recipes."""

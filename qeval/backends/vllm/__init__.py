"""vLLM: checkpoints scored by its own kernels, in a process of its own interpreter."""

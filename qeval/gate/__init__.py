"""The gate: a policy's margins against the bounds of a finished run's figures, and an exit code."""

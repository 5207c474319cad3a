"""A benchmark's page from its records alone, without torch: tables and plots of speed, memory and correctness."""

from qeval.report.bench.reference import references
from qeval.report.bench.write import write_bench

__all__ = ["references", "write_bench"]

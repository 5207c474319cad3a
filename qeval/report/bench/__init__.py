"""A benchmark's page from its records alone, without torch: tables and plots of speed, memory and correctness."""

from qeval.report.bench.reference import references
from qeval.report.bench.rows import Bench
from qeval.report.bench.write import render

__all__ = ["Bench", "references", "render"]

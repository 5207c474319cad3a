"""The same model in two runs, paired on rows: another version of a tool, another backend, another recipe."""

from qeval.report.diff.build import build_diff
from qeval.report.diff.model import Diff, diff_json

__all__ = ["Diff", "build_diff", "diff_json"]

"""The same model in two runs, paired on rows: another version of a tool, another backend, another recipe."""

from qeval.diff.build import diff
from qeval.diff.model import Diff, diff_json

__all__ = ["Diff", "diff", "diff_json"]

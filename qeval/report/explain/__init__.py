"""Find the rows that make a variant's loss: changed answers, tokens with the largest KL, subjects, layers."""

from qeval.report.explain.build import Highlights, build_explanation, highlights
from qeval.report.explain.model import Explanation, explanation_json

__all__ = ["Explanation", "Highlights", "build_explanation", "explanation_json", "highlights"]

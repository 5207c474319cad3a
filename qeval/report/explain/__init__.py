"""Which rows make a variant's loss: questions that changed, tokens with the largest KL, subjects, layers."""

from qeval.report.explain.build import Highlights, explain, highlights
from qeval.report.explain.model import Explanation, explanation_json

__all__ = ["Explanation", "Highlights", "explain", "explanation_json", "highlights"]

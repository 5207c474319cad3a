"""A model card's section from a finished run's folder alone, without torch."""

from qeval.report.card.write import Written, into, write_card

__all__ = ["Written", "into", "write_card"]

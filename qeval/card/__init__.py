"""A model card's section from a finished run's folder alone, without torch."""

from qeval.card.write import Written, into, write

__all__ = ["Written", "into", "write"]

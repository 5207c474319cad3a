"""The noise floors of a report: the KL of its baseline against itself, in another type or on another backend."""

from collections.abc import Iterable

from qeval.report.model import Metric, VariantReport


def largest_floor(variants: Iterable[VariantReport]) -> tuple[VariantReport, Metric] | None:
    """Return the noise floor with the largest KL, and that KL, its value above zero; None where none was measured."""
    kls = [(v, kl) for v in variants if v.role == "floor" and (kl := v.metrics.get("kl_nats")) and kl.value]
    return max(kls, key=lambda pair: pair[1].value or 0.0, default=None)

"""Numbers in words: digits by the interval, units, absent and broken values."""

import pytest

from qeval.report import formatting
from qeval.report.model import Metric


def metric(value, low=None, high=None, unit="nats", non_finite=0):
    return Metric(value=value, low=low, high=high, unit=unit, better="lower", n=10, clusters=3, non_finite=non_finite)


@pytest.mark.parametrize(
    ("given", "signed", "text"),
    [
        (metric(0.114844, 0.101272, 0.128847), False, "0.115 [0.101, 0.129]"),
        (metric(0.49801), False, "0.498"),
        (metric(16.3149, 15.1, 17.8, "ppl"), False, "16.31 [15.10, 17.80]"),
        (metric(1.00189, 1.00131, 1.00235, "ratio"), False, "1.00189 [1.00131, 1.00235]"),
        (metric(0.604, 0.512, 0.706, "fraction"), False, "60.4 % [51.2, 70.6]"),
        (metric(-0.0125, -0.033, 0.008, "fraction"), True, "−1.2 pts [−3.3, +0.8]"),
        (metric(0.0, 0.0, 0.0, "fraction"), True, "0.0 pts [0.0, 0.0]"),
        (metric(12345.678, 12000.0, 13000.0), False, "12346 [12000, 13000]"),
        (metric(3.2e12, 1e12, 6e12, "ppl"), False, "3.2e+12 [1e+12, 6e+12]"),
        (metric(None), False, "–"),
        (metric(None, non_finite=4), False, "not finite (4 of 10)"),
    ],
)
def test_metric_text(given, signed, text):
    assert formatting.metric_text(given, signed=signed) == text


def test_a_tiny_number_is_not_shown_as_zero():
    assert formatting.value_text(metric(3.2e-9)) == "3.2e-09"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.0312, "0.0312 s"), (59.99, "60 s"), (61, "1 min 1 s"), (3600, "1 h 0 min")]
)
def test_duration(seconds, text):
    assert formatting.duration(seconds) == text

"""The grammar of what is rounded beside the weights."""

import pytest

from qeval.errors import UsageError
from qeval.quant.scheme import Scheme, parse_format, parse_parts, scheme_of


@pytest.mark.parametrize(
    ("parts", "formats"),
    [
        ("a-fp8-token", {"activations": "fp8-token"}),
        ("a-fp8-static", {"activations": "fp8-tensor"}),
        ("a-fp8-e5m2-g128", {"activations": "fp8-e5m2-g128"}),
        ("a-int8-block", {"activations": "int8-g32"}),
        ("a-mxfp8-rceil", {"activations": "mxfp8-rceil"}),
        ("a-mxfp4", {"activations": "mxfp4-floor"}),
        ("a-mxfp6-e2m3", {"activations": "mxfp6-floor"}),
        ("a-mxfp6-e3m2-rceil", {"activations": "mxfp6-e3m2-rceil"}),
        ("a-nvfp4", {"activations": "nvfp4"}),
        ("k-iq4_nl+v-q5_1", {"keys": "iq4_nl", "values": "q5_1"}),
        ("kv-int8", {"keys": "int8-token", "values": "int8-token"}),
        ("k-int8-channel+v-fp8-token", {"keys": "int8-channel", "values": "fp8-token"}),
        ("kv-q4_0-hadamard", {"keys": "q4_0-hadamard", "values": "q4_0-hadamard"}),
        ("v-q8_0-g32", {"values": "q8_0"}),
        ("kv-int8-static-ort", {"keys": "int8-tensor-ort", "values": "int8-tensor-ort"}),
        ("k-int4-ort-channel-hadamard", {"keys": "int4-channel-ort-hadamard"}),
    ],
)
def test_parts_become_formats_whose_names_mean_the_same(parts, formats):
    found = parse_parts(parts.split("+"))
    assert found == formats
    assert scheme_of(found).names() == formats


@pytest.mark.parametrize(
    ("part", "says"),
    [
        ("b-fp8", "prefix"),
        ("a-fp9", "nearest: fp8"),
        ("a-fp8-tokn", "nearest: token"),
        ("kv-int9", "nearest"),
        ("a-int8-channel", "not to activations"),
        ("a-int8-hadamard", "not to activations"),
        ("a-int8-token-g32", "twice"),
        ("a-int8-rceil", "mxfp8"),
        ("a-mxfp8-floor-rceil", "mxfp8"),
        ("a-int8-e5m2", "fp8"),
        ("a-fp8-e3m2", "those of mxfp6"),
        ("a-mxfp6-e5m2", "forms of fp8"),
        ("kv-q4_0-token", "each block of 32"),
        ("kv-q4_0-g64", "each block of 32"),
        ("a-int8-g0", "word"),
        ("a-int8-tensor-ort", "of activations: ort"),
        ("kv-int8-ort", "static scale"),
        ("kv-int8-token-ort", "int8-tensor-ort"),
        ("kv-int5-tensor-ort", "int4 or int8"),
        ("kv-fp8-tensor-ort", "int4 or int8"),
        ("a-", "format"),
    ],
)
def test_what_means_nothing_is_refused(part, says):
    with pytest.raises(UsageError, match=says):
        parse_parts([part])


def test_a_part_comes_once():
    with pytest.raises(UsageError, match="second format"):
        parse_parts(["kv-int8", "k-fp8"])


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("q8_0", 8.5),
        ("q4_0", 4.5),
        ("q4_1", 5),
        ("q5_1", 6),
        ("iq4_nl", 4.5),
        ("int8", 8 + 32 / 64),
        ("int8-channel", 8),
        ("int4-tensor-ort", 4),
        ("int4-g32", 5),
        ("mxfp8", 8.25),
        ("mxfp6-e3m2", 6.25),
    ],
)
def test_bits_of_a_cached_number_count_its_scales(name, bits):
    assert parse_format(name, "keys").bits_per_number(64) == bits


def test_scales_that_span_tokens_are_static():
    assert not parse_format("int8", "keys").is_static
    assert all(parse_format(name, "keys").is_static for name in ("int8-tensor", "int8-channel", "nvfp4"))
    assert not Scheme()
    assert scheme_of({"activations": None, "keys": "int8"}).caches

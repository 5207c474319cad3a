"""The keys of cached variants, pinned: with another one, every variant that a user has would be made again."""

from types import SimpleNamespace

import pytest

from qeval.compare.variants import variant_key
from qeval.config import parse_method

KEYS = {
    "rtn": "1d273a9da5f75f854477aa7b110d39a4",
    "rtn:int8-channel": "6262131584ce09af0daf93f9ff4955ba",
    "rtn:int3-clip-g64": "4ed38b6a0b32351acb7fe121af72636b",
    "rtn:g32-asym-head": "f28dae1fc5d2e8d17fc780310afa1766",
    "awq": "238acb48e487a17275bccb73c403f73c",
    "awq:g32-noclip": "1ddebc832b368498b6ab5533b98135a0",
    "gptq": "96f84b70caf29776a6b088c3ee811391",
    "gptq:int8-channel-noactorder": "9d034dd4c07d3d8944ce38d8870de03d",
    "gptq:g32-damp0.05-noclip": "2e0a005c5ef0cd3fbf49c78147da2885",
    "mixed": "92c8aab0d0bef475cf7b9de837bb68b4",
    "mixed:g32-4.8bpw-fisher": "d2f7f94103bca190880603a40a8fa750",
    "mixed:positional": "5961e941506867f019ed2810343efa05",
    "mixed-rtn:6bpw-clip": "a76b1da17f3a749ca410dcc7b38dc21c",
    "rtn:int4-channel+r1r2": "5bdd62a6b362058c722dc0f87cb1648f",
    "gptq:int4-channel+r1r2r4-seed1": "ebc68521ca55009e29a8b9f632e68ad5",
    "rtn:int4-g128-full": "1de4d81290fc6c070ce3e835631394de",
    "mixed:int4-g128-full": "d524367763c7ec4256143251501a3f6a",
}
FULL_KEYS = {
    "rtn": "7604f275c2561765a1b8b9af3d4f0c16",
    "rtn:int3-clip-g64": "d06007f5f7a2f2c1aa7937349855455f",
    "awq": "20f2cfa02e50247de0d937f4a9f29c2e",
    "awq:g32-noclip": "9068db55bfc133e40a5762ecadc193c0",
    "gptq": "894930cc10abe3a5ebe24c72c9603655",
    "gptq:g32-damp0.05-noclip": "1dce2249f564df039bc79f17a8f2b9ab",
    "mixed": "ca99b5542014c63e45690177222d76ab",
    "mixed:g32-4.8bpw-fisher": "ca16759743d8b45ac17008f398ca091a",
    "mixed:positional": "7d6c5f678df9617837e08cb9ada159d1",
    "mixed-rtn:6bpw-clip": "aa3737ccd6ef4955fee17705393bccdf",
    "rtn:int4-channel+r1r2": "1b4567b4ec5b54a5dc1c9684fe06822f",
    "gptq:int4-channel+r1r2r4-seed1": "3bc578ea9f75c59671678cc86fe4bb19",
}
"""Of names that meant `full` before `signed` was the default."""


@pytest.mark.parametrize("name", KEYS)
def test_the_key_of_a_variant_is_the_same_in_every_release(name):
    assert key_of(name) == KEYS[name]


def key_of(name, kinds=("router",), all_experts=False):
    description = SimpleNamespace(float_kinds={f"w{place}": kind for place, kind in enumerate(kinds)})
    model = SimpleNamespace(arithmetic={}, weights_sha256="w", config_sha256="c", description=description)
    calibration = SimpleNamespace(record={"tokens_sha256": "t"}, all_experts=all_experts)
    return variant_key(parse_method(name), model, calibration, seed=7)


def test_what_stays_in_float_and_what_experts_see_are_part_of_the_key():
    assert key_of("rtn", kinds=("router", "gate")) != KEYS["rtn"]
    assert key_of("gptq", all_experts=True) != KEYS["gptq"]
    assert key_of("rtn", all_experts=True) == KEYS["rtn"]  # it sees no text


@pytest.mark.parametrize("name", FULL_KEYS)
def test_no_variant_on_the_former_default_range_is_taken_for_one_on_the_new(name):
    assert key_of(name) not in FULL_KEYS.values()


@pytest.mark.parametrize(
    ("name", "whole"),
    [
        ("rtn", "rtn:int4-g128-signed"), ("gptq:g32", "gptq:g32-signed"),
        ("rtn:int3-channel", "rtn:int3-channel-signed"),
        ("mixed-rtn:int4/bf16-8bpw", "mixed-rtn:bf16/int4-g128-signed-8bpw"),
    ],
)  # fmt: skip
def test_a_name_with_the_default_range_is_the_same_variant(name, whole):
    assert key_of(name) == key_of(whole)


def test_a_mix_that_names_its_range_has_it_at_both_widths():
    named, plain = (parse_method(name) for name in ("mixed:int4-g128-signed", "mixed"))
    assert [str(each) for each in (named.low_grid, named.high_grid)] == ["int4-g128-signed", "int8-g128-signed"]
    assert [str(each) for each in (plain.low_grid, plain.high_grid)] == ["int4-g128-signed", "int8-g128"]
    assert key_of("mixed") != key_of("mixed:int4-g128-signed")

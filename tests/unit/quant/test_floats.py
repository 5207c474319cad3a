"""Small floats against torch's casts, and against plain loops over all values of a type."""

import math

import numpy as np
import pytest
import torch

from qeval.quant.elements import E2M1, E2M3, E3M2, E4M3, E5M2, ELEMENTS, FP4, NF4, element_values
from qeval.quant.floats import (
    block_scales,
    decode_element,
    decode_powers,
    encode_element,
    encode_powers,
    fake_quantize_blocks,
    global_scale_of,
    round_to_element,
)

MINIFLOATS = (E4M3, E5M2, E2M3, E3M2, E2M1)
CASTS = {E4M3: torch.float8_e4m3fn, E5M2: torch.float8_e5m2}


def numbers(count=4000, seed=0):
    """Numbers of both signs over 40 powers of two, with halfway points and the edges of every type."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.randn(count, generator=generator) * torch.exp2(torch.linspace(-24, 16, count))
    halves = torch.arange(-130, 130) / 16
    edges = torch.tensor([0.0, -0.0, 448.0, 464.0, 465.0, 57344.0, 61440.0, 1e30, -1e30, 2.0**-9, 2.0**-10, 1e-40])
    return torch.cat([spread, halves, edges])


def nearest(value, element):
    """The slow definition: the nearest of all values; of two as near the one with the even code."""
    values = [v for v in element_values(element)[: 1 << (element.bits - 1)] if math.isfinite(v)]
    magnitude = min(abs(value), max(values))
    code = min(range(len(values)), key=lambda c: (abs(values[c] - magnitude), c % 2))
    return math.copysign(values[code], value)


@pytest.mark.parametrize("element", CASTS, ids=lambda e: e.name)
def test_eight_bits_are_torchs_casts_to_the_bit(element):
    values, dtype = numbers(), CASTS[element]
    cast = values.clamp(-element.largest, element.largest).to(dtype)
    rounded = round_to_element(values, element)
    assert torch.equal(rounded.view(torch.int32), cast.float().view(torch.int32))
    assert torch.equal(encode_element(rounded, element), cast.view(torch.uint8))


@pytest.mark.parametrize("element", CASTS, ids=lambda e: e.name)
def test_every_code_of_eight_bits_means_what_torch_says(element):
    codes = torch.arange(256, dtype=torch.uint8)
    expected = codes.view(CASTS[element]).float()
    assert torch.equal(decode_element(codes, element).nan_to_num(nan=1e9), expected.nan_to_num(nan=1e9))


@pytest.mark.parametrize("element", MINIFLOATS, ids=lambda e: e.name)
def test_rounding_takes_the_nearest_value_and_ties_go_to_even(element):
    values = numbers(800)
    expected = torch.tensor([nearest(value, element) for value in values.tolist()])
    assert torch.equal(round_to_element(values, element), expected)


def test_values_of_the_small_types_are_those_of_the_specification():
    """OCP Microscaling Formats 1.0, tables 3 to 5."""
    assert element_values(E2M1) == (0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6)
    assert element_values(E2M3)[:10] == (0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1, 1.125)
    assert element_values(E2M3)[31] == 7.5
    assert element_values(E3M2)[:6] == (0, 0.0625, 0.125, 0.1875, 0.25, 0.3125)
    assert element_values(E3M2)[31] == 28


@pytest.mark.parametrize("element", ELEMENTS.values(), ids=lambda e: e.name)
def test_codes_and_values_are_undone_by_each_other(element):
    codes = torch.arange(1 << element.bits, dtype=torch.uint8)
    values = decode_element(codes, element)
    finite = values.isfinite()
    assert torch.equal(round_to_element(values[finite], element), values[finite])
    again = encode_element(values[finite], element)
    zero = values[finite] == 0  # a codebook's second zero has the first one's code
    assert torch.equal(again[~zero], codes[finite][~zero])


def nf4_tree(x):
    """bitsandbytes' dQuantizeNF4 as thresholds: the code is how many of them lie below."""
    bounds = (
        -0.8480964004993439, -0.6106329262256622, -0.4599952697753906, -0.33967943489551544, -0.23460740596055984,
        -0.13791173323988914, -0.045525018125772476, 0.03979014977812767, 0.1202552504837513, 0.2035212516784668,
        0.2920137718319893, 0.3893125355243683, 0.5016634166240692, 0.6427869200706482, 0.8614784181118011,
    )  # fmt: skip
    return sum(x > bound for bound in bounds)


def fp4_tree(x):
    """bitsandbytes' dQuantizeFP4."""
    sign, x = (8 if x < 0 else 0), abs(x)
    bounds = ((0.8333333, 3), (0.583333, 2), (0.4166667, 5), (0.29166667, 4), (0.20833333, 7), (0.0859375, 6))
    code = next((code for bound, code in bounds if x > bound), 1 if x > 0.00260417 else 0)
    return code | sign


@pytest.mark.parametrize(("codebook", "tree"), [(NF4, nf4_tree), (FP4, fp4_tree)], ids=["nf4", "fp4"])
def test_codebooks_round_as_bitsandbytes_trees_do(codebook, tree):
    values = torch.rand(5000, generator=torch.Generator().manual_seed(1)) * 2 - 1
    assert encode_element(values, codebook).tolist() == [tree(value) for value in values.tolist()]


@pytest.mark.parametrize(("codebook", "kind"), [(FP4, 0), (NF4, 1)], ids=["fp4", "nf4"])
def test_codebooks_are_those_of_onnxruntimes_bitsandbytes_kernel(codebook, kind):
    state = pytest.importorskip("onnxruntime.capi._pybind_state")
    values = torch.randn(16, 192, generator=torch.Generator().manual_seed(9))
    packed, absmax = np.zeros(16 * 96, np.uint8), np.zeros(48, np.float32)
    state.quantize_matmul_bnb4(packed, values.numpy(), absmax, 64, kind, 16, 192)
    codes = np.stack([packed >> 4, packed & 15], -1).reshape(-1, 64)
    blocks = values.reshape(-1, 64)
    np.testing.assert_array_equal(blocks.abs().amax(-1).numpy(), absmax)
    ours = encode_element(blocks / torch.from_numpy(absmax).unsqueeze(1), codebook).numpy()
    if kind == 0:
        ours, codes = (np.where(each == 8, 0, each) for each in (ours, codes))  # FP4 has a zero of each sign
    assert np.array_equal(ours, codes)


def power_by_hand(amax, element, rule):
    """The exponent of each rule, in Python's arithmetic, which is exact for these."""
    if rule == "rceil":
        return math.ceil(math.log2(amax / element.largest))
    if rule == "even":
        # round to the type's mantissa first: half a step below the next power of two goes to it
        scale = 2.0 ** (math.floor(math.log2(amax)) - element.mantissa_bits)
        amax = math.floor(amax / scale + 0.5) * scale
    return math.floor(math.log2(amax)) - math.floor(math.log2(element.largest))


@pytest.mark.parametrize("rule", ["floor", "even", "rceil"])
@pytest.mark.parametrize("element", MINIFLOATS, ids=lambda e: e.name)
def test_shared_exponents_are_those_of_a_plain_loop(element, rule):
    amax = torch.cat([torch.rand(300, generator=torch.Generator().manual_seed(2)) * 9, torch.arange(1, 129) / 16])
    scales = block_scales(amax.unsqueeze(-1), amax, element, rule)
    expected = [2.0 ** power_by_hand(value, element, rule) for value in amax.tolist()]
    assert scales.tolist() == expected
    if rule == "rceil":
        assert bool((amax / scales <= element.largest).all())


def test_shared_exponents_by_hand():
    """amax 7: floor(log2 7) - 2 = 0; rounded to one bit of mantissa 7 is 8, so 1; ceil(log2(7/6)) = 1."""
    amax = torch.tensor([7.0, 6.0, 5.0, 0.0])
    by_rule = {rule: block_scales(amax.unsqueeze(-1), amax, E2M1, rule).tolist() for rule in ("floor", "even", "rceil")}
    zero = 2.0**-127
    assert by_rule == {"floor": [1, 1, 1, zero], "even": [2, 1, 1, zero], "rceil": [2, 1, 1, zero]}


def test_powers_of_two_read_back_from_their_bytes():
    codes = torch.arange(255, dtype=torch.uint8)
    powers = decode_powers(codes)
    assert powers.tolist() == [2.0 ** (code - 127) for code in range(255)]
    assert torch.equal(encode_powers(powers), codes)
    assert torch.equal(powers.to(torch.float8_e8m0fnu).view(torch.uint8), codes)


def nvfp4_loop(row, gscale, target=6.0):
    """A block of NVFP4 in plain Python but for torch's cast of the block's scale."""
    amax = max(abs(value) for value in row)
    share = torch.tensor(amax) / (torch.tensor(gscale) * target)
    scale = float(share.to(torch.float8_e4m3fn).float() * torch.tensor(gscale))
    return [nearest(float(torch.tensor(value) / scale), E2M1) * scale for value in row]


def test_nvfp4_is_a_plain_loop_over_blocks():
    values = torch.randn(8, 48, generator=torch.Generator().manual_seed(3))
    gscale = float(values.abs().max() / 2688)
    expected = [[x for i in (0, 16, 32) for x in nvfp4_loop(row[i : i + 16], gscale)] for row in values.tolist()]
    torch.testing.assert_close(
        fake_quantize_blocks(values, E2M1, 16, "e4m3"), torch.tensor(expected), rtol=3e-7, atol=0
    )


def test_four_over_six_takes_the_better_target_for_every_block():
    values = torch.randn(16, 64, generator=torch.Generator().manual_seed(4))
    blocks = values.reshape(16, 4, 16)
    gscale = global_scale_of(values.abs().max(), E2M1, "e4m3-46")
    assert float(gscale) == pytest.approx(float(values.abs().max()) / (6 * 256))
    errors = []
    for target in (6.0, 4.0):
        rounded = [[nvfp4_loop(block, float(gscale), target) for block in row] for row in blocks.tolist()]
        errors.append((torch.tensor(rounded) - blocks).square().sum(-1))
    got = (fake_quantize_blocks(values, E2M1, 16, "e4m3-46").reshape(16, 4, 16) - blocks).square().sum(-1)
    assert bool((got <= torch.minimum(*errors) * (1 + 1e-4) + 1e-9).all())
    assert 0 < int((errors[1] < errors[0]).sum()) < 64  # both targets are taken


def test_a_static_scale_of_the_whole_is_used():
    values = torch.randn(2, 32, generator=torch.Generator().manual_seed(5))
    own = fake_quantize_blocks(values, E2M1, 16, "e4m3")
    static = fake_quantize_blocks(values, E2M1, 16, "e4m3", global_scale=torch.tensor(8.0 / 2688))
    assert torch.equal(fake_quantize_blocks(values, E2M1, 16, "e4m3", values.abs().max() / 2688), own)
    assert not torch.equal(static, own)


@pytest.mark.parametrize(
    ("element", "size", "scaling", "percent"),
    [
        (E2M1, 32, "floor", 11.50), (E2M1, 32, "even", 11.19), (E2M1, 32, "rceil", 11.55), (E4M3, 32, "floor", 2.93),
        (E4M3, 32, "even", 2.76), (E4M3, 32, "rceil", 2.65), (E2M1, 16, "e4m3", 9.51),
    ],
)  # fmt: skip
def test_relative_errors_on_gaussian_numbers(element, size, scaling, percent):
    """Against figures of an implementation apart from this one (project notes, October 2026)."""
    values = torch.randn(2048, 512, generator=torch.Generator().manual_seed(6))
    error = fake_quantize_blocks(values, element, size, scaling) - values
    assert 100 * float(error.norm() / values.norm()) == pytest.approx(percent, abs=0.03)


@pytest.mark.parametrize(
    ("element", "scaling"),
    [(e, s) for e in ELEMENTS.values() for s in ("fp32", "floor", "e4m3", "e4m3-46") if s == "fp32" or e in MINIFLOATS],
    ids=lambda each: getattr(each, "name", each),
)
def test_zeros_short_blocks_and_input_are_left_alone(element, scaling):
    values = torch.randn(3, 70, generator=torch.Generator().manual_seed(7))
    values[1] = 0
    before = values.clone()
    rounded = fake_quantize_blocks(values, element, 32, scaling)
    assert torch.equal(values, before)
    assert rounded.shape == values.shape
    assert bool(torch.isfinite(rounded).all())
    assert not rounded[1].any()
    alone = fake_quantize_blocks(
        values[:, 64:], element, 32, scaling, global_scale_of(values.abs().max(), element, scaling)
    )
    assert torch.equal(rounded[:, 64:], alone)


def test_half_precision_input_is_rounded_in_fp32():
    values = torch.randn(4, 64, generator=torch.Generator().manual_seed(8)).bfloat16()
    assert torch.equal(
        fake_quantize_blocks(values, E4M3, 64, "fp32"), fake_quantize_blocks(values.float(), E4M3, 64, "fp32")
    )

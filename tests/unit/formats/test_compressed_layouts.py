"""compressed-tensors' layouts as qeval writes them: against packing by hand, and against compressed-tensors' own."""

import pytest
import torch

from qeval.errors import UsageError
from qeval.formats.base import Module
from qeval.formats.compressed import COMPRESSED_TENSORS
from qeval.formats.compressed_layouts import cache_args, compress_weight, input_parts, layout_of
from qeval.formats.read_back import relative_difference
from qeval.models.checkpoint.shards import write_shards
from qeval.models.checkpoint.weights import INDEX, read_entries, weight_files
from qeval.quant.grid import parse
from qeval.quant.rtn import quantize_rtn
from qeval.quant.scheme import parse_format, scheme_of
from tests.fixtures import packers

ROWS, COLUMNS = 48, 256
EXACT = (
    "int4-g32", "int4-g32-asym", "int4-channel", "int4-channel-asym", "int8-g64", "int8-channel", "int8-channel-asym",
    "int4-g32-half", "int4-g32-signed", "fp8-tensor", "fp8-channel", "fp8-channel-div", "fp8-tile128", "mxfp4-floor",
    "mxfp4-even", "mxfp4-rceil", "mxfp8-floor", "mxfp8-even",
)  # fmt: skip


def matrix():
    """A matrix with one row far larger than the others, and a row of zeros."""
    values = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(3))
    values[5] *= 40
    values[7] = 0
    return values


def written(grid, activations=None):
    weight = quantize_rtn(matrix(), parse(grid))
    layout = layout_of("m.weight", weight.grid, COLUMNS, activations)
    return weight, layout, compress_weight(weight, layout)


def read(layout, parts):
    """The reader's matrices of the tensors, by the configuration that belongs to them."""
    config = {"format": layout.format, "config_groups": {"group_0": layout.config_group(["Linear"])}}
    COMPRESSED_TENSORS.notes(config)
    return COMPRESSED_TENSORS.decode(Module("m", ROWS, COLUMNS, parts), config)


@pytest.mark.parametrize("grid", EXACT)
def test_a_layout_is_read_as_what_was_written(grid):
    weight, layout, parts = written(grid)
    found = read(layout, parts)
    assert relative_difference(found, weight) == 0
    if grid.startswith("int"):
        assert torch.equal(found.codes, weight.codes)
        assert torch.equal(found.scales, weight.scales)
        assert weight.zeros is None or torch.equal(found.zeros, weight.zeros)


@pytest.mark.parametrize("grid", ["nvfp4", "nvfp4-46"])
def test_nvfp4_keeps_codes_and_scales_and_the_reciprocal_of_its_second_scale(grid):
    weight, layout, parts = written(grid)
    assert 0 < relative_difference(read(layout, parts), weight) < 2**-22
    assert torch.equal(parts["weight_packed"] & 15, weight.codes[:, ::2])
    assert torch.equal(parts["weight_packed"] >> 4, weight.codes[:, 1::2])
    assert torch.equal(parts["weight_scale"].float() * weight.global_scale, weight.scales)
    assert float(parts["weight_global_scale"]) == float(1 / weight.global_scale)


@pytest.mark.parametrize(
    "grid", ["int4-g32", "int4-g32-asym", "int8-channel", "int8-channel-asym", "int4-channel-asym"]
)
def test_integers_are_packed_as_by_hand(grid):
    weight, _, parts = written(grid)
    expected = packers.compressed(weight)
    assert parts.keys() == expected.keys()
    assert all(torch.equal(part, expected[name]) and part.dtype == expected[name].dtype for name, part in parts.items())


def test_integers_with_rounded_activations_are_signed_bytes():
    weight, layout, parts = written("int8-channel", parse_format("int8-token", "activations"))
    expected = packers.int_quantized(weight)
    assert parts.keys() == expected.keys()
    assert all(torch.equal(part, expected[name]) for name, part in parts.items())
    assert layout.inputs == {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}


@pytest.mark.parametrize(
    ("grid", "activations", "says"),
    [
        ("int5-g32", None, "int5-g32 is on 5 bits"),
        ("int8-tensor", None, "one scale a matrix"),
        ("int4-g48", None, "short block"),
        ("nf4", None, "no layout in compressed-tensors"),
        ("fp8e5m2-channel", None, "no layout in compressed-tensors"),
        ("mxfp6", None, "no layout in compressed-tensors"),
        ("int4-g32", "int8-token", "rtn:int8-w8a8"),
        ("int8-channel", "fp8-token", "with +a-int8-token or +a-int8-tensor"),
        ("fp8-channel", "int8-token", "with +a-fp8-token or +a-fp8-tensor"),
        ("fp8-tile128", "fp8-token", "with +a-fp8-g128"),
        ("fp8-channel", "fp8-e5m2-token", "with +a-fp8-token or +a-fp8-tensor"),
        ("mxfp4", "mxfp4-floor", "with +a-mxfp4-even"),
    ],
)
def test_what_no_layout_says_is_refused_with_what_one_does(grid, activations, says):
    how = None if activations is None else parse_format(activations, "activations")
    with pytest.raises(UsageError, match=says.replace("+", r"\+")):
        layout_of("m.weight", parse(grid), COLUMNS, how)


def test_static_scales_come_from_the_largest_magnitudes():
    amax = torch.tensor(6.0)
    assert float(input_parts(parse_format("int8-static", "activations"), amax)["input_scale"]) == pytest.approx(6 / 127)
    assert float(input_parts(parse_format("fp8-static", "activations"), amax)["input_scale"]) == pytest.approx(6 / 448)
    found = input_parts(parse_format("nvfp4", "activations"), amax)
    assert float(found["input_global_scale"]) == 448.0
    assert all(part.shape == (1,) and part.dtype == torch.float32 for part in found.values())


def test_keys_and_values_are_fp8_with_static_scales_or_refused():
    assert cache_args(scheme_of({})) is None
    both = scheme_of({"keys": "fp8-tensor", "values": "fp8-tensor"})
    assert cache_args(both) == {
        "num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True,
    }  # fmt: skip
    for names in ({"keys": "fp8-tensor"}, {"keys": "int8-token", "values": "int8-token"}):
        with pytest.raises(UsageError, match=r"take \+kv-fp8-tensor"):
            cache_args(scheme_of(names))


def test_many_tensors_go_to_several_files_with_an_index(tmp_path):
    tensors = {f"t{index}": torch.full((10,), float(index)) for index in range(5)}
    write_shards(tensors.items(), tmp_path, shard_bytes=80)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *(f"model-0000{index}-of-00003.safetensors" for index in (1, 2, 3)), INDEX,
    ]  # fmt: skip
    assert [entry.name for entry in read_entries(weight_files(tmp_path))] == [*tensors]
    assert {path.stat().st_mode & 0o777 for path in weight_files(tmp_path)} == {0o644}


@pytest.mark.parametrize("grid", [*EXACT, "nvfp4"])
def test_compressed_tensors_decompresses_the_same_values(grid):
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    weight, layout, parts = written(grid)
    scheme = QuantizationScheme(**layout.config_group(["Linear"]))
    compressor = BaseCompressor.get_value_from_registry(layout.format)
    values = compressor.decompress(parts, scheme)["weight"]
    assert set(compressor.compression_param_names(scheme)) == parts.keys()
    # small floats are multiplied in bfloat16 there
    torch.testing.assert_close(
        values.float(), weight.dequantize(), rtol=0 if values.dtype == torch.float32 else 2**-7, atol=0
    )

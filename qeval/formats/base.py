"""The input and the output of a reader, of one linear. Pure: tensors in, tensors out.

A format is read into a `QWeight` where its integers, scales and zero points say the same on a `Grid`, and into `Values`
where they don't (codebooks, floating zero points, groups in the order of activations). All arithmetic is fp32's:
the numbers are those that the file means, not those that a kernel in half precision gives.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qeval.arithmetic import dtype_name
from qeval.errors import UsageError
from qeval.formats.rounding import TensorRounding
from qeval.quant.grid import Grid, PerBlock, PerChannel, PerTensor
from qeval.quant.pack import unpack
from qeval.quant.qweight import QWeight
from qeval.quant.scheme import PartName


@dataclass(frozen=True, eq=False)
class Module:
    """A linear as it lies in a checkpoint: its name, the shape of the baseline's matrix, its tensors.

    `parts` are named by what follows the module's name: `qweight`, `weight.absmax`.
    """

    name: str
    rows: int
    columns: int
    parts: Mapping[str, Tensor]

    def part(self, name: str, *, shape: tuple[int | None, ...] = ()) -> Tensor:
        """Return a tensor of the module, of a shape where one is given (None: any length).

        Raises:
            UsageError: It is missing or of another shape.
        """
        if name not in self.parts:
            raise self.error(f"has no {name} beside {', '.join(sorted(self.parts))}")
        tensor = self.parts[name]
        fits = len(shape) == tensor.dim() and all(
            want in (None, have) for want, have in zip(shape, tensor.shape, strict=True)
        )
        if shape and not fits:
            wanted = " x ".join("any" if size is None else str(size) for size in shape)
            raise self.error(f"holds {name} of shape {list(tensor.shape)} where the baseline's matrix needs {wanted}")
        return tensor

    def error(self, what: str) -> UsageError:
        """Return the error that names this module."""
        return UsageError(f"{self.name} {what}; the file is of another model, of another format, or torn.")


@dataclass(frozen=True, eq=False)
class Values:
    """A matrix without integers that a `Grid` could say: its values [rows, columns], its form's name, its bits."""

    values: Tensor
    form: str
    size_bits: int


_FP8_FORMS = {torch.float8_e4m3fn: "fp8 e4m3", torch.float8_e5m2: "fp8 e5m2"}

DecodedMatrix = QWeight | Values
Config = Mapping[str, Any]
"""`quantization_config` of a checkpoint's config.json."""
RoundedInput = Callable[[str, Config], TensorRounding | None]
"""Returns the rounding of a module's inputs by its name in the file and the configuration; None for no rounding."""
RoundedCache = Callable[[Config, PartName], TensorRounding | None]
"""Returns the rounding of `keys` or `values` by the configuration; None for no rounding."""
DecodeModule = Callable[[Module, Config], DecodedMatrix]


@dataclass(frozen=True)
class CheckpointFormat:
    """The format of one tool's checkpoints.

    `markers`: names of tensors that only a quantized linear has. `decode` reads one. `notes` says what a reader must
    know and refuses settings that are not read. `library`: what `decode` imports, and the command that installs it.
    `input_scale`: the part [columns] by which a linear's input is multiplied while running, where a format has one.
    `inputs` and `caches`: what is rounded beside the weights.
    """

    title: str
    markers: tuple[str, ...]
    decode: DecodeModule
    notes: Callable[[Config], tuple[str, ...]] = lambda config: ()
    library: tuple[str, str] | None = None
    input_scale: str | None = None
    inputs: RoundedInput = lambda name, config: None
    caches: RoundedCache = lambda config, part: None


def read_bits(words: Tensor, bits: int, count: int) -> Tensor:
    """Return [rows, words] integers of 8 or 32 bits as [rows, count] uint8 codes: the lowest bits first, no gaps.

    >>> read_bits(torch.tensor([[0x21]], dtype=torch.int32), 4, 3).tolist()
    [[1, 2, 0]]
    """
    if words.shape[1] * words.dtype.itemsize * 8 < count * bits:
        raise ValueError(f"{words.shape[1]} words hold no {count} codes of {bits} bits.")
    packed = np.ascontiguousarray(words.cpu().numpy()).view(np.uint8)
    return torch.from_numpy(np.ascontiguousarray(unpack(packed, bits, packed.shape[1] * 8 // bits)[:, :count]))


def on_grid(codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, size: int) -> QWeight:
    """Return codes and scales as a matrix on a grid.

    Zero points that all stand in the middle make a symmetric grid, which means the same numbers.

    Args:
        codes: [rows, columns] uint8.
        scales: [rows, blocks], or [1, 1] for all of the matrix.
        zeros: Zero points, [rows, blocks]; None where they stand in the middle.
        bits: The width of a code.
        size: Columns of a block.
    """
    middle = 1 << (bits - 1)
    symmetric = zeros is None or bool((zeros == middle).all())
    granularity: PerTensor | PerChannel | PerBlock = PerBlock(size)
    if scales.numel() == 1:
        granularity = PerTensor()
    elif scales.shape[1] == 1:
        granularity = PerChannel()
    grid = Grid(bits, granularity, symmetric)
    zero_points = None if symmetric or zeros is None else zeros.to(torch.uint8).contiguous()
    return QWeight(grid, codes.contiguous(), scales.float().contiguous(), zero_points)


def fp8_form(module: Module, weight: Tensor) -> str:
    """Return the name of a weight's FP8 type.

    Raises:
        UsageError: It is of another type.
    """
    if weight.dtype not in _FP8_FORMS:
        raise module.error(f"has scales beside a weight in {dtype_name(weight.dtype)}")
    return _FP8_FORMS[weight.dtype]


def fp8_size_bits(weight: Tensor, scales: Tensor) -> int:
    """Return the bits that a weight in bytes and its scales take in the file."""
    return 8 * weight.numel() + 8 * scales.numel() * scales.element_size()


def dequantize_groups(module: Module, codes: Tensor, scales: Tensor, zeros: Tensor, bits: int, order: Tensor) -> Values:
    """Return the values of codes [rows, columns] whose column c belongs to group `order[c]`.

    Such groups are no consecutive blocks, so no grid says them.

    Args:
        module: What errors name.
        codes: [rows, columns].
        scales: [rows, groups].
        zeros: [rows, groups].
        bits: The width of a code.
        order: The group of each column, [columns].
    """
    index = order.long()
    if len(index) != module.columns or int(index.min()) < 0 or int(index.max()) >= scales.shape[1]:
        raise module.error("has a g_idx that names groups which are not there")
    values = (codes.float() - zeros.float()[:, index]) * scales.float()[:, index]
    groups = scales.shape[1]
    size_bits = codes.numel() * bits + scales.numel() * (8 * scales.element_size() + bits) + 32 * module.columns
    return Values(values, f"int{bits} in {groups} groups by g_idx", size_bits)


def is_in_order(order: Tensor, size: int) -> bool:
    """Return whether a g_idx says what consecutive blocks of `size` columns would."""
    return torch.equal(order.long().cpu(), torch.arange(len(order)) // size)


def group_size(module: Module, groups: int, wanted: object) -> int:
    """Return the columns that share a scale.

    It is what the configuration says where it gives that many groups, else equal shares.

    Args:
        module: What errors name.
        groups: How many groups there are.
        wanted: What the configuration says.

    Raises:
        UsageError: Neither fits.
    """
    columns = module.columns
    if isinstance(wanted, int) and wanted > 0 and -(-columns // wanted) == groups:
        return wanted
    if groups and columns % groups == 0:
        return columns // groups
    raise module.error(f"has {groups} groups of scales, which neither its group size ({wanted}) nor equal shares give")

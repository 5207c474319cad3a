"""MatMulNBits at accuracy level 4, in torch: activations in int8, a scale a row and weight block.

ONNX Runtime's CPU kernel (1.31) takes each block of a row of activations to int8, symmetric, the scale its largest
magnitude / 127, and multiplies integers. In exact arithmetic that is a product of dequantized activations and
dequantized weights, which is what stands here; the kernel agrees within 1e-5 of the largest result.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from qeval.backends.onnx.nbits import kernel_block
from qeval.quant.qweight import QWeight

_LARGEST = 127.0


def round_activations(x: Tensor, block: int) -> Tensor:
    """Return activations [..., columns] as int8 holds them, fp32: symmetric, absmax / 127 a block, ties to even.

    >>> import torch
    >>> round_activations(torch.tensor([[127.0, 0.6, 1.4, 254.0, 1.4]]), 3).tolist()
    [[127.0, 1.0, 1.0, 254.0, 2.0]]
    """
    columns = x.shape[-1]
    filled = pad(x.float(), (0, -columns % block))
    blocks = filled.reshape(*filled.shape[:-1], -1, block)
    largest = blocks.abs().amax(dim=-1, keepdim=True)
    inverse = torch.full_like(largest, _LARGEST).div_(largest).masked_fill_(largest == 0, 0.0)  # a true division
    rounded = (blocks * inverse).round_().mul_(largest / _LARGEST)
    return rounded.reshape(filled.shape)[..., :columns]


def int8_linear(x: Tensor, weight: QWeight) -> Tensor:
    """Multiply `x` [..., columns] by a quantized matrix [rows, columns]: [..., rows] fp32, as accuracy level 4 has it.

    Raises:
        UsageError: the kernel takes no block of the grid's size.
    """
    block = kernel_block("the weight", weight.grid, weight.codes.shape[1])
    return round_activations(x, block) @ weight.dequantize().T

"""The statistics of a layer's input: a sketch of its second moments. No activation is stored.

The sketch is a CountSketch (Charikar, Chen, Farach-Colton 2002; Clarkson and Woodruff 2013): every token's input x is
added, with a random sign, to one of k rows. Then E[S^T S] = sum of x x^T, so the squared error of a layer's output, the
sum of |e x|^2 over tokens, is estimated by |e S^T|^2: k numbers a weight row, whatever the number of tokens. With as
many rows as tokens and one token a row it would be exact.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from qeval.arithmetic import sum_dtype

SKETCH_ROWS = 512
_STRIPS = 4


@dataclass(frozen=True, eq=False)
class InputStatistics:
    """A layer's input over the calibration text.

    `tokens`: how many; `magnitude` [columns]: mean of |x|; `sketch` [k, columns]: S with S^T S about the sum of
    x x^T.
    """

    tokens: int
    magnitude: Tensor
    sketch: Tensor

    def scaled(self, scales: Tensor) -> "InputStatistics":
        """Return the statistics of x / scales."""
        return InputStatistics(self.tokens, self.magnitude / scales, self.sketch / scales)


class Accumulator:
    """Sums one layer input's statistics while the text streams through."""

    def __init__(self, columns: int, seed: int, device: torch.device | str = "cpu") -> None:
        """Start at zero; `seed` and a token's index decide the token's row and sign."""
        self._magnitude = torch.zeros(columns, device=device, dtype=sum_dtype(device))
        self._sketch = torch.zeros(SKETCH_ROWS, columns, device=device)
        self._generator = torch.Generator().manual_seed(seed)
        self._tokens = 0

    @property
    def tokens(self) -> int:
        """The number of tokens taken in."""
        return self._tokens

    def add(self, inputs: Tensor) -> None:
        """Take in the inputs [tokens, columns] of the next tokens."""
        inputs = inputs.float()
        draws = torch.randint(2 * SKETCH_ROWS, (len(inputs),), generator=self._generator).to(inputs.device)
        self._add_signed(inputs, draws // 2, (draws % 2 * 2 - 1).to(inputs.dtype).unsqueeze(1))
        self._magnitude += inputs.abs().sum(0)
        self._tokens += len(inputs)

    def _add_signed(self, inputs: Tensor, rows: Tensor, signs: Tensor) -> None:
        """Add `inputs * signs` to the sketch's `rows`, in an order that is the same each time."""
        if inputs.device.type == "cpu":
            self._sketch.index_add_(0, rows, inputs * signs)
            return
        # On a GPU index_add_ adds in whatever order its atomics come, so the sum is a product with a sparse matrix.
        picks = torch.zeros(len(inputs), SKETCH_ROWS, device=inputs.device).scatter_(1, rows.unsqueeze(1), signs)
        self._sketch.addmm_(picks.T, inputs)

    def statistics(self) -> InputStatistics:
        """Return the statistics of all inputs so far."""
        return InputStatistics(self._tokens, (self._magnitude / self._tokens).float(), self._sketch.clone())


def add_moments(total: Tensor, inputs: Tensor) -> None:
    """Add the sum of x x^T over the rows of `inputs` [tokens, columns] to `total` [columns, columns], upper triangle.

    Strip by strip from the diagonal on, five eighths of the whole product's arithmetic; what is below the strips'
    diagonal blocks is left alone.
    """
    columns = inputs.shape[1]
    size = -(-columns // _STRIPS)
    for start in range(0, columns, size):
        total[start : start + size, start:].addmm_(inputs[:, start : start + size].T, inputs[:, start:])

"""The head of a model that is larger than memory: in blocks of the vocabulary where it is too large by itself."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from qeval.models.checkpoint.safetensors_rows import StoredTensor
from qeval.models.structure.head import Head


@dataclass(frozen=True, eq=False)
class StreamedHead:
    """Reads `block` rows of the head's matrix at a time; `settings` say all but the matrix."""

    stored: StoredTensor
    settings: Head
    block: int
    device: torch.device

    @property
    def vocab_size(self) -> int:
        """The width of a row of logits."""
        return self.stored.shape[0]

    def logits(self, states: Tensor) -> Tensor:
        """Return the fp32 logits [n, vocab] of states [n, d_model]."""
        found = torch.empty(len(states), self.vocab_size, device=self.device)
        for rows, head in self._blocks():
            found[:, rows] = head.logits(states.to(self.device))
            del head  # before the next one is read
        return found

    def transposed(self, back: Tensor) -> Tensor:
        """Multiply `back` [n, vocab] by the matrix the other way: [n, d_model] in the weight's type, summed in fp32."""
        width = self.stored.shape[1]
        found = torch.zeros(len(back), width, device=self.device)
        for rows, head in self._blocks():
            found += head.transposed(back[:, rows].to(self.device)).float()
            del head
        return found.to(self.settings.weight.dtype)

    @property
    def scale(self) -> float:
        """The factor of the product."""
        return self.settings.scale

    @property
    def cap(self) -> float | None:
        """The soft cap of the logits."""
        return self.settings.cap

    def _blocks(self) -> Iterator[tuple[slice, Head]]:
        for start in range(0, self.vocab_size, self.block):
            rows = slice(start, min(start + self.block, self.vocab_size))
            yield rows, self._part(rows)

    def _part(self, rows: slice) -> Head:
        settings = self.settings
        weight = torch.empty(
            rows.stop - rows.start, self.stored.shape[1], dtype=settings.weight.dtype, device=self.device
        )
        self.stored.decode(self.stored.fetch(rows.start, rows.stop), weight)
        bias, gains = (None if each is None else each[rows] for each in (settings.bias, settings.gains))
        return Head(weight, bias, settings.scale, settings.cap, gains)


def head_of_parts(stored: StoredTensor, settings: Head, most_bytes: int, device: torch.device) -> Head | StreamedHead:
    """Return the head in memory where `most_bytes` hold it, else in blocks of it.

    A row is counted as it is read, as it is computed with, and as the product's library lays it out for itself.
    """
    row_bytes = 2 * stored.shape[1] * settings.weight.element_size() + stored.raw_bytes // stored.shape[0]
    parts = StreamedHead(stored, settings, max(1, most_bytes // row_bytes), device)
    return parts._part(slice(0, stored.shape[0])) if parts.block >= stored.shape[0] else parts

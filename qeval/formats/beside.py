"""A checkpoint's weights laid beside the baseline's: who has another's values, and what misreading would explain it.

AWQ's folded scales are taken back through the groups that `models/graph.py` found.
"""

import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qeval.errors import UsageError
from qeval.formats.base import Matrix, Values
from qeval.formats.names import Names
from qeval.formats.resemble import Resemblance, relative, resemblance, rows_of, values_of
from qeval.models.graph import Description, Group
from qeval.quant.grid import PerTensor
from qeval.quant.qweight import QWeight

OTHER_MODEL = (
    "which no quantizer changes: it was made from another model (a fine-tuned one, or one whose weights were rotated)."
)
SAME = 2e-4
"""Up to here two float tensors are one, once they have been through the same types."""
_BIAS = 0.5
"""A bias that lies further from the baseline's is missing, another's, or in another order."""
_OWN, _SAMPLE_ROWS = 0.8, 64
"""The least cosine with another of the baseline's matrices, by their first rows, that says that it is that one."""
_NUMBERS = 1 << 23
_NEARER, _OTHER = 0.8, 0.02
"""A norm that differs by more than the second is another's where matrices after it are this much nearer without it."""


@dataclass(frozen=True, eq=False)
class Baseline:
    """What a checkpoint is laid beside: parameters by name (a tied head under its own name too), structure, prefixes.

    `parameters`: as `weights_of` has them, experts one by one; `turned`: those that files hold transposed. `head_dim`:
    rows of an attention head. `prefix`: what the base model's tensors begin with, such as `model.`.
    """

    parameters: Mapping[str, Tensor]
    description: Description
    head_dim: int
    prefix: str
    turned: frozenset[str] = frozenset()

    @property
    def needed(self) -> list[str]:
        """The parameters that a checkpoint must hold: all but a tied head."""
        head = self.description.head
        return [name for name in self.parameters if not (self.description.tied and name == head)]


def apart(theirs: Tensor, ours: Tensor) -> float:
    """How far a file's floats are from the baseline's, whatever type they were kept in on their way; relative."""
    found = math.inf
    for kind in dict.fromkeys((theirs.dtype, torch.bfloat16, torch.float16)):
        found = min(found, relative(theirs, ours.to(kind)))
        if found <= SAME:
            break
    return found


def check_same(name: str, theirs: Tensor, ours: Tensor) -> None:
    """Refuse other floats than the baseline's where no quantizer changes them.

    Raises:
        UsageError: they differ by more than a type rounds.
    """
    if (far := apart(theirs, ours.cpu())) > SAME:
        raise UsageError(f"its {name} differs from the baseline's by {100 * far:.2g} %, {OTHER_MODEL}")


def check_tie(names: Names, found: Mapping[str, Matrix | Tensor], baseline: Baseline) -> None:
    """Refuse a float head of its own in a model whose head is its embedding.

    Raises:
        UsageError: the head that the file holds is not the embedding that it holds.
    """
    about = baseline.description
    if not about.tied or about.head not in names.tensors:
        return
    head, ours = names.tensors.load(about.head), as_floats(found[about.embedding])
    if head.is_floating_point() and apart(fitting(about.head, head, ours), ours) > SAME:
        raise UsageError(
            f"its {about.head} is not its {about.embedding}, though the baseline ties the two: the tie is broken."
        )


def check_resemblance(
    found: Mapping[str, Matrix | Tensor],
    inputs: Mapping[str, Tensor],
    baseline: Baseline,
    *,
    loose: Collection[str] = (),
) -> None:
    """Refuse matrices and biases that are not the baseline's, with the misreading that explains them where one does.

    `found`: those of the baseline's parameters that there are, each asked for when it is looked at. `inputs`: by what a
    linear's input is multiplied while running [columns], and its matrix was divided. `loose`: matrices whose bits are
    not known (floats of someone's simulation), of which only unrelated ones are refused.

    Raises:
        UsageError: it names the first such matrix, how many there are, and the cause.
    """
    every = _Beside(found, inputs, baseline).every()
    wrong = {name: each for name, each in every if not (each.ok or _excused(each, name in loose))}
    if not wrong:
        return
    name, first = next(iter(wrong.items()))
    words = replace(first, cause=first.cause or _whose(name, found[name], baseline)).words
    raise UsageError(f"its {name} is not the baseline's: {words} ({_others([*wrong.values()], len(found))}).")


def _whose(name: str, read: Matrix | Tensor, baseline: Baseline) -> str | None:
    """Which of the baseline's matrices another is instead, by its first rows."""
    few = values_of(rows_of(as_matrix(read), 0, _SAMPLE_ROWS)).flatten()
    ours = baseline.parameters
    alike = {
        other: float(torch.cosine_similarity(few, base[:_SAMPLE_ROWS].float().cpu().flatten(), dim=0))
        for other, base in ours.items()
        if other != name and base.shape == ours[name].shape and base.dim() == 2
    }
    nearest = max(alike, key=lambda other: alike[other], default=None)
    return f"it is the baseline's {nearest}" if nearest and alike[nearest] > _OWN else None


def _others(wrong: Sequence[Resemblance], every: int) -> str:
    """What is known of the other parameters, once the first of the wrong ones is told."""
    more, alike = len(wrong) - 1, sum(_kind(each) == _kind(wrong[0]) for each in wrong[1:])
    if not more:
        return f"nothing else of its {every} parameters is wrong"
    if alike == more:
        return f"as in {more} more of its {every} parameters"
    return f"{more} more of its {every} parameters are wrong, {alike or 'none'} of them alike"


def _kind(each: Resemblance) -> str | None:
    """Its cause, whatever the numbers in it."""
    return each.cause and re.sub(r"\d[\d.e+-]*", "", each.cause)


def _excused(each: Resemblance, loose: bool) -> bool:
    return loose and each.cause is None and each.error < 1.0


class _Beside:
    """A checkpoint's parameters beside the baseline's, group after group: what was folded in one is known in the next.

    `rows`: by what each row of a matrix was multiplied; `unfolded`: producers that are not the baseline's as they are,
    whatever scales were folded into them.
    """

    def __init__(self, found: Mapping[str, Matrix | Tensor], inputs: Mapping[str, Tensor], baseline: Baseline) -> None:
        self.found, self.inputs, self.baseline = found, inputs, baseline
        self.rows: dict[str, Tensor] = {}
        self.unfolded: dict[str, Resemblance] = {}
        self.folds = [group.fold for group in baseline.description.groups if group.fold]
        self.producers = {name for fold in self.folds for name in fold.parameters}

    def every(self) -> Iterator[tuple[str, Resemblance]]:
        """Every matrix, then the biases that are wrong; a producer in its place where that is what is wrong."""
        for group in self.baseline.description.groups:
            names = [name for name in group.names if name in self.found]
            folded = self._input_scales(group) if names else torch.ones(0)
            for name in names:
                yield self._judged(group, name, folded / self.inputs[name] if name in self.inputs else folded)
        for name in (self.baseline.description.embedding, self.baseline.description.head):
            if isinstance(own := self.found.get(name), QWeight | Values):
                yield name, _in_parts(own, self.baseline.parameters[name])
        yield from self._biases()

    def _judged(self, group: Group, name: str, scales: Tensor) -> tuple[str, Resemblance]:
        """A matrix whose columns were multiplied by `scales`; or what stands before it, if that alone is wrong."""
        base, read = self._base(name), as_matrix(self.found[name])
        values = values_of(read)
        seen = self._resemblance(name, read, values, base, scales)
        if group.fold is None:
            return name, seen
        before = group.fold.parameters[0]
        if not seen.ok and (alone := resemblance(read, base, torch.ones_like(scales))).ok:
            clipped = before in self.rows and before not in self.unfolded  # that makes rows smaller: nothing is wrong
            return (name, alone) if clipped else self._producer(before)
        if before not in self.rows and relative(values, base) < _NEARER * seen.error:
            norm = self._producer(before)
            return norm if norm[1].error > _OTHER else (name, seen)
        return name, seen

    def _resemblance(self, name: str, read: Matrix, values: Tensor, base: Tensor, scales: Tensor) -> Resemblance:
        """A matrix, of these values, as it is or with what was folded into its rows; `rows` says what that was."""
        rows = self.rows[name] = _row_factors(values, base * scales)
        seen = resemblance(read, base, scales, self._turned(name))
        if not seen.ok and name in self.producers:
            self.unfolded[name] = seen
            folded = resemblance(read, base * rows.clamp(1e-3, 1e3).unsqueeze(1), scales)
            seen = folded if folded.ok else seen
        if not seen.ok:  # what follows is not to be judged by it
            self.rows[name] = torch.ones(len(base))
        return seen

    def _producer(self, name: str) -> tuple[str, Resemblance]:
        """One that does not have the baseline's values, though what follows it has."""
        if name in self.unfolded:
            return name, self.unfolded[name]
        far = apart(as_floats(self.found[name]), self._base(name))
        return name, Resemblance(far, SAME, "no matrix after it makes good for it")

    def _biases(self) -> Iterator[tuple[str, Resemblance]]:
        """Those of another size or order: a quantizer folds scales into a bias, or corrects it a little."""
        factors = {name: fold for fold in self.folds for name in fold.parameters[1:]}
        for name, ours in self.baseline.parameters.items():
            if ours.dim() != 1 or not name.endswith("bias") or name not in self.found:
                continue
            fold = factors.get(name)
            expected = ours.float().cpu() * (self._divisions(fold.parameters[0], fold.plus_one) if fold else 1.0)
            if (far := relative(as_floats(self.found[name]), expected)) > _BIAS:
                yield name, Resemblance(far, _BIAS, "quantizers leave a bias nearly as it is")

    def _input_scales(self, group: Group) -> Tensor:
        """By what the columns of a group's matrices were multiplied, as what precedes them was divided, [columns]."""
        fold = group.fold
        if fold is None:
            return torch.ones(group.columns)
        return fold.spread(1 / fold.carried(self._divisions(fold.parameters[0], fold.plus_one)))

    def _divisions(self, name: str, plus_one: bool) -> Tensor:
        """What is left of each row of a producer: 1 where nothing was folded into it."""
        if name in self.rows:
            left = self.rows[name]
        else:
            one = float(plus_one)
            left = (as_floats(self.found[name]) + one) / (self._base(name) + one)
        return torch.where(torch.isfinite(left) & (left > 0), left, torch.ones_like(left))

    def _turned(self, name: str) -> int | None:
        """The rows of a head where rotary positions turn a linear's output: the first projections of a layer."""
        return self.baseline.head_dim if ".q_proj." in name or ".k_proj." in name else None

    def _base(self, name: str) -> Tensor:
        return self.baseline.parameters[name].float().cpu()


def _in_parts(read: Matrix, base: Tensor) -> Resemblance:
    """A vocabulary's matrix, so many rows at a time that they take little memory; the first part that is wrong."""
    whole = isinstance(read, QWeight) and isinstance(read.grid.granularity, PerTensor)
    rows = len(base) if whole else max(_SAMPLE_ROWS, _NUMBERS // base.shape[1])
    for start in range(0, len(base), rows):
        part = base[start : start + rows].float().cpu()
        seen = resemblance(rows_of(read, start, start + rows), part, torch.ones(base.shape[1]))
        if not seen.ok:
            return replace(seen, strays=tuple(start + row for row in seen.strays))
    return seen


def _row_factors(values: Tensor, base: Tensor) -> Tensor:
    """The factor of each row that brings `base` nearest to `values` (least squares), [rows]."""
    return (values * base).sum(1) / base.square().sum(1).clamp(min=1e-30)


def fitting(name: str, theirs: Tensor, ours: Tensor) -> Tensor:
    """A tensor of the baseline's shape: rows beyond its vocabulary are padding, which no token names.

    Raises:
        UsageError: it is of another shape.
    """
    if theirs.dim() == ours.dim() == 2 and theirs.shape[1] == ours.shape[1] and len(theirs) > len(ours):
        theirs = theirs[: len(ours)]
    if theirs.dim() == ours.dim() == 2 and theirs.shape[1] == ours.shape[1] and len(theirs) < len(ours):
        raise UsageError(
            f"its {name} lacks rows {len(theirs)} to {len(ours) - 1} of the baseline's: where these are ids, it has no "
            "probability for them, and the two can't be compared."
        )
    if theirs.shape != ours.shape:
        raise UsageError(f"it holds {name} of {list(theirs.shape)} where the baseline has {list(ours.shape)}.")
    return theirs


def as_matrix(read: Matrix | Tensor) -> Matrix:
    """What was read as a matrix: floats as values of their own type and size."""
    if isinstance(read, QWeight | Values):
        return read
    return Values(read.float(), dtype_name(read), read.numel() * read.element_size() * 8)


def as_floats(read: Matrix | Tensor) -> Tensor:
    """The values of what was read, fp32."""
    return values_of(read) if isinstance(read, QWeight | Values) else read.float()


def dtype_name(tensor: Tensor) -> str:
    """Such as `float16`."""
    return str(tensor.dtype).removeprefix("torch.")

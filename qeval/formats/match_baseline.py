"""A checkpoint's weights laid beside the baseline's: who has another's values, and what misreading would explain it.

AWQ's folded scales are taken back through the groups that `models/structure/graph.py` found.
"""

import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qeval.arithmetic import dtype_name
from qeval.errors import UsageError
from qeval.formats.base import DecodedMatrix, Values
from qeval.formats.misreadings import Resemblance, compare_matrix, relative_error, rows_of, values_of
from qeval.formats.names import TensorNames
from qeval.models.structure.graph import Description, Group
from qeval.models.structure.weight_views import is_expert, stack_of
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
class BaselineWeights:
    """The baseline's parameters by name (a tied head under its own name too), structure and prefixes.

    `parameters`: as `weights_of` has them, experts one by one; `turned`: those that files hold transposed. `head_dim`:
    rows of an attention head. `prefix`: what the base model's tensors begin with, such as `model.`.
    """

    parameters: Mapping[str, Tensor]
    description: Description
    head_dim: int
    prefix: str
    turned: frozenset[str] = frozenset()

    def as_matrix(self, name: str, stored: Tensor, tensor: str | None) -> Tensor:
        """Return a parameter that lies in a file as it is, as `parameters` have it.

        Args:
            name: The parameter.
            stored: Its values in the file.
            tensor: The file's name for it; an expert that lies apart from its stack is a linear's, and never turned.
        """
        is_apart = is_expert(name) and (tensor or "").endswith(".weight")
        return stored.T if stack_of(name) in self.turned and not is_apart else stored

    @property
    def needed(self) -> list[str]:
        """The parameters that a checkpoint must hold: all but a tied head."""
        head = self.description.head
        return [name for name in self.parameters if not (self.description.tied and name == head)]


def relative_distance(values: Tensor, base: Tensor) -> float:
    """Return how far a file's floats are from the baseline's, whatever type they were kept in; relative."""
    distance = math.inf
    for kind in dict.fromkeys((values.dtype, torch.bfloat16, torch.float16)):
        distance = min(distance, relative_error(values, base.to(kind)))
        if distance <= SAME:
            break
    return distance


def check_same(name: str, values: Tensor, base: Tensor) -> None:
    """Refuse other floats than the baseline's where no quantizer changes them.

    Raises:
        UsageError: They differ by more than a type rounds.
    """
    if (far := relative_distance(values, base.cpu())) > SAME:
        raise UsageError(f"its {name} differs from the baseline's by {100 * far:.2g} %, {OTHER_MODEL}")


def check_tie(names: TensorNames, matrices: Mapping[str, DecodedMatrix | Tensor], baseline: BaselineWeights) -> None:
    """Refuse a float head of its own in a model whose head is its embedding.

    Raises:
        UsageError: The head that the file holds is not the embedding that it holds.
    """
    about = baseline.description
    if not about.tied or about.head not in names.tensors:
        return
    head, embedding = names.tensors.load(about.head), float_values(matrices[about.embedding])
    if head.is_floating_point() and relative_distance(fit_shape(about.head, head, embedding), embedding) > SAME:
        raise UsageError(
            f"its {about.head} is not its {about.embedding}, though the baseline ties the two: the tie is broken."
        )


def check_resemblance(
    matrices: Mapping[str, DecodedMatrix | Tensor],
    inputs: Mapping[str, Tensor],
    baseline: BaselineWeights,
    *,
    loose: Collection[str] = (),
) -> None:
    """Refuse matrices and biases that are not the baseline's, with the misreading that explains them where one does.

    Args:
        matrices: Those of the baseline's parameters that there are, each read when it is looked at.
        inputs: By what a linear's input is multiplied while running [columns], and its matrix was divided.
        baseline: The weights that they are compared with.
        loose: Matrices whose bits are not known (floats of someone's simulation), of which only unrelated ones are
            refused.

    Raises:
        UsageError: It names the first such matrix, how many there are, and the cause.
    """
    judged = _Comparison(matrices, inputs, baseline).judge_all()
    wrong = {name: each for name, each in judged if not (each.ok or _is_excused(each, name in loose))}
    if not wrong:
        return
    name, first = next(iter(wrong.items()))
    words = replace(first, cause=first.cause or _actual_matrix(name, matrices[name], baseline)).words
    raise UsageError(
        f"its {name} is not the baseline's: {words} ({_describe_others([*wrong.values()], len(matrices))})."
    )


def _actual_matrix(name: str, read: DecodedMatrix | Tensor, baseline: BaselineWeights) -> str | None:
    """Return which of the baseline's matrices another is instead, by its first rows."""
    few = values_of(rows_of(as_matrix(read), 0, _SAMPLE_ROWS)).flatten()
    parameters = baseline.parameters
    alike = {
        other: float(torch.cosine_similarity(few, base[:_SAMPLE_ROWS].float().cpu().flatten(), dim=0))
        for other, base in parameters.items()
        if other != name and base.shape == parameters[name].shape and base.dim() == 2
    }
    nearest = max(alike, key=lambda other: alike[other], default=None)
    return f"it is the baseline's {nearest}" if nearest and alike[nearest] > _OWN else None


def _describe_others(wrong: Sequence[Resemblance], count: int) -> str:
    """Return what is known of the other parameters, once the first of the wrong ones is named."""
    more, alike = len(wrong) - 1, sum(_cause_kind(each) == _cause_kind(wrong[0]) for each in wrong[1:])
    if not more:
        return f"nothing else of its {count} parameters is wrong"
    if alike == more:
        return f"as in {more} more of its {count} parameters"
    return f"{more} more of its {count} parameters are wrong, {alike or 'none'} of them alike"


def _cause_kind(each: Resemblance) -> str | None:
    """Return its cause, whatever the numbers in it."""
    return each.cause and re.sub(r"\d[\d.e+-]*", "", each.cause)


def _is_excused(each: Resemblance, loose: bool) -> bool:
    return loose and each.cause is None and each.error < 1.0


class _Comparison:
    """A checkpoint's parameters beside the baseline's, group after group: what was folded in one is known in the next.

    `rows`: by what each row of a matrix was multiplied; `unfolded`: producers that are not the baseline's as they are,
    whatever scales were folded into them.
    """

    def __init__(
        self, matrices: Mapping[str, DecodedMatrix | Tensor], inputs: Mapping[str, Tensor], baseline: BaselineWeights
    ) -> None:
        self.found, self.inputs, self.baseline = matrices, inputs, baseline
        self.rows: dict[str, Tensor] = {}
        self.unfolded: dict[str, Resemblance] = {}
        self.folds = [group.fold for group in baseline.description.groups if group.fold]
        self.producers = {name for fold in self.folds for name in fold.parameters}

    def judge_all(self) -> Iterator[tuple[str, Resemblance]]:
        """Yield every matrix, then the biases that are wrong; a producer in its place where that is what is wrong."""
        for group in self.baseline.description.groups:
            names = [name for name in group.names if name in self.found]
            folded = self._input_scales(group) if names else torch.ones(0)
            for name in names:
                yield self._judge(group, name, folded / self.inputs[name] if name in self.inputs else folded)
        for name in (self.baseline.description.embedding, self.baseline.description.head):
            if isinstance(matrix := self.found.get(name), QWeight | Values):
                yield name, _compare_in_parts(matrix, self.baseline.parameters[name])
        yield from self._biases()

    def _judge(self, group: Group, name: str, scales: Tensor) -> tuple[str, Resemblance]:
        """Judge a matrix whose columns were multiplied by `scales`; or what precedes it, if that alone is wrong."""
        base, read = self._base(name), as_matrix(self.found[name])
        values = values_of(read)
        seen = self._compare(name, read, values, base, scales)
        if group.fold is None:
            return name, seen
        before = group.fold.parameters[0]
        if not seen.ok and (alone := compare_matrix(read, base, torch.ones_like(scales))).ok:
            clipped = before in self.rows and before not in self.unfolded  # that makes rows smaller: nothing is wrong
            return (name, alone) if clipped else self._judge_producer(before)
        if before not in self.rows and relative_error(values, base) < _NEARER * seen.error:
            norm = self._judge_producer(before)
            return norm if norm[1].error > _OTHER else (name, seen)
        return name, seen

    def _compare(self, name: str, read: DecodedMatrix, values: Tensor, base: Tensor, scales: Tensor) -> Resemblance:
        """Compare a matrix, of these values, as it is or with what was folded into its rows; keep that in `rows`."""
        rows = self.rows[name] = _row_factors(values, base * scales)
        seen = compare_matrix(read, base, scales, self._rotary_rows(name))
        if not seen.ok and name in self.producers:
            self.unfolded[name] = seen
            folded = compare_matrix(read, base * rows.clamp(1e-3, 1e3).unsqueeze(1), scales)
            seen = folded if folded.ok else seen
        if not seen.ok:  # what follows is not to be judged by it
            self.rows[name] = torch.ones(len(base))
        return seen

    def _judge_producer(self, name: str) -> tuple[str, Resemblance]:
        """Return one that does not have the baseline's values, though what follows it has."""
        if name in self.unfolded:
            return name, self.unfolded[name]
        far = relative_distance(float_values(self.found[name]), self._base(name))
        return name, Resemblance(far, SAME, "no matrix after it makes good for it")

    def _biases(self) -> Iterator[tuple[str, Resemblance]]:
        """Yield biases of another size or order: a quantizer folds scales into a bias, or corrects it a little."""
        factors = {name: fold for fold in self.folds for name in fold.parameters[1:]}
        for name, base in self.baseline.parameters.items():
            if base.dim() != 1 or not name.endswith("bias") or name not in self.found:
                continue
            fold = factors.get(name)
            expected = base.float().cpu() * (self._divisions(fold.parameters[0], fold.plus_one) if fold else 1.0)
            if (far := relative_error(float_values(self.found[name]), expected)) > _BIAS:
                yield name, Resemblance(far, _BIAS, "quantizers leave a bias nearly as it is")

    def _input_scales(self, group: Group) -> Tensor:
        """Return what the columns of a group's matrices were multiplied by, [columns].

        What precedes them was divided by the same.
        """
        fold = group.fold
        if fold is None:
            return torch.ones(group.columns)
        return fold.spread(1 / fold.carried(self._divisions(fold.parameters[0], fold.plus_one)))

    def _divisions(self, name: str, plus_one: bool) -> Tensor:
        """Return what is left of each row of a producer: 1 where nothing was folded into it."""
        if name in self.rows:
            left = self.rows[name]
        else:
            one = float(plus_one)
            left = (float_values(self.found[name]) + one) / (self._base(name) + one)
        return torch.where(torch.isfinite(left) & (left > 0), left, torch.ones_like(left))

    def _rotary_rows(self, name: str) -> int | None:
        """Return the rows of a head where rotary positions rotate a linear's output: a layer's first projections."""
        return self.baseline.head_dim if ".q_proj." in name or ".k_proj." in name else None

    def _base(self, name: str) -> Tensor:
        return self.baseline.parameters[name].float().cpu()


def _compare_in_parts(read: DecodedMatrix, base: Tensor) -> Resemblance:
    """Compare a vocabulary's matrix so many rows at a time that they take little memory.

    Returns the first part that is wrong.
    """
    whole = isinstance(read, QWeight) and isinstance(read.grid.granularity, PerTensor)
    rows = len(base) if whole else max(_SAMPLE_ROWS, _NUMBERS // base.shape[1])
    for start in range(0, len(base), rows):
        part = base[start : start + rows].float().cpu()
        seen = compare_matrix(rows_of(read, start, start + rows), part, torch.ones(base.shape[1]))
        if not seen.ok:
            return replace(seen, strays=tuple(start + row for row in seen.strays))
    return seen


def _row_factors(values: Tensor, base: Tensor) -> Tensor:
    """Return the factor of each row that brings `base` nearest to `values` (least squares), [rows]."""
    return (values * base).sum(1) / base.square().sum(1).clamp(min=1e-30)


def fit_shape(name: str, values: Tensor, base: Tensor) -> Tensor:
    """Return a tensor of the baseline's shape: rows beyond its vocabulary are padding, which no token names.

    Raises:
        UsageError: It is of another shape.
    """
    if values.dim() == base.dim() == 2 and values.shape[1] == base.shape[1] and len(values) > len(base):
        values = values[: len(base)]
    if values.dim() == base.dim() == 2 and values.shape[1] == base.shape[1] and len(values) < len(base):
        raise UsageError(
            f"its {name} lacks rows {len(values)} to {len(base) - 1} of the baseline's: where these are ids, it has no "
            "probability for them, and the two can't be compared."
        )
    if values.shape != base.shape:
        raise UsageError(f"it holds {name} of {list(values.shape)} where the baseline has {list(base.shape)}.")
    return values


def as_matrix(read: DecodedMatrix | Tensor) -> DecodedMatrix:
    """Return what was read as a matrix: floats as values of their own type and size."""
    if isinstance(read, QWeight | Values):
        return read
    return Values(read.float(), dtype_name(read.dtype), read.numel() * read.element_size() * 8)


def float_values(read: DecodedMatrix | Tensor) -> Tensor:
    """Return the values of what was read, fp32."""
    return values_of(read) if isinstance(read, QWeight | Values) else read.float()

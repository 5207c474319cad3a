"""From float groups to quantized ones: scales chosen, folded into what precedes, blocks clipped, weights rounded."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from qeval.models.structure.graph import Fold, Group
from qeval.quant.awq import ScaleChoice, choose_clip, choose_scales
from qeval.quant.grid import WeightGrid
from qeval.quant.qweight import QWeight
from qeval.quant.rtn import quantize_rtn
from qeval.quant.statistics import InputStatistics

Parameters = Mapping[str, Tensor]
Grids = Mapping[str, WeightGrid]
"""The grid of every weight that is quantized, by name; what is missing stays in float."""

_EXPLICIT_GAIN = 0.99
"""An explicit input multiplication must bring the loss below this share of a foldable scale's; it costs at run time."""


@dataclass(frozen=True, eq=False)
class Scaled:
    """A group's input scales [columns], and what takes their inverse: `fold`, or the input itself when None.

    `followers` are multiplied by the scales too, in float.
    """

    names: tuple[str, ...]
    choice: ScaleChoice
    fold: Fold | None
    followers: tuple[str, ...] = ()

    @property
    def by_row(self) -> Tensor:
        """The scales as the folded producer's rows see them."""
        assert self.fold is not None
        return self.fold.tie(self.choice.scales)


Scales = Mapping[str, Scaled]
"""By the first name of the group; groups whose best scaling is none are missing."""


@dataclass(frozen=True, eq=False)
class Search:
    """AWQ's searches over one model and one calibration text; what was searched once is not searched again.

    Neither a group's scales nor its clips depend on other groups: dividing a row by a number changes the share of its
    range that is best to keep by rounding alone, so clips are those of the undivided rows. Where a scale spans rows
    they are not, and the clips of a matrix whose rows are divided are searched each time.
    """

    parameters: Parameters
    statistics: Mapping[str, InputStatistics]
    _scales: dict[tuple[object, ...], Scaled | None] = field(default_factory=dict)
    _clips: dict[tuple[object, ...], Tensor] = field(default_factory=dict)

    def scales(self, groups: Sequence[Group], grids: Grids, *, fold_only: bool) -> dict[str, Scaled]:
        """Return the scales of every group that gains by scaling, by the group's first name.

        Args:
            groups: The groups.
            grids: The grid of every weight that is quantized.
            fold_only: Whether scales that nothing before takes are left out.
        """
        by_group = {group.names[0]: self._group_scales(group, grids, fold_only) for group in groups}
        return {name: scaled for name, scaled in by_group.items() if scaled is not None}

    def clip(
        self, name: str, matrix: Tensor, grid: WeightGrid, group: Group, scaled: Scaled | None, *, divided: bool
    ) -> Tensor:
        """Return the share of its range that each block of `matrix` keeps.

        Args:
            name: The weight.
            matrix: Its values [rows, columns] fp32, multiplied by the group's scales.
            grid: Its grid.
            group: The group that it is in.
            scaled: The group's scales, or None.
            divided: Whether rows of `matrix` are divided by the scales of a group that it precedes.
        """
        key = (name, grid, None if scaled is None else (scaled.choice.alpha, scaled.fold is None))
        if key in self._clips and not divided:
            return self._clips[key]
        inputs = self.statistics.get(group.names[0])
        if inputs is not None and scaled is not None:
            inputs = inputs.scaled(scaled.choice.scales)
        clips = choose_clip(matrix, grid, None if inputs is None else inputs.sketch)
        if not divided:
            self._clips[key] = clips
        return clips

    def forget(self) -> None:
        """Drop what was searched."""
        self._scales.clear()
        self._clips.clear()

    def _group_scales(self, group: Group, grids: Grids, fold_only: bool) -> Scaled | None:
        key = (group.names, tuple(grids.get(name) for name in group.names), fold_only)
        if key not in self._scales:
            self._scales[key] = _scale_group(group, self.parameters, grids, self.statistics, fold_only)
        return self._scales[key]


def _scale_group(
    group: Group, parameters: Parameters, grids: Grids, statistics: Mapping[str, InputStatistics], fold_only: bool
) -> Scaled | None:
    """Return the scales of a group; None where no linear of it is quantized, no token reached it, or none helps.

    Where the fold ties channels (grouped queries), a tied scale and a free one applied to the input explicitly are
    both tried, and the better by measured loss is taken; with `fold_only` it is the tied one.
    """
    names = tuple(name for name in group.names if name in grids)
    fold = group.fold if names == group.names else None  # a linear left in float would see folded inputs
    inputs = statistics.get(group.names[0])
    if not names or inputs is None or (fold is None and (fold_only or not group.is_explicit)):
        return None

    weights, group_grids = [parameters[name].float() for name in names], [grids[name] for name in names]
    choice = choose_scales(weights, group_grids, inputs)
    if fold is not None and fold.repeat > 1:
        tied = choose_scales(weights, group_grids, inputs, magnitude=fold.spread(fold.tie(inputs.magnitude)))
        explicit = not fold_only and choice.loss < _EXPLICIT_GAIN * tied.loss
        choice, fold = (choice, None) if explicit else (tied, fold)
    return None if choice.alpha == 0.0 else Scaled(names, choice, fold, group.followers)


def row_divisors(scales: Scales, parameters: Parameters) -> dict[str, Tensor]:
    """Return what the rows of each matrix that precedes a scaled group are divided by, [rows] by name."""
    return {
        name: scaled.fold.divisors(scaled.by_row, len(parameters[name]))
        for scaled in scales.values()
        if scaled.fold is not None
        for name in scaled.fold.parameters
        if parameters[name].dim() == 2
    }


def folded_floats(scales: Scales, parameters: Parameters, grids: Grids) -> dict[str, Tensor]:
    """Return the float tensors that folding changes: norms, biases, preceding matrices in float, and followers."""
    divided = {
        name: scaled.fold.folded(parameters[name], scaled.by_row)
        for scaled in scales.values()
        if scaled.fold is not None
        for name in scaled.fold.parameters
        if name not in grids
    }
    return divided | {
        name: (parameters[name].float() * scaled.choice.scales).to(parameters[name].dtype)
        for scaled in scales.values()
        if scaled.fold is not None
        for name in scaled.followers
    }


def explicit_scales(scales: Scales) -> dict[str, Tensor]:
    """Return what the inputs of linears are multiplied by where nothing before can take it, [columns] by name."""
    return {
        name: 1 / scaled.choice.scales for scaled in scales.values() if scaled.fold is None for name in scaled.names
    }


def quantize_groups(
    search: Search,
    groups: Sequence[Group],
    grids: Grids,
    scales: Scales,
    divisors: Mapping[str, Tensor],
    *,
    clip: bool,
) -> dict[str, QWeight]:
    """Quantize the matrices of groups: rows divided, columns multiplied, blocks clipped, then rounded.

    Args:
        search: The weights, and the clips that were searched before.
        groups: What to quantize.
        grids: The grid of every weight that is quantized.
        scales: The groups' input scales.
        divisors: What rows are divided by, [rows] by name.
        clip: Whether the range of each block is searched.
    """
    weights = {}
    for group in groups:
        scaled = scales.get(group.names[0])
        for name in group.names:
            if name not in grids:
                continue
            weight, grid = search.parameters[name].float(), grids[name]
            matrix = weight / divisors[name].unsqueeze(1) if name in divisors else weight
            matrix = matrix * scaled.choice.scales if scaled else matrix

            shares = None
            if clip:
                divided = name in divisors and grid.spans_rows
                undivided = weight * scaled.choice.scales if scaled else weight
                searched = matrix if divided else undivided
                shares = search.clip(name, searched, grid, group, scaled, divided=divided)
            weights[name] = quantize_rtn(matrix, grid, shares)
    return weights


def effective(name: str, weight: QWeight, scaled: Scaled | None, divisors: Mapping[str, Tensor]) -> Tensor:
    """Return what a quantized matrix does in the unfolded model, [rows, columns] fp32."""
    matrix = weight.dequantize()
    matrix = matrix / scaled.choice.scales if scaled else matrix
    return matrix * divisors[name].unsqueeze(1) if name in divisors else matrix

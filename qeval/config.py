"""Recipes: a method, the grid of every weight, and a scheme, from a name that a user types.

`recipe_files.py` reads them from YAML. Config stops here: below this module functions take explicit arguments.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args

from qeval.errors import UsageError, unknown
from qeval.methods import METHODS, QuantMethod
from qeval.quant.candidates import CANDIDATE_MARK, UNQUANTIZED, candidate_formats
from qeval.quant.grid import (
    DEFAULT_GRID,
    FLOAT,
    FloatGrid,
    WeightGrid,
    names_float,
    parse,
    with_span,
)
from qeval.quant.scheme import (
    ROTATION,
    W8A8,
    PartName,
    RotationPlaces,
    Scheme,
    parse_parts,
    parse_rotation,
    scheme_of,
    split_w8a8,
)
from qeval.recipe_checks import UNNAMED_GRID, refuse_impossible
from qeval.recipe_words import PRESETS, read_formats, read_words, replaces_part, unknown_method

Importance = Literal["measured", "fisher", "positional"]
"""How mixed methods rank groups: KL measured one by one; predicted in one pass, proposals measured; by position."""
FORMAT_FIELDS = get_args(PartName)
"""The fields of a recipe that hold formats of a scheme."""
PART_FIELDS = (*FORMAT_FIELDS, ROTATION)
"""The fields of a recipe that parts of its name after a `+` give."""
BASELINE = "baseline"
"""The name of the unquantized model in every row; no variant may take it."""

_DEFAULT_DAMPING = 0.01
_DEFAULT_ALPHA = 0.5
_HIGH_BITS = 8


@dataclass(frozen=True)
class GridRule:
    """For weights whose name matches `match` (a shell pattern): a grid's name, or `float` to leave them."""

    match: str
    grid: str


@dataclass(frozen=True)
class Recipe:
    """A way to make one variant: a method with the grid of every weight.

    Grids are stored as they were written, since a recipe's identity is part of stored keys; `low_grid` and `high_grid`
    are what the names mean.

    Attributes:
        name: What the variant is called.
        method: A key of `METHODS`.
        grid: The name of the grid of all weights without another one.
        high: In a mix, the name of the grid of the weights that matter most; None for the low one with 8 bits.
        clip: Whether the range of each block is searched; None for the method's default.
        budget: In a mix, the size in bits per weight; None for the size of the positional rule.
        importance: In a mix, how groups are ranked.
        quantize_head: Whether the head is quantized too.
        rules: Grids by the names of weights; the first that matches counts.
        damping: Of gptq, as a share of the mean second moment; None for 0.01.
        act_order: Of gptq, whether the largest moments go first; None for yes.
        algorithm: Another tool's word for what it does.
        alpha: Of smoothquant, the share of activations' outliers that the weights take; None for 0.5.
        fold_only: Of awq, whether inputs are scaled only where preceding weights take the scales, so that the result is
            a plain model: nothing is multiplied while running.
        activations: The format of the inputs of quantized linears; None leaves them as they are.
        keys: The format of keys, after the rotary embedding; None leaves them as they are.
        values: The format of values; None leaves them as they are.
        rotation: The places in which the model is rotated before, such as `r1r2`; None for nowhere.
        formats: In a mix, the names of the grids that each group of linears gets one of, `bf16` to leave it in float;
            empty where `grid` and `high` say the two widths.
    """

    name: str
    method: str
    grid: str = UNNAMED_GRID
    high: str | None = None
    clip: bool | None = None
    budget: float | None = None
    importance: Importance = "measured"
    quantize_head: bool = False
    rules: tuple[GridRule, ...] = field(default=())
    damping: float | None = None
    act_order: bool | None = None
    algorithm: str | None = None
    alpha: float | None = None
    fold_only: bool = False
    activations: str | None = None
    keys: str | None = None
    values: str | None = None
    rotation: str | None = None
    formats: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse what no variant can be made from."""
        if self.method not in METHODS:
            raise unknown("method", self.method, METHODS)
        if self.name == BASELINE or not self.name:
            raise UsageError(f"A variant cannot be named '{self.name}'; that name is the unquantized model's.")
        refuse_impossible(self)

    @property
    def quant_method(self) -> QuantMethod:
        """The row of the method in `METHODS`."""
        return METHODS[self.method]

    @property
    def scheme(self) -> Scheme:
        """The formats of activations, keys and values, and whether inputs are turned while running."""
        formats = scheme_of({part: getattr(self, part) for part in FORMAT_FIELDS})
        return replace(formats, rotates_inputs=self.rotations is not None and self.rotations.online)

    @property
    def rotations(self) -> RotationPlaces | None:
        """The places in which the model is rotated before its weights are rounded; None for nowhere."""
        return None if self.rotation is None else parse_rotation(self.rotation)

    @property
    def weights_alone(self) -> "Recipe":
        """The recipe without formats, but rotated too; of one that leaves the weights in float there is none."""
        name = self.name.partition("+")[0] + (f"+{self.rotation}" if self.rotation else "")
        return replace(self, name=name, activations=None, keys=None, values=None)

    @property
    def calibrated(self) -> bool:
        """Return whether making the variant needs calibration text; a mix by position alone does not."""
        mixes = self.quant_method.mixes and self.importance != "positional"
        return self.quant_method.calibrated or mixes or self.scheme.is_static

    @property
    def needs_statistics(self) -> bool:
        """Return whether the statistics of all layer inputs are needed, not just the text."""
        method = self.quant_method
        return method.scales_inputs or (self.calibrated and self.clips and method.rounding == "nearest")

    @property
    def low_grid(self) -> WeightGrid:
        """The grid of every weight that neither a mix nor a rule gives another one; of formats, the cheapest."""
        return self._whole(parse(self.candidates[0]) if self.formats else self._base)

    @property
    def _base(self) -> WeightGrid:
        """The grid that the names of `high` and of rules leave parts out of; among formats each stands for itself."""
        return DEFAULT_GRID if self.formats else parse(self.grid)

    def _whole(self, grid: WeightGrid) -> WeightGrid:
        """Return a grid with the range that no name says; another tool's method has a range of its own."""
        return grid if self.quant_method.rounding == "external" else with_span(grid)

    @property
    def trial_grids(self) -> tuple[str, ...]:
        """The names of the grids that every group of a mix is tried on: the low one, or all of its formats."""
        return tuple(name for name in self.candidates if name != FLOAT) or (self.grid,)

    @property
    def candidates(self) -> tuple[str, ...]:
        """The whole names of `formats`, `float` among them, the one that takes the fewest bits first."""
        return candidate_formats(self.name, self.formats) if self.formats else ()

    @property
    def high_grid(self) -> WeightGrid:
        """The grid of the weights that matter most in a mix: the low one with 8 bits, unless `high` names another."""
        low = self._base
        if self.high is None and not isinstance(low, FloatGrid):
            return self._whole(replace(low, bits=_HIGH_BITS))
        return self._whole(parse(self.high or "", low))

    @property
    def damping_share(self) -> float:
        """The share of the mean second moment that gptq adds to every one; 1 % as in its paper."""
        return _DEFAULT_DAMPING if self.damping is None else float(self.damping)

    @property
    def smoothing(self) -> float:
        """The share of activations' outliers that smoothquant moves into the weights; a half, as in its paper."""
        return _DEFAULT_ALPHA if self.alpha is None else float(self.alpha)

    @property
    def orders_by_moment(self) -> bool:
        """Return whether gptq takes the columns with the largest second moments first."""
        return self.act_order is not False

    @property
    def clips(self) -> bool:
        """Return whether each block's range is searched."""
        return self.quant_method.clips if self.clip is None else self.clip

    def rule_for(self, name: str) -> str | None:
        """Return the grid of the first rule that matches a weight's name, or None."""
        return next((rule.grid for rule in self.rules if fnmatchcase(name, rule.match)), None)

    def rule_grid(self, rule: str) -> WeightGrid:
        """Return the grid that the name in a rule means: what it leaves out is that of the other weights."""
        return self._whole(parse(rule, self._base))

    def identity(self) -> dict[str, Any]:
        """Return all but the name: what changes the numbers. It is part of stored keys, so its form never changes."""
        rounding = self.quant_method.rounding
        fields = asdict(self)
        del fields["name"]
        if rounding != "external":
            del fields["algorithm"]
        if names_float(self.grid):
            fields["grid"] = str(self.low_grid)
        elif rounding not in ("external", "none"):
            fields |= self._spanned_names()

        # what is not used is not named, so that keys from before schemes hold
        for part in ("alpha", "fold_only", "formats", *PART_FIELDS):
            del fields[part]
        fields |= {part: str(each) for part, each in self.scheme.formats.items()}
        if self.fold_only:
            fields |= {"fold_only": True}
        if self.rotations:
            fields[ROTATION] = str(self.rotations)
        if self.formats:
            fields["formats"] = list(self.candidates)

        # what a method does by default is written out, so that its default form has one identity
        fields |= {"clip": self.clips}
        if rounding == "sequential":
            fields |= {"damping": self.damping_share, "act_order": self.orders_by_moment}
        if rounding == "smoothed":
            fields |= {"alpha": self.smoothing}
        return fields

    def _spanned_names(self) -> dict[str, Any]:
        """Return the fields of grids' names, with the ranges that they leave out."""
        base = self._base
        grid, high = self.grid, self.high
        if not self.formats:
            grid = _spanned(self.grid, DEFAULT_GRID)
            high = high if high is None else _spanned(high, base)
        if self.quant_method.mixes and high is None and grid != self.grid:
            high = str(self.high_grid)  # where the low grid's name says a range, the high one has it too
        rules = [
            {"match": rule.match, "grid": rule.grid if rule.grid == FLOAT else _spanned(rule.grid, base)}
            for rule in self.rules
        ]
        return {"grid": grid, "high": high, "rules": rules}


def _spanned(name: str, base: WeightGrid) -> str:
    """Return a grid's name with the default range that it leaves out; `full`, the range of older keys, stays unsaid."""
    grid = parse(name, base)
    whole = with_span(grid)
    return name if whole == grid or isinstance(whole, FloatGrid) else f"{name}-{whole.span}"


@dataclass(frozen=True)
class Defaults:
    """Settings by flags, for every recipe that has none of its own."""

    budget: float | None = None
    importance: Importance = "measured"
    quantize_head: bool = False


def parse_method(text: str, defaults: Defaults = Defaults()) -> Recipe:
    """Return the recipe that a name such as `awq:int4-g128`, `mixed-rtn:4.8bpw` or `nvfp4` means.

    A grid of floats without a method means `rtn`. Formats with a `/` between are those that a mix chooses among:
    `mixed:int4-g128/fp8-tile128/bf16-5bpw`.

    What follows a `+` says how activations, keys and values are rounded, `awq+kv-int8`, `fp16+kv-q4_0`, and where the
    model is rotated before: `rtn:int4-channel+r1r2`.

    Raises:
        UsageError: The method is unknown (the nearest are listed), or does not take a word of the name.
    """
    return recipe_from(text.strip(), defaults, {})


def recipe_from(name: str, defaults: Defaults, fields: Mapping[str, Any]) -> Recipe:
    """Return the recipe of a name; formats of activations, keys and values in `fields` stand above the name's."""
    weights, *parts = name.split("+")
    named, *preset = PRESETS.get(weights, weights).split("+")
    scheme: dict[str, Any] = {**parse_parts(preset), **parse_parts(parts), **fields}
    method, colon, words = named.partition(":")
    if method in UNQUANTIZED:
        method = "none"
    if not colon and names_float(method):
        method, words = "rtn", method
    if method not in METHODS:
        if names_float(method):
            raise UsageError(f"'{name}': {method} is a format, not a method; say {method} alone, or rtn:{method}.")
        raise unknown_method(method)
    rounding = METHODS[method].rounding
    if rounding == "external" and CANDIDATE_MARK not in words:
        return replace(_parse_tool(name, method, words), **scheme)
    if rounding == "none" and words:
        raise UsageError(f"'{name}': {weights.partition(':')[0]} leaves the weights in float and takes no words.")

    options: dict[str, Any] = {"quantize_head": defaults.quantize_head and rounding != "none"}
    if METHODS[method].mixes:
        options |= {"budget": defaults.budget, "importance": defaults.importance}

    if CANDIDATE_MARK in words:
        named_options, candidates = read_formats(words)
        return Recipe(name=name, method=method, formats=candidates, **options | named_options, **scheme)
    named_options, grid = read_words(words)
    options |= named_options
    grid = grid or METHODS[method].words.split("-")
    if W8A8 in grid:
        grid, formats = split_w8a8(name, grid)
        scheme = {**formats, **scheme}
    grid_name = "-".join(grid) or UNNAMED_GRID
    grid_name = str(parse(grid_name)) if names_float(grid_name) else grid_name  # with what a short name leaves out
    return Recipe(name=name, method=method, grid=grid_name, **options, **scheme)


def _parse_tool(name: str, method: str, words: str) -> Recipe:
    """Return the recipe of another tool's method: `torchao:int4wo`, `hqq:int4-g64`, `ort:k_quant-g128`."""
    algorithms = METHODS[method].algorithms
    parts = words.split("-") if words else []
    algorithm = next((word for word in parts if word in algorithms), next(iter(algorithms)))

    # the user's words for the grid take the place of the algorithm's for the same part
    grid = [word for word in parts if word != algorithm]
    defaults = [word for word in algorithms[algorithm].split("-") if not replaces_part(grid, word)]
    return Recipe(name=name, method=method, grid="-".join([*defaults, *grid]), algorithm=algorithm or None)


def parse_methods(text: str, defaults: Defaults = Defaults()) -> list[Recipe]:
    """Return the recipes of a comma-separated list of method names."""
    names = [name for name in (part.strip() for part in text.split(",")) if name]
    if not names:
        raise UsageError("--methods names no method; say for example --methods rtn,awq,mixed.")
    return [parse_method(name, defaults) for name in names]


def parse_budget(text: str, where: str = "--budget") -> float:
    """Return the bits per weight of `4.8bpw` (or `4.8`); `where` is what an error names.

    >>> parse_budget("4.8bpw")
    4.8
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(?:bpw)?", text.strip())
    if not match:
        raise UsageError(f"{where} takes bits per weight such as 4.8bpw, not '{text}'.")
    return float(match[1])


def check_distinct(recipes: Iterable[Recipe]) -> None:
    """Refuse two variants of one name."""
    names: set[str] = set()
    for recipe in recipes:
        if recipe.name in names:
            raise UsageError(f"Two variants are named '{recipe.name}'; names must be distinct.")
        names.add(recipe.name)

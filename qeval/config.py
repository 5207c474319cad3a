"""Recipes: a method and the grid of every weight, from a name that a user types or from a YAML file.

Config stops here: below this module functions take explicit arguments.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from qeval.errors import UsageError, unknown

METHODS = {
    "rtn": "round to nearest",
    "awq": "activation-aware scales, then a clip search for every block (calibrated)",
    "gptq": "a clip search, then column after column, each one's error made good by the next (calibrated)",
    "mixed": "INT8 for the groups that matter most, INT4 for the rest, on awq, under a size budget",
    "mixed-rtn": "the same on rtn",
    "modelopt": "NVIDIA Model Optimizer's awq_lite (calibrated; needs nvidia-modelopt)",
    "torchao": "torchao's int4wo or int8wo (needs torchao)",
    "hqq": "HQQ, half-quadratic search of zero points (needs hqq)",
    "gptqmodel": "GPTQ by GPTQModel (calibrated; needs gptqmodel)",
    "autoround": "AutoRound, rounding learned by signed gradients (calibrated; needs auto-round)",
    "ort": "ONNX Runtime's rtn or k_quant (needs onnxruntime)",
}


@dataclass(frozen=True)
class ToolMethods:
    """What the name of another tool's method may say: its algorithms with the grid that each means by itself.

    The first algorithm is meant where none is named; a tool of one has the empty name.
    """

    algorithms: Mapping[str, str]
    calibrated: bool = False


TOOLS: dict[str, ToolMethods] = {
    "modelopt": ToolMethods({"awq_lite": "int4-g128"}, calibrated=True),
    "torchao": ToolMethods({"int4wo": "int4-g64", "int8wo": "int8-channel"}),
    "hqq": ToolMethods({"": "int4-g64"}),
    "gptqmodel": ToolMethods({"": "int4-g128"}, calibrated=True),
    "autoround": ToolMethods({"": "int4-g128"}, calibrated=True),
    "ort": ToolMethods({"rtn": "int4-g32", "k_quant": "int4-g32-asym"}),
}
"""Other tools as quantizers; their adapters are in `calibrate/tools`."""
Importance = Literal["measured", "fisher", "positional"]
"""How mixed methods rank groups: KL measured one by one; predicted in one pass, proposals measured; by position."""
BASELINE = "baseline"
"""The name of the unquantized model in every row; no variant may take it."""

_DEFAULT_GRID = "int4-g128"
_DEFAULT_DAMPING = 0.01
_OPTIONS: dict[str, dict[str, Any]] = {
    "clip": {"clip": True},
    "noclip": {"clip": False},
    "actorder": {"act_order": True},
    "noactorder": {"act_order": False},
    "head": {"quantize_head": True},
    "measured": {"importance": "measured"},
    "fisher": {"importance": "fisher"},
    "positional": {"importance": "positional"},
}
_BUDGET = re.compile(r"(\d+(?:\.\d+)?)bpw")
_DAMPING = re.compile(r"damp(\d+(?:\.\d+)?)")


@dataclass(frozen=True)
class Rule:
    """For weights whose name matches `match` (a shell pattern): a grid's name, or `float` to leave them."""

    match: str
    grid: str


@dataclass(frozen=True)
class Recipe:
    """How to make one variant. `grid` and `high` are grid names; `high` and `budget` belong to mixed methods.

    `clip` None means the method's own default: a clip search for awq and gptq, none for rtn. `budget` None means the
    size that the positional rule would take, in bits per weight. `damping` (a share of the mean second moment; None:
    0.01) and `act_order` (None: yes) belong to gptq. `algorithm` is the word of another tool for what it does.
    """

    name: str
    method: str
    grid: str = _DEFAULT_GRID
    high: str | None = None
    clip: bool | None = None
    budget: float | None = None
    importance: Importance = "measured"
    quantize_head: bool = False
    rules: tuple[Rule, ...] = field(default=())
    damping: float | None = None
    act_order: bool | None = None
    algorithm: str | None = None

    def __post_init__(self) -> None:
        """Refuse what no variant can be made from."""
        if self.method not in METHODS:
            raise unknown("method", self.method, METHODS)
        if self.name == BASELINE or not self.name:
            raise UsageError(f"A variant cannot be named '{self.name}'; that name is the unquantized model's.")
        if not self.mixed and (self.budget is not None or self.high is not None):
            raise UsageError(f"'{self.name}': a budget or a high grid belongs to mixed methods, not to {self.method}.")
        if not self.uses_gptq and (self.damping is not None or self.act_order is not None):
            raise UsageError(f"'{self.name}': damping and act-order belong to gptq, not to {self.method}.")
        if self.algorithm is not None and self.algorithm not in (TOOLS[self.method].algorithms if self.tool else ()):
            raise UsageError(f"'{self.name}': {self.method} has no algorithm '{self.algorithm}'.")
        if self.tool and (self.clip is not None or self.quantize_head):
            raise UsageError(f"'{self.name}': clip, noclip and the head belong to qeval's own methods.")
        if self.damping is not None and not 0 < self.damping <= 1:
            raise UsageError(f"'{self.name}': damping is a share above 0 and at most 1, not {self.damping:g}.")

    @property
    def mixed(self) -> bool:
        """Whether two bit widths are chosen between."""
        return self.method.startswith("mixed")

    @property
    def tool(self) -> bool:
        """Whether another tool quantizes."""
        return self.method in TOOLS

    @property
    def calibrated(self) -> bool:
        """Whether making the variant needs calibration text."""
        if self.tool:
            return TOOLS[self.method].calibrated
        return self.uses_awq or self.uses_gptq or (self.mixed and self.importance != "positional")

    @property
    def uses_statistics(self) -> bool:
        """Whether the statistics of all layer inputs are needed, not just the text."""
        return self.uses_awq or (self.calibrated and self.clips and not self.uses_gptq and not self.tool)

    @property
    def uses_awq(self) -> bool:
        """Whether input scales are searched."""
        return self.method in ("awq", "mixed")

    @property
    def uses_gptq(self) -> bool:
        """Whether columns are rounded in turn, layer after layer."""
        return self.method == "gptq"

    @property
    def damping_share(self) -> float:
        """What gptq adds to every second moment, as a share of their mean; 1 % as in its paper."""
        return _DEFAULT_DAMPING if self.damping is None else float(self.damping)

    @property
    def orders_by_moment(self) -> bool:
        """Whether gptq takes the columns with the largest second moments first."""
        return self.act_order is not False

    @property
    def clips(self) -> bool:
        """Whether each block's range is searched."""
        return self.uses_awq or self.uses_gptq if self.clip is None else self.clip

    def rule_for(self, name: str) -> str | None:
        """What the first rule that matches a weight's name says, or None."""
        return next((rule.grid for rule in self.rules if fnmatchcase(name, rule.match)), None)

    def identity(self) -> dict[str, Any]:
        """Everything but the name: what changes the variant's numbers."""
        own: dict[str, Any] = {"clip": self.clips}
        if self.uses_gptq:
            own |= {"damping": self.damping_share, "act_order": self.orders_by_moment}
        left = ("name",) if self.tool else ("name", "algorithm")
        return {key: value for key, value in asdict(self).items() if key not in left} | own


@dataclass(frozen=True)
class Defaults:
    """What flags say for every recipe that doesn't say it itself."""

    budget: float | None = None
    importance: Importance = "measured"
    quantize_head: bool = False


def parse_method(text: str, defaults: Defaults = Defaults()) -> Recipe:
    """The recipe that a name such as `awq:int4-g128`, `rtn:int8-channel` or `mixed-rtn:4.8bpw` means.

    Raises:
        UsageError: an unknown method (the nearest are listed) or a word that it doesn't take.
    """
    method, _, words = text.strip().partition(":")
    if method not in METHODS:
        raise unknown("method", method, METHODS)
    grid: list[str] = []
    if method in TOOLS:
        return _parse_tool(text.strip(), method, words)
    options: dict[str, Any] = {"quantize_head": defaults.quantize_head}
    if method.startswith("mixed"):
        options |= {"budget": defaults.budget, "importance": defaults.importance}
    for word in filter(None, words.split("-")):
        if word in _OPTIONS:
            options |= _OPTIONS[word]
        elif match := _BUDGET.fullmatch(word):
            options["budget"] = float(match[1])
        elif match := _DAMPING.fullmatch(word):
            options["damping"] = float(match[1])
        else:
            grid.append(word)
    return Recipe(name=text.strip(), method=method, grid="-".join(grid) or _DEFAULT_GRID, **options)


def _parse_tool(name: str, method: str, words: str) -> Recipe:
    """The recipe of another tool's method: `torchao:int4wo`, `hqq:int4-g64`, `ort:k_quant-g128`."""
    known = TOOLS[method].algorithms
    said = words.split("-") if words else []
    named = next((word for word in said if word in known), next(iter(known)))
    grid = "-".join(word for word in said if word != named)
    own = known[named].split("-")
    merged = "-".join([*(word for word in own if not _replaces(grid.split("-"), word)), *([grid] if grid else [])])
    return Recipe(name=name, method=method, grid=merged, algorithm=named or None)


def _replaces(words: Sequence[str], word: str) -> bool:
    """Whether a user's words say the same part of a grid as one of a tool's own: bits, blocks, symmetry."""
    parts = (r"int\d+", r"g\d+|channel|tensor", r"a?sym")
    return any(re.fullmatch(part, word) and any(re.fullmatch(part, each) for each in words) for part in parts)


def parse_methods(text: str, defaults: Defaults = Defaults()) -> list[Recipe]:
    """The recipes of a comma-separated list of method names."""
    names = [name for name in (part.strip() for part in text.split(",")) if name]
    if not names:
        raise UsageError("--methods names no method; say for example --methods rtn,awq,mixed.")
    return [parse_method(name, defaults) for name in names]


def parse_budget(text: str, where: str = "--budget") -> float:
    """The bits per weight of `4.8bpw` (or `4.8`); `where` is what an error names.

    >>> parse_budget("4.8bpw")
    4.8
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(?:bpw)?", text.strip())
    if not match:
        raise UsageError(f"{where} takes bits per weight such as 4.8bpw, not '{text}'.")
    return float(match[1])


def load_recipes(path: Path, defaults: Defaults = Defaults()) -> list[Recipe]:
    """The recipes of a YAML file: a list `variants` of mappings with the fields of `Recipe`.

    Raises:
        UsageError: the file is missing, is no YAML, or has a key that no recipe has (the nearest are listed).
    """
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"Cannot read the config {path}: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not valid YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(data, Mapping):
        raise UsageError(f"{path} must hold a mapping with a list 'variants'.")
    _known(data, ("variants",), f"key in {path}")
    entries = data.get("variants")
    if not isinstance(entries, Sequence) or isinstance(entries, str) or not entries:
        raise UsageError(f"{path}: 'variants' must be a list with at least one recipe.")
    return [_recipe(entry, f"{path}, variant {index}", defaults) for index, entry in enumerate(entries, 1)]


def check_distinct(recipes: Iterable[Recipe]) -> None:
    """Refuse two variants of one name."""
    seen: set[str] = set()
    for recipe in recipes:
        if recipe.name in seen:
            raise UsageError(f"Two variants are named '{recipe.name}'; names must be distinct.")
        seen.add(recipe.name)


_TYPES: dict[str, tuple[type, ...]] = {
    "name": (str,),
    "method": (str,),
    "grid": (str,),
    "high": (str,),
    "clip": (bool,),
    "budget": (str, int, float),
    "importance": (str,),
    "quantize_head": (bool,),
    "rules": (list,),
    "damping": (int, float),
    "act_order": (bool,),
    "algorithm": (str,),
}


def _recipe(entry: object, where: str, defaults: Defaults) -> Recipe:
    if isinstance(entry, str):
        return parse_method(entry, defaults)
    if not isinstance(entry, Mapping):
        raise UsageError(f"{where} must be a mapping or a method's name.")
    _known(entry, _TYPES, f"key in {where}")
    for key, value in entry.items():
        if not isinstance(value, _TYPES[key]) or (isinstance(value, bool) and bool not in _TYPES[key]):
            expected = " or ".join(kind.__name__ for kind in _TYPES[key])
            raise UsageError(f"{where}: '{key}' must be {expected}, not {value!r}.")
    if "method" not in entry:
        raise UsageError(f"{where} names no method.")
    recipe = parse_method(str(entry["method"]), defaults)
    fields = {key: value for key, value in entry.items() if key != "method"}
    if "importance" in fields and fields["importance"] not in get_args(Importance):
        raise unknown(f"importance in {where}", fields["importance"], get_args(Importance))
    if "budget" in fields:
        fields["budget"] = parse_budget(str(fields["budget"]), f"{where}: 'budget'")
    if "rules" in fields:
        fields["rules"] = tuple(_rule(rule, where) for rule in fields["rules"])
    return replace(recipe, **fields)


def _rule(entry: object, where: str) -> Rule:
    if not isinstance(entry, Mapping):
        raise UsageError(f"{where}: a rule must be a mapping with 'match' and 'grid'.")
    _known(entry, ("match", "grid"), f"key in a rule of {where}")
    if set(entry) != {"match", "grid"}:
        raise UsageError(f"{where}: a rule needs both 'match' and 'grid'.")
    return Rule(str(entry["match"]), str(entry["grid"]))


def _known(entry: Mapping[Any, Any], known: Iterable[str], kind: str) -> None:
    choices = list(known)
    for key in entry:
        if key not in choices:
            raise unknown(kind, str(key), choices)

"""Choose the recipes of a command: methods, a file of recipes, and what flags say for all of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from qeval.compare import arguments as read
from qeval.compare.options import Checked, Option
from qeval.config import Defaults, Importance, Recipe, parse_methods
from qeval.errors import UsageError
from qeval.recipe_files import load_recipes

DEFAULT_METHODS = "rtn,awq,mixed"


@dataclass(frozen=True)
class RecipeChoice(Checked):
    """The choices that recipes are made from; a run's settings hold the recipes themselves."""

    methods: Annotated[
        str | None,
        Option("Comma-separated; see `qeval methods`. Default: rtn,awq,mixed.", parse=read.joined_or_none),
    ] = None
    config: Annotated[Path | None, Option("YAML file of recipes.", parse=read.path_or_none)] = None
    budget: Annotated[
        float | None,
        Option(
            "Size of mixed variants, such as 4.8bpw; else the positional rule's own.",
            type=str | None,
            parse=read.bits_per_weight,
        ),
    ] = None
    importance: Annotated[
        Importance, Option("How mixed variants rank layers; fisher: predicted, then measured whole.")
    ] = "measured"
    quantize_head: Annotated[bool, Option("Quantize lm_head too (a tied embedding stays).")] = False

    @property
    def defaults(self) -> Defaults:
        """Return what recipes take that name none of their own."""
        return Defaults(self.budget, self.importance, self.quantize_head)

    def recipes(self, *, has_variants: bool) -> list[Recipe]:
        """Return the recipes of the file and of the methods; the usual methods where there is nothing else to compare.

        Args:
            has_variants: Whether there are variants that were made before; without any, some method is needed.

        Raises:
            UsageError: The file can't be read, or a method is unknown.
        """
        recipes = load_recipes(self.config, self.defaults) if self.config else []
        if self.methods is not None or (not recipes and not has_variants):
            recipes += parse_methods(self.methods or DEFAULT_METHODS, self.defaults)
        self.check_used(recipes)
        return recipes

    def check_used(self, recipes: Sequence[Recipe]) -> None:
        """Refuse flags that no recipe takes.

        Raises:
            UsageError: A budget or a way to rank groups is given, and no recipe mixes widths.
        """
        if any(recipe.quant_method.mixes for recipe in recipes):
            return
        flags = {"--budget": self.budget is not None, "--importance": self.importance != "measured"}
        for flag in (name for name, is_given in flags.items() if is_given):
            named = ", ".join(recipe.name for recipe in recipes) or "what was asked for"
            raise UsageError(f"{flag} is for mixed methods, and none is among {named}; add one, or leave {flag} out.")

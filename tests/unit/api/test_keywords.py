"""The functions' typed signatures say by default what the settings do."""

from dataclasses import MISSING, fields, is_dataclass
from inspect import signature

import pytest

import qeval
from qeval.bench.settings import BenchChoice, PageChoice
from qeval.compare.defaults import HubChoice
from qeval.compare.options import field_options
from qeval.compare.recipe_choice import RecipeChoice
from qeval.compare.settings import Settings

TREES = {
    "compare": (Settings, RecipeChoice, HubChoice),
    "gate_model": (Settings, HubChoice),
    "quantize": (Settings, RecipeChoice, HubChoice),
    "export": (Settings, RecipeChoice, HubChoice),
    "sensitivity": (Settings, HubChoice),
    "bench": (BenchChoice, RecipeChoice, HubChoice, PageChoice),
}
OPEN = {"device", "ep", "calibration", "calibration_samples"}
"""What a function leaves open by default, and the settings of a run name: it depends on the machine or the model."""


def defaults_of(tree):
    """The option and the default of every field that has both, those of nested dataclasses included."""
    for field in fields(tree):
        if is_dataclass(field.type):
            yield from defaults_of(field.type)
        elif field.name in field_options(tree) and field.default is not MISSING:
            yield field_options(tree)[field.name], field.default


@pytest.mark.parametrize("name", TREES)
def test_a_functions_defaults_are_those_of_the_settings(name):
    parameters, compared = signature(getattr(qeval, name)).parameters, set()
    differing = OPEN | ({"methods"} if name == "bench" else set())
    for tree in TREES[name]:
        for option, default in defaults_of(tree):
            if option.keyword in parameters and option.keyword not in differing | compared:
                written = parameters[option.keyword].default
                assert (option.parse(written) if option.parse else written) == default, option.keyword
                compared.add(option.keyword)
    assert len(compared) > 3

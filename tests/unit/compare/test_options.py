"""Options make keywords into settings: names, nesting, defaults and checks."""

from dataclasses import dataclass
from typing import Annotated, Literal

import pytest

from qeval.compare.options import Checked, Option, from_keywords, options_by_keyword
from qeval.errors import UsageError


@dataclass(frozen=True)
class Window(Checked):
    length: Annotated[int | None, Option("Tokens.", keyword="window_length", least=1)] = None
    bos: Annotated[Literal["auto", "never"], Option("BOS.", kind="BOS policy")] = "auto"


@dataclass(frozen=True)
class Plan(Checked):
    name: str
    window: Window = Window()
    sizes: Annotated[tuple[int, ...], Option("Sizes.", parse=lambda text: tuple(map(int, text.split())), least=1)] = (
        1,
    )


def test_keywords_reach_the_fields_of_all_levels_and_others_are_left_alone():
    values = {"window_length": 64, "sizes": "4 8", "name": "not this", "more": 1}
    assert from_keywords(Plan, values, name="a") == Plan("a", Window(64), (4, 8))
    assert from_keywords(Plan, {}, name="a") == Plan("a")
    assert from_keywords(Plan, values, name="a", window=Window(3)).window.length == 3


def test_an_option_says_what_its_field_does_not():
    options = options_by_keyword(Plan)
    assert set(options) == {"window_length", "bos", "sizes"}
    assert options["window_length"].flags == ("--window-length",)
    assert options["window_length"].type == int | None
    assert options["bos"].choices == ("auto", "never")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"window_length": 0}, "--window-length must be at least 1, not 0."),
        ({"window_length": float("inf")}, "--window-length must be a finite number, not inf."),
        ({"bos": "newer"}, "Unknown BOS policy 'newer'; nearest: never."),
        ({"sizes": "4 0"}, "--sizes must be at least 1, not 0."),
        ({"sizes": ""}, "--sizes names no number."),
    ],
)
def test_a_value_that_a_setting_may_not_have_is_refused(values, message):
    with pytest.raises(UsageError) as error:
        from_keywords(Plan, values, name="a")
    assert str(error.value).startswith(message)

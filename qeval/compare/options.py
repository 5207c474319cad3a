"""Settings described once: an `Option` in a field's annotation makes its flag, its keyword and its checks.

The fields of a dataclass carry options as `limit: Annotated[int | None, Option("Questions a subject.")] = None`. The
program makes its flags of them (`cli.options`), and a function's keywords become settings (`from_keywords`). A field is
stored in a run's record by its own name, whatever its keyword is.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, is_dataclass, replace
from functools import cache
from math import isfinite
from types import MappingProxyType
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from qeval.errors import UsageError, unknown

T = TypeVar("T")


@dataclass(frozen=True)
class Option:
    """The spelling of a setting for callers, and its allowed values."""

    help: str
    keyword: str = ""
    """Of a function, where this is not the field's name."""
    flags: tuple[str, ...] = ()
    """All spellings; default: the keyword's."""
    type: Any = None
    """What the program's parser makes of a flag's words, where this is not the field's type."""
    parse: Callable[[Any], Any] | None = None
    """Returns the field's value for a keyword's."""
    least: int | None = None
    """Of a number, or of each of several."""
    range_shown: bool = True
    """Whether the program's parser refuses less than the least itself, and `--help` shows it."""
    kind: str = ""
    """What errors call the setting where its values are choices; default: the keyword."""
    choices: tuple[str, ...] = ()
    """The values of a field that is a `Literal`."""

    def of_field(self, field: str, kind: Any) -> "Option":
        """Return the option with everything that the field's name and type say.

        Args:
            field: The field's name.
            kind: Its type.
        """
        keyword = self.keyword or field
        return replace(
            self,
            keyword=keyword,
            flags=self.flags or (flag_of(keyword),),
            type=kind if self.type is None else self.type,
            kind=self.kind or keyword,
            choices=_choices(kind),
        )

    def check(self, value: Any) -> None:
        """Refuse a value that the setting may not have; None is none.

        Raises:
            UsageError: It is no choice, below the least, or not finite.
        """
        if self.choices and value is not None and value not in self.choices:
            raise unknown(self.kind, str(value), self.choices)
        if self.least is not None:
            check_least(self.flags[0], value, self.least)


class Checked:
    """Base of dataclasses whose values are checked against their options when they are built."""

    def __post_init__(self) -> None:
        """Check every field that has an option.

        Raises:
            UsageError: A value is not among the choices, or a number is too small.
        """
        tree: Any = type(self)
        for field, option in field_options(tree).items():
            option.check(getattr(self, field))


def flag_of(keyword: str) -> str:
    """Return a keyword's flag.

    >>> flag_of("max_windows")
    '--max-windows'
    """
    return f"--{keyword.replace('_', '-')}"


def check_least(flag: str, value: float | tuple[float, ...] | None, least: int) -> None:
    """Refuse a number, or several, below the least that makes sense; None is none.

    Raises:
        UsageError: One is below or not finite, or several are none at all.
    """
    values = value if isinstance(value, tuple) else () if value is None else (value,)
    if value == ():
        raise UsageError(f"{flag} names no number.")
    for number in values:
        if not isfinite(number):
            raise UsageError(f"{flag} must be a finite number, not {number}.")
        if number < least:
            raise UsageError(f"{flag} must be at least {least}, not {number}.")


@cache
def field_options(tree: type) -> Mapping[str, Option]:
    """Return the options of a dataclass's own fields by field."""
    annotated = {
        field: get_args(hint)
        for field, hint in get_type_hints(tree, include_extras=True).items()
        if get_origin(hint) is Annotated
    }
    return MappingProxyType({field: option.of_field(field, kind) for field, (kind, option) in annotated.items()})


def options_by_keyword(*trees: type) -> dict[str, Option]:
    """Return the options of dataclasses, and of those that their fields hold, by keyword."""
    found: dict[str, Option] = {}
    for tree in trees:
        found |= options_by_keyword(*(kind for kind in get_type_hints(tree).values() if _is_tree(kind)))
        found |= {option.keyword: option for option in field_options(tree).values()}
    return found


def from_keywords(tree: type[T], values: Mapping[str, Any], **fixed: Any) -> T:
    """Build settings from a function's keywords.

    A field that has no keyword among `values` takes its default. A field that is a dataclass is built likewise.

    Args:
        tree: The dataclass to build.
        values: The function's arguments by name; those that are no setting's keyword are not looked at.
        **fixed: Fields that are known already.

    Raises:
        UsageError: A value is not what the setting may be.
    """
    return tree(**parse_keywords(tree, values, **fixed))


def parse_keywords(tree: type, values: Mapping[str, Any], **fixed: Any) -> dict[str, Any]:
    """Return the fields of settings as `from_keywords` would build them."""
    fields = dict(fixed)
    for field, kind in get_type_hints(tree).items():
        option = field_options(tree).get(field)
        if field in fixed:
            continue
        if _is_tree(kind):
            fields[field] = from_keywords(kind, values)
        elif option is not None and option.keyword in values:
            value = values[option.keyword]
            fields[field] = option.parse(value) if option.parse else value
    return fields


def _is_tree(kind: Any) -> bool:
    return isinstance(kind, type) and is_dataclass(kind)


def _choices(kind: Any) -> tuple[str, ...]:
    """Return the values of a type that is a `Literal`, or one or None."""
    if get_origin(kind) is Literal:
        return get_args(kind)
    return next((get_args(each) for each in get_args(kind) if get_origin(each) is Literal), ())

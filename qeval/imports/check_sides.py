"""Check that foreign rows can be paired: the same items, asked alike, each scored once a repeat, on every side.

Nothing is dropped: what is missing or doubled is counted, its first ones are named, and the import ends.
"""

from collections.abc import Iterable, Sequence

import numpy as np

from qeval.errors import UsageError
from qeval.imports.foreign_rows import HASHES, ForeignRows

_NAMED = 3
Item = tuple[str, str]
"""Subject and item."""


class ModelScores:
    """All rows of one score that are of one model: the parts of one or more files."""

    def __init__(self, parts: Sequence[ForeignRows]) -> None:
        """`parts` are of one model and one score.

        Raises:
            UsageError: Two of them are of different tasks under one name, or an item is doubled.
        """
        self.parts = parts
        self.model, self.name = parts[0].model, parts[0].name
        self.files = [part.file for part in parts]
        if len({(part.choices is None, part.better) for part in parts}) > 1:
            raise UsageError(f"{self._named_files()} hold '{self.name}' of '{self.model}' in different forms.")
        self.items = [(s, i) for part in parts for s, i in zip(part.subjects, part.items, strict=True)]
        self.hashes = {
            name: np.concatenate([part.hashes[name] for part in parts])
            for name in HASHES
            if all(name in part.hashes for part in parts)
        }
        self._refuse_two_tasks()
        self._refuse_doubles()

    def asked(self, name: str) -> dict[Item, str]:
        """Return a hash of each item."""
        return dict(zip(self.items, self.hashes[name].tolist(), strict=True))

    def _refuse_two_tasks(self) -> None:
        if len(set(self.items)) == len(self.items):
            return  # no item comes twice
        for name in self.hashes:
            seen: dict[Item, str] = {}
            for item, value in zip(self.items, self.hashes[name].tolist(), strict=True):
                if seen.setdefault(item, value) != value:
                    raise UsageError(
                        f"{self._named_files()} are of two tasks under one name: item {_named(item)} of '{self.name}' "
                        f"has the {name} {seen[item][:12]} and {value[:12]}; import each with its own --task."
                    )

    def _refuse_doubles(self) -> None:
        repeats = np.concatenate([part.repeats for part in self.parts]).tolist()
        keys = list(zip(self.items, repeats, strict=True))
        if len(set(keys)) == len(keys):
            return
        seen: set[tuple[Item, str]] = set()
        doubled = [item for item, repeat in keys if (item, repeat) in seen or seen.add((item, repeat))]  # type: ignore[func-returns-value]
        raise UsageError(
            f"{self._named_files()}: {len(doubled)} items of '{self.name}' are doubled for '{self.model}' "
            f"({_first(doubled)}); give each score of an item its own seed, with --repeats where each file is one."
        )

    def _named_files(self) -> str:
        return " and ".join(dict.fromkeys(file.name for file in self.files))


def check_pair(baseline: ModelScores, other: ModelScores) -> None:
    """Refuse a side that was not asked what the baseline was.

    Raises:
        UsageError: Items are missing on a side, or a hash of what was asked differs; it says which, and how many.
    """
    mine, others = set(baseline.items), set(other.items)
    for lacking, missing in ((other, mine - others), (baseline, others - mine)):
        if missing:
            raise UsageError(
                f"{len(missing)} of {len(mine | others)} items of '{other.name}' are missing for '{lacking.model}' "
                f"({_first(sorted(missing))}); score them, or leave them out on both sides."
            )
    for name in HASHES:
        if name in baseline.hashes and name in other.hashes:
            _check_hash(name, baseline, other)


def _check_hash(name: str, baseline: ModelScores, other: ModelScores) -> None:
    before, now = baseline.asked(name), other.asked(name)
    differ = [item for item in before if before[item] != now[item]]
    if differ:
        raise UsageError(
            f"'{baseline.model}' and '{other.model}' were not asked the same: the {name} differs in {len(differ)} of "
            f"{len(before)} items of '{other.name}', the first {_named(differ[0])} ({before[differ[0]][:12]} and "
            f"{now[differ[0]][:12]}); run both with the same prompts, shots and chat template."
        )


def _first(items: Iterable[Item]) -> str:
    names = list(items)
    return ", ".join(_named(item) for item in names[:_NAMED]) + (", ..." if len(names) > _NAMED else "")


def _named(item: Item) -> str:
    return f"{item[1]} of '{item[0]}'"

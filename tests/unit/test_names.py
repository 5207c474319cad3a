"""A public name is defined in one module, so that whoever reads it knows which thing is meant."""

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import qeval

PACKAGE = Path(qeval.__file__).parent
SHARED = {"main"}
"""Names that several modules may define: `main` is what starts a program or a child process."""


def test_no_further_name_is_defined_in_two_modules():
    """A command's function has the name of the API's that it calls; other names are told apart."""
    found = shared_names()
    new = {name: modules for name, modules in found.items() if name not in SHARED}
    assert not new, f"say in the name what tells them apart: {new}"
    old = set(SHARED) - found.keys()
    assert not old, f"take out of SHARED what one module alone defines by now: {sorted(old)}"


def test_definitions_of_a_module_are_read(tmp_path):
    """Classes, functions and constants count; what is private, imported or local does not."""
    module = tmp_path / "m.py"
    module.write_text(
        "from os import path\nA, B = 1, 2\nC: int = 3\n_d = 4\nclass E:\n    f = 5\ndef g():\n    h = 6\n"
    )
    assert list(public_names(module)) == ["A", "B", "C", "E", "g"]


def shared_names() -> dict[str, list[str]]:
    """Return the public names that several modules define, with these modules."""
    modules = defaultdict(list)
    for path in sorted(PACKAGE.rglob("*.py")):
        place = path.relative_to(PACKAGE)
        for name in dict.fromkeys(public_names(path)):
            is_command = place.parts[0] == "cli" and name.islower() and name in qeval.__all__
            if not is_command:
                modules[name].append(place.as_posix())
    return {name: places for name, places in modules.items() if len(places) > 1}


def public_names(path: Path) -> Iterator[str]:
    """Yield the public names that a module defines at its top level."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        yield from (name for name in _defined(node) if not name.startswith("_"))


def _defined(node: ast.stmt) -> Iterator[str]:
    if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        yield node.name
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    for target in targets:
        yield from (part.id for part in ast.walk(target) if isinstance(part, ast.Name))

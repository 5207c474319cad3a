"""What `make` installs is locked whole, and within the ranges that users get."""

import re
import tomllib
from importlib.metadata import distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[3]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
LOCK = {
    canonicalize_name(name): version
    for name, version in re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.M)
}
EXTRAS = PROJECT["optional-dependencies"]


@pytest.mark.parametrize("text", [*PROJECT["dependencies"], *EXTRAS["cpu"], *EXTRAS["dev"], *EXTRAS["docs"]])
def test_each_requirement_is_locked_within_its_range(text):
    requirement = Requirement(text)
    version = LOCK[canonicalize_name(requirement.name)]
    assert requirement.specifier.contains(version), f"{requirement.name}=={version}: run `make lock`"


def test_what_the_requirements_require_is_locked_too():
    installed = {canonicalize_name(each.metadata["Name"]): each for each in distributions()}
    left, seen = ["qeval"], set()
    wanted = {"qeval": ("", "cpu", "dev", "docs")}
    while left:
        name = left.pop()
        if name in seen or name not in installed:
            continue
        seen.add(name)
        for text in installed[name].requires or ():
            requirement = Requirement(text)
            extras = wanted.get(name, ("",))
            if requirement.marker is None or any(requirement.marker.evaluate({"extra": extra}) for extra in extras):
                dependency = canonicalize_name(requirement.name)
                wanted[dependency] = (*wanted.get(dependency, ("",)), *requirement.extras)
                left.append(dependency)
    assert len(seen) > 50
    assert not seen - set(LOCK) - {"qeval"}

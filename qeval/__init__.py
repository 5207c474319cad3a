"""qeval says, with error bars, what a quantized language model lost against its FP16 original.

The functions of `__all__` are what the program's commands call. Each is loaded when it is first used, so that
`import qeval` takes no torch and no time:

    run = qeval.compare("demo", methods=["rtn", "awq"], tasks=["kl", "ppl"])
    run.summary()
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from inspect import Signature

    from qeval.api.advising import advise
    from qeval.api.benchmark import bench, selfcheck
    from qeval.api.comparison import compare
    from qeval.api.folders import card, diff, gate, load, verify
    from qeval.api.gating import gate_model
    from qeval.api.harness import lm_eval_model
    from qeval.api.history import board
    from qeval.api.importing import import_rows
    from qeval.api.making import export, quantize, sensitivity
    from qeval.api.sweeping import sweep
    from qeval.errors import BrokenRecordError, QevalError, UsageError
    from qeval.results import Run

__version__ = "0.2.0"

__all__ = [
    "BrokenRecordError",
    "QevalError",
    "Run",
    "UsageError",
    "__version__",
    "advise",
    "bench",
    "board",
    "card",
    "compare",
    "diff",
    "export",
    "gate",
    "gate_model",
    "import_rows",
    "lm_eval_model",
    "load",
    "quantize",
    "selfcheck",
    "sensitivity",
    "sweep",
    "verify",
]

_MODULES = {
    "qeval.api.advising": ("advise",),
    "qeval.api.benchmark": ("bench", "selfcheck"),
    "qeval.api.comparison": ("compare",),
    "qeval.api.folders": ("card", "diff", "gate", "load", "verify"),
    "qeval.api.gating": ("gate_model",),
    "qeval.api.harness": ("lm_eval_model",),
    "qeval.api.history": ("board",),
    "qeval.api.importing": ("import_rows",),
    "qeval.api.making": ("export", "quantize", "sensitivity"),
    "qeval.api.sweeping": ("sweep",),
    "qeval.errors": ("BrokenRecordError", "QevalError", "UsageError"),
    "qeval.results": ("Run",),
}
"""The public names by the module that defines them."""
_HOMES = {name: module for module, names in _MODULES.items() for name in names}
_PACKAGES = ("bench", "board", "compare", "gate", "quantize")
"""Functions that share their name with a package; Python binds that name to the package as soon as it is imported."""


class _CallablePackage(ModuleType):
    """A package that can be called as the function of its name: `qeval.compare(...)` beside `qeval.compare.run`."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function that has the package's name."""
        return self._function(*args, **kwargs)

    @property
    def __signature__(self) -> "Signature":
        """Return the function's signature, for editors and notebooks."""
        from inspect import signature  # noqa: PLC0415 - a third of what importing this package takes

        return signature(self._function)

    @property
    def _function(self) -> Any:
        name = self.__name__.rpartition(".")[2]
        return getattr(importlib.import_module(_HOMES[name]), name)


def _documentation(package: _CallablePackage) -> str | None:
    """Return the function's documentation, which is what editors and notebooks show of the package."""
    text: str | None = package._function.__doc__
    return text


_CallablePackage.__doc__ = property(_documentation)  # type: ignore[assignment]


class _Root(ModuleType):
    """This package; it makes the packages of `_PACKAGES` callable when the import system binds them here."""

    def __setattr__(self, name: str, value: Any) -> None:
        """Bind a name, as any module does."""
        if name in _PACKAGES and isinstance(value, ModuleType):
            value.__class__ = _CallablePackage
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Root


def __getattr__(name: str) -> Any:
    """Load a public name when it is first used."""
    if name in _PACKAGES:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names, loaded or not."""
    return sorted({*globals(), *__all__})

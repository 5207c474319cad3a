"""transformers without its progress bars, load reports and warnings: qeval says itself what a user must know."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import transformers

from qeval.errors import UsageError, first_line
from qeval.parsing import one_sentence

_CODE = (
    "it needs Python code from its own repository, and qeval runs none; take a checkpoint whose architecture "
    "transformers has."
)
_MISMATCH = "ignore_mismatched_sizes"
"""What transformers names in its advice where tensors have other shapes than the configuration asks for."""
_SHAPES = "the shapes of its tensors are not those that its config.json asks for."


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers and its warnings off stderr for the length of a `with` block."""
    logging = transformers.utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def transformers_errors(what: str) -> Iterator[None]:
    """Keep transformers quiet, and make one sentence of whatever it or a library below it raises over a file.

    Args:
        what: How the sentence begins: `'m/config.json' can't be used`.

    Raises:
        UsageError: In place of any error, a panic of Rust's included; in other words where it advises to run what was
            downloaded, or to ignore that shapes don't fit.
    """
    with one_sentence(what), quiet():
        try:
            yield
        except (ValueError, RuntimeError, OSError, ImportError) as error:
            if "custom code" in str(error):
                raise UsageError(f"{what}: {_CODE}") from error
            if _MISMATCH in first_line(error):
                raise UsageError(f"{what}: {_SHAPES}") from error
            raise

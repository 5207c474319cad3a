"""Refusals of what does not go with a model that no one device holds: read by layers, or spread over several GPUs."""

from collections.abc import Sequence

from qeval.config import Recipe
from qeval.errors import UsageError


def check_stream(
    backends: Sequence[str], recipes: Sequence[Recipe], *, answers: bool, generating: Sequence[str]
) -> None:
    """Refuse what needs the whole model in memory.

    Args:
        backends: What variants are to run on.
        recipes: What variants are to be made by.
        answers: Whether the baseline is to answer prompts.
        generating: The tasks for which the baseline is to generate text.

    Raises:
        UsageError: It says what to leave out.
    """
    if set(backends) - {"torch"}:
        raise UsageError(
            "--stream runs in torch; files for other backends are written of the whole model: leave out "
            f"--backend {','.join(backends)}."
        )
    if answers:
        raise UsageError(
            "--corpus chat has the baseline answer one token after another, and --stream would read every layer "
            "for each: leave one of them out."
        )
    if generating:
        raise UsageError(
            f"--tasks {generating[0]} generates one token after another, and --stream would read every layer for each: "
            "leave one of them out."
        )
    check_streamed(recipes)


def check_streamed(recipes: Sequence[Recipe]) -> None:
    """Refuse recipes that a streamed model can't be quantized by.

    Raises:
        UsageError: Another tool quantizes, inputs are turned (R4), or the model is smoothed first.
    """
    if turned := [recipe.name for recipe in recipes if recipe.rotations and recipe.rotations.online]:
        raise UsageError(f"{', '.join(turned)}: qeval makes R4 of models that are in memory; leave r4 or --stream out.")
    if smoothed := [recipe.name for recipe in recipes if recipe.quant_method.rounding == "smoothed"]:
        raise UsageError(f"{', '.join(smoothed)}: qeval smooths models that are in memory; leave it or --stream out.")
    if tools := [recipe.name for recipe in recipes if recipe.quant_method.rounding == "external"]:
        raise UsageError(
            f"{', '.join(tools)}: other tools quantize models that are in memory; leave them or --stream out."
        )


def check_spread(backends: Sequence[str], executor: str, workers: int) -> None:
    """Refuse what does not go with one model on several GPUs (`--device-map`).

    Args:
        backends: What variants are to run on.
        executor: Where workers run.
        workers: How many processes are to score; 0 where that is left open.

    Raises:
        UsageError: It says what to leave out.
    """
    if others := [name for name in backends if name != "torch"]:
        raise UsageError(
            "--device-map auto spreads torch's model over GPUs, and other backends hold a model on one: leave out "
            f"--backend {','.join(others)}."
        )
    if executor == "ray":
        raise UsageError(
            "--device-map auto has one process hold the model on this machine's GPUs, and Ray's workers have one model "
            "each: leave one of them out."
        )
    if workers > 1:
        raise UsageError(
            f"--device-map auto has one process hold the model on all GPUs, so that none is left for --workers "
            f"{workers}: leave one of them out."
        )

"""Which variants' figures say nothing, because their quantizer saw what they were scored on."""

from qeval.store.run import RunRecord, VariantRecord


def void(run: RunRecord, variant: VariantRecord) -> str | None:
    """Why a variant's comparison is void, in a sentence; None where it is not.

    A variant that was made before is void only if it was calibrated on this run's own calibration tokens: of others the
    tokens are not known.
    """
    seen = run.calibration
    if seen is None or seen.overlap is None or not seen.overlap.shared_tokens:
        return None
    if variant.calibration_sha256 != seen.tokens_sha256:
        return None
    shared = seen.overlap
    return (
        f"{shared.shared_tokens:,} of {shared.tokens:,} scored tokens (the first in {shared.where}) lie in runs of "
        f"{shared.ngram} tokens that the calibration text '{seen.source}' holds too: '{variant.name}' was calibrated "
        "on what it was scored on, and its figures are void. Take another --calibration or --corpus."
    )


def unchecked(run: RunRecord) -> list[str]:
    """A sentence about the variants made before whose calibration text this run does not know."""
    own = run.calibration.tokens_sha256 if run.calibration else None
    names = [v.name for v in run.variants if v.calibration_sha256 not in (None, own)]
    if not names:
        return []
    return [
        f"{', '.join(names)}: made before and calibrated on tokens that this run does not hold, so whether they "
        "overlap with what is scored was not looked for."
    ]

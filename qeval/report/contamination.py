"""Find the variants whose figures say nothing, because their quantizer saw the text that they were scored on."""

from qeval.store.run import RunRecord, VariantRecord


def void(run: RunRecord, variant: VariantRecord) -> str | None:
    """Return why a variant's comparison is void, in a sentence; None where it is not.

    A variant that was made before is void if it was calibrated on this run's own calibration tokens, or if the
    fingerprint in its manifest holds runs of what is scored.
    """
    if variant.overlap and variant.overlap.shared_tokens:
        overlap = variant.overlap
        return (
            f"At least {overlap.shared_tokens:,} of {overlap.tokens:,} scored tokens (the first in {overlap.where}) "
            f"lie in runs of {overlap.ngram} tokens that the text which '{variant.name}' was calibrated on holds too, "
            "by the fingerprint in its manifest: its figures are void. Score it on another --corpus."
        )
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
    """Return a sentence about variants made before whose calibration text this run does not know."""
    digest = run.calibration.tokens_sha256 if run.calibration else None
    names = [v.name for v in run.variants if v.calibration_sha256 not in (None, digest) and v.overlap is None]
    if not names:
        return []
    return [
        f"{', '.join(names)}: made before and calibrated on tokens that this run does not hold, so whether they "
        "overlap with what is scored was not looked for."
    ]

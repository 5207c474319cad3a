"""Read what lies in a finished run's folder: the run itself, a verdict, a difference, a model card, a check."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qeval.api.process import torch_settings_restored
from qeval.compare import arguments as read
from qeval.compare.arguments import Names, PathLike
from qeval.compare.options import check_least
from qeval.errors import QevalError, UsageError
from qeval.paths import check_file
from qeval.progress import Logged, Progress

if TYPE_CHECKING:
    from qeval.gate.policy import Policy
    from qeval.gate.verdict import GateVerdict
    from qeval.jobs.verify import Verification
    from qeval.report.card import Written
    from qeval.report.diff import Diff
    from qeval.results import Run

SUMMARY = "GITHUB_STEP_SUMMARY"
"""The variable that names the file a summary is added to in GitHub's pipelines."""


def load(folder: PathLike) -> "Run":
    """Return the finished run in a folder, its figures computed from its rows.

    Args:
        folder: What `compare` was given as `out`.

    Raises:
        UsageError: The folder holds no run.
        BrokenRecordError: The run is not finished, or a file is not what the record says.
    """
    from qeval.results import load_run as loaded  # noqa: PLC0415 - the statistics and plots take a second to import

    return loaded(read.path(folder))


def gate(
    run: "Run | PathLike",
    policy: "Policy | PathLike | Mapping[str, Any]",
    *,
    variants: Names | None = None,
    against: "Run | PathLike | None" = None,
    junit: PathLike | None = None,
    markdown: PathLike | None = None,
    summary: PathLike | None = None,
) -> "GateVerdict":
    """Judge a finished run by a policy.

    Args:
        run: A run, or its folder.
        policy: A YAML file of margins, one that is shipped ("configs/gates/release.yaml"), or its content as a dict.
        variants: The variants to gate; default: all.
        against: An earlier run, or a board, whose last accepted run is taken: each variant is held against itself
            there, in the baseline's place.
        junit: Where JUnit XML is written.
        markdown: Where a summary in Markdown is written.
        summary: A file that the summary is added to, such as GitHub's.

    Returns:
        The verdict; its `outcome` is pass, fail, inconclusive or broken.

    Raises:
        UsageError: There is no such run, policy or variant.
        QevalError: The run is broken; the files say so too, so that no older ones stay.
    """
    from qeval.gate.judge import broken_verdict, judge  # noqa: PLC0415 - the statistics take a second to import

    check_verdict_files(junit, markdown, summary)
    rules, folder = policy_of(policy), folder_of(run)
    try:
        verdict = judge(folder, rules, read.names(variants), _reference(against))
    except UsageError:
        raise
    except QevalError as error:
        write_verdict(broken_verdict(folder, rules, str(error)), junit, markdown, summary)
        raise
    write_verdict(verdict, junit, markdown, summary)
    return verdict


def _reference(against: "Run | PathLike | None") -> Path | None:
    """Return the folder of the run to compare with: the last accepted one where a board is given."""
    from qeval.board.history import is_board, last_accepted  # noqa: PLC0415 - the statistics take a second to import

    if against is None:
        return None
    folder = folder_of(against)
    return last_accepted(folder) if is_board(folder) else folder


def write_verdict(
    verdict: "GateVerdict", junit: PathLike | None, markdown: PathLike | None, summary: PathLike | None
) -> None:
    """Write a verdict into the files that are asked for: JUnit XML, Markdown, and Markdown added to a file."""
    from qeval.files.atomic import write_output  # noqa: PLC0415
    from qeval.gate import outputs  # noqa: PLC0415 - the statistics take a second to import

    if junit:
        outputs.write_junit(verdict, read.path(junit))
    if markdown:
        write_output(read.path(markdown), outputs.verdict_markdown(verdict))
    if summary:
        outputs.append_markdown(verdict, read.path(summary))


def check_verdict_files(junit: PathLike | None, markdown: PathLike | None, summary: PathLike | None) -> None:
    """Refuse files that can't be written before anything is judged.

    Raises:
        UsageError: It names the flag, and says why.
    """
    for flag, path in (("--junit", junit), ("--markdown", markdown), (f"${SUMMARY}", summary)):
        if path:
            check_file(read.path(path), flag)


def policy_of(policy: "Policy | PathLike | Mapping[str, Any]") -> "Policy":
    """Return a policy from what a caller gives as one.

    Raises:
        UsageError: There is no such file, or it says what no policy may say.
    """
    from qeval.gate.policy import Policy, load_policy, policy_from  # noqa: PLC0415 - pydantic's models

    if isinstance(policy, Policy):
        return policy
    return policy_from(policy, "policy") if isinstance(policy, Mapping) else load_policy(read.path(policy))


def diff(run_a: "Run | PathLike", run_b: "Run | PathLike", *, variants: Iterable[str] | str | None = None) -> "Diff":
    """Compare two runs of one model row by row, B against A.

    Args:
        run_a: The run to compare with, or its folder.
        run_b: The run in question, or its folder.
        variants: NAME, or NAME_IN_A=NAME_IN_B; default: those of equal names.

    Raises:
        UsageError: A folder holds no run, or the runs can't be paired; it says what differs.
        BrokenRecordError: Rows are missing, doubled or not finite.
    """
    from qeval.report.diff import build_diff as compared  # noqa: PLC0415 - the statistics take a second to import

    texts = [variants] if isinstance(variants, str) else variants or ()
    return compared(folder_of(run_a), folder_of(run_b), [_pair(text) for text in texts])


def _pair(text: str) -> tuple[str, str]:
    name, separator, other = text.partition("=")
    if not name or (separator and not other):
        raise UsageError(f"--variant takes NAME or NAME_IN_A=NAME_IN_B, not '{text}'.")
    return name, other if separator else name


def card(run: "Run | PathLike", variant: str | None = None, *, into: PathLike | None = None) -> "Written":
    """Write a model card's section, with metadata, tables and plots.

    Args:
        run: A run, or its folder.
        variant: The variant that the metadata is about; default: all that are sound.
        into: A README.md whose section between the qeval markers is replaced; default: RUN/card/README.md.

    Returns:
        The card's file, its plots, and whether its front matter holds the figures.

    Raises:
        UsageError: There is no such run or variant, or the README has no place for the section.
        QevalError: There are no figures.
    """
    # The statistics and plots take a second to import.
    from qeval.report.card import into as write_into  # noqa: PLC0415
    from qeval.report.card import write_card  # noqa: PLC0415

    folder = folder_of(run)
    return write_into(folder, read.path(into), variant) if into else write_card(folder, variant)


def verify(
    run: "Run | PathLike", *, sample: int = 4, seed: int = 0, progress: Progress | None = None
) -> "Verification":
    """Check every checksum of a run, and compute a random sample of its rows again from the model.

    Args:
        run: A run, or its folder.
        sample: Shards of rows to compute again; 0: checksums alone.
        seed: Decides which.
        progress: Hears of phases and warnings.

    Raises:
        UsageError: There is no such run.
    """
    from qeval.jobs.verify import verify_run  # noqa: PLC0415 - torch takes seconds to import

    check_least("--sample", sample, 0)
    check_least("--seed", seed, 0)
    with torch_settings_restored():
        return verify_run(folder_of(run), sample=sample, seed=seed, progress=progress or Logged())


def folder_of(run: "Run | PathLike") -> Path:
    """Return the folder of a run, or the folder itself."""
    return read.path(run) if isinstance(run, str | os.PathLike) else run.folder

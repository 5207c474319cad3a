"""`qeval gate`: a policy's verdict on a finished run, as an exit code that a release pipeline can trust."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qeval.api.folders import SUMMARY, check_verdict_files, policy_of
from qeval.api.folders import gate as judge
from qeval.api.gating import gate_model
from qeval.cli.options import CommandCall, with_flags_of
from qeval.cli.printing import print_json, stderr, stdout
from qeval.cli.progress import ConsoleProgress
from qeval.compare.arguments import path_or_none
from qeval.compare.defaults import HubChoice
from qeval.compare.options import Option, flag_of
from qeval.compare.settings import Settings
from qeval.errors import UsageError

if TYPE_CHECKING:
    from qeval.gate.verdict import GateVerdict

_WIDTH = 160
"""Columns for a table whose last one holds sentences."""
_ALLOWED_WITH_A_RUN = (
    "device", "shots", "calibration", "calibration_samples", "calibration_length", "calibrate_all_experts", "threads",
    "seed",
)  # fmt: skip
"""Flags that make a run and say nothing against a finished one: pipelines give them always."""


@with_flags_of(
    judge,
    gate_model,
    trees=(Settings, HubChoice),
    policy=Option("YAML file of margins, such as configs/gates/release.yaml.", type=Path),
    run=Option("The folder of a finished run; without it, --model and --method.", flags=("run",), type=Path | None),
    variants="Gate this variant alone; may be repeated. Default: all.",
    against=Option("An earlier run, or a board: hold each variant against itself there.", type=Path | None),
    junit=Option("Write JUnit XML here.", type=Path | None),
    markdown=Option(f"Write a Markdown summary here (${SUMMARY} is added to when set).", type=Path | None),
    model=Option("Run and gate in one go, as in compare; ends when all is decided.", type=str | None),
    method=Option("One method; see `qeval methods`.", type=str | None),
    corpus="wikitext2 (the default), pydoc, or a text file.",
    max_windows="Draw from the first N windows.",
    limit="Draw from N questions a subject.",
)
def gate(call: CommandCall) -> int:
    """Judge a run by a policy. Exit codes: 0 pass, 1 fail, 2 wrong use, 3 broken run, 4 inconclusive."""
    values = dict(call.values)
    run, policy, variants, against = (values.pop(name) for name in ("run", "policy", "variants", "against"))
    files = {name: values.pop(name) for name in ("junit", "markdown")}
    files["summary"] = path_or_none(os.environ.get(SUMMARY) or None)
    check_verdict_files(**files)
    _check_use(run, values, variants, against)

    policy = policy_of(policy)
    if run is not None:
        verdict = judge(run, policy, variants=variants, against=against, **files)
    else:
        progress = ConsoleProgress(stderr(), quiet=call.quiet)
        verdict = gate_model(**values, policy=policy, progress=progress, command=call.line, **files)
    _show(verdict, as_json=call.as_json, quiet=call.quiet)
    return verdict.exit_code


def _check_use(run: Path | None, values: Mapping[str, Any], variants: list[str] | None, against: Path | None) -> None:
    """Refuse anything but either a finished run, or a model and a method to run."""
    chosen = [name for name, value in values.items() if value is not None and value is not False]
    flags = [flag_of(name) for name in chosen if name not in _ALLOWED_WITH_A_RUN]
    if run is not None and flags:
        raise UsageError(f"{flags[0]} makes a run, but '{run}' is given as a finished one; give one or the other.")
    if run is None and not {"--model", "--method"} <= set(flags):
        raise UsageError("Name the folder of a finished run, or a --model and a --method to run and gate in one go.")
    if run is None and against:
        raise UsageError("--against compares a finished run with an earlier one; name the folder of a run.")
    if run is None and variants:
        raise UsageError("--variant picks from a finished run; --method names what is run and gated in one go.")


def _show(verdict: "GateVerdict", *, as_json: bool, quiet: bool) -> None:
    from qeval.gate import outputs  # noqa: PLC0415

    if as_json:
        print_json(outputs.verdict_json(verdict))
        return
    console = stdout(_WIDTH)
    if not quiet:
        console.print(outputs.verdict_table(verdict))
        for note in (verdict.correction, *verdict.notes):
            console.print(note)
    console.print(f"{verdict.policy}: {verdict.outcome} (exit code {verdict.exit_code})")

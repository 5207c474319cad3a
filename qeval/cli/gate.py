"""`qeval gate`: a policy's verdict on a finished run, as an exit code that a release pipeline can trust."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from qeval.cli import options
from qeval.cli.compare import slug
from qeval.cli.printing import stdout
from qeval.cli.progress import ConsoleProgress
from qeval.compare.settings import CalibrationChoice, CorpusChoice, ModelChoice, Settings, TaskChoice
from qeval.config import Defaults, parse_method
from qeval.errors import UsageError

if TYPE_CHECKING:
    from qeval.gate.policy import Policy
    from qeval.gate.verdict import GateVerdict

_WIDTH = 160
"""Columns for a table whose last one holds sentences."""
SUMMARY = "GITHUB_STEP_SUMMARY"


def gate(
    context: typer.Context,
    policy: Annotated[Path, typer.Option("--policy", help="YAML file of margins, such as configs/gates/release.yaml.")],
    run: Annotated[
        Path | None, typer.Argument(help="The folder of a finished run; without it, --model and --method.")
    ] = None,
    variant: Annotated[
        list[str] | None, typer.Option("--variant", help="Gate this variant alone; may be repeated. Default: all.")
    ] = None,
    junit: Annotated[Path | None, typer.Option("--junit", help="Write JUnit XML here.")] = None,
    markdown: Annotated[
        Path | None,
        typer.Option("--markdown", help=f"Write a Markdown summary here (${SUMMARY} is added to when set)."),
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", help="Run and gate in one go, as in compare; ends when all is decided.")
    ] = None,
    method: Annotated[str | None, typer.Option("--method", help="One method; see `qeval methods`.")] = None,
    revision: options.Revision = None,
    device: options.Device = "cpu",
    compute: options.Compute = None,
    stream: options.Stream = False,
    max_memory: options.MaxMemory = None,
    corpus: Annotated[str | None, typer.Option("--corpus", help="wikitext2, pydoc, or a text file.")] = None,
    protocol: Annotated[str | None, typer.Option("--protocol", help="A named protocol; see `qeval tasks`.")] = None,
    window: Annotated[int | None, typer.Option("--window", help="Tokens a window.")] = None,
    stride: Annotated[int | None, typer.Option("--stride", help="Tokens between windows; equal: no overlap.")] = None,
    max_windows: Annotated[int | None, typer.Option("--max-windows", help="Draw from the first N windows.")] = None,
    mmlu_dir: Annotated[
        Path | None, typer.Option("--mmlu-dir", help="Folder with dev/ and test/ in MMLU's csv layout, or 'hub'.")
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", help="Draw from N questions a subject.")] = None,
    shots: Annotated[int, typer.Option("--shots", min=0, help="Examples in a prompt.")] = 5,
    calibration: options.Calibration = "pydoc",
    calibration_samples: options.CalibrationSamples = 16,
    calibration_length: options.CalibrationLength = 512,
    threads: options.Threads = None,
    seed: options.Seed = 0,
    out: options.Out = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> int:
    """Judge a run by a policy. Exit codes: 0 pass, 1 fail, 2 wrong use, 3 broken run, 4 inconclusive."""
    del debug  # read by the program's own error handler
    given = {
        "--model": model, "--method": method, "--revision": revision, "--compute": compute, "--corpus": corpus,
        "--protocol": protocol, "--window": window, "--stride": stride, "--max-windows": max_windows,
        "--mmlu-dir": mmlu_dir, "--limit": limit, "--out": out, "--stream": stream or None, "--max-memory": max_memory,
    }  # fmt: skip
    _check_use(run, [name for name, value in given.items() if value is not None], variant)
    from qeval.gate.policy import load_policy  # noqa: PLC0415 - the statistics take a second to import

    rules = load_policy(policy)
    if run is not None:
        from qeval.gate.judge import judge  # noqa: PLC0415

        verdict = judge(run, rules, variant or ())
    else:
        verdict = _live(
            rules,
            quiet=quiet,
            model=ModelChoice(
                str(model), revision, device, options.compute_type(compute), stream, options.size_bytes(max_memory)
            ),
            recipes=(parse_method(str(method), Defaults(None, "measured", False)),),
            variants=(),
            corpus=CorpusChoice(corpus, protocol, window, stride, max_windows),
            questions=TaskChoice(mmlu_dir, (), limit, shots),
            calibration=CalibrationChoice(calibration, calibration_samples, calibration_length),
            out=out or Path("gates") / f"{slug(str(model))}-{slug(str(method))}",
            threads=threads,
            seed=seed,
            command=str(context.obj),
        )
    _write(verdict, junit, markdown)
    _show(verdict, as_json=as_json, quiet=quiet)
    return verdict.exit_code


def _check_use(run: Path | None, given: list[str], variant: list[str] | None) -> None:
    """Either a finished run, or a model and a method to run."""
    if run is not None and given:
        raise UsageError(f"{given[0]} makes a run, but '{run}' is given as a finished one; give one or the other.")
    if run is None and not {"--model", "--method"} <= set(given):
        raise UsageError("Name the folder of a finished run, or a --model and a --method to run and gate in one go.")
    if run is None and variant:
        raise UsageError("--variant picks from a finished run; --method names what is run and gated in one go.")


def _live(policy: "Policy", *, quiet: bool, **asked: Any) -> "GateVerdict":
    """Run and judge what was `asked` for, in the names of Settings; the policy says which tasks."""
    from qeval.gate.live import run_and_judge, tasks_of  # noqa: PLC0415 - torch takes seconds to import

    settings = Settings(**asked, tasks=tasks_of(policy, asked["recipes"][0].name))
    return run_and_judge(settings, policy, ConsoleProgress(Console(stderr=True), quiet=quiet))


def _write(verdict: "GateVerdict", junit: Path | None, markdown: Path | None) -> None:
    from qeval.gate import outputs  # noqa: PLC0415
    from qeval.store.atomic import write_text  # noqa: PLC0415

    if junit:
        outputs.write_junit(verdict, junit)
    if markdown:
        write_text(markdown, outputs.markdown(verdict))
    if summary := os.environ.get(SUMMARY):
        outputs.append_markdown(verdict, Path(summary))


def _show(verdict: "GateVerdict", *, as_json: bool, quiet: bool) -> None:
    from qeval.gate import outputs  # noqa: PLC0415

    if as_json:
        typer.echo(outputs.as_json(verdict), nl=False)
        return
    console = stdout(_WIDTH)
    if not quiet:
        console.print(outputs.table(verdict))
        for note in (verdict.correction, *verdict.notes):
            console.print(note, highlight=False, markup=False)
    console.print(f"{verdict.policy}: {verdict.outcome} (exit code {verdict.exit_code})", highlight=False, markup=False)

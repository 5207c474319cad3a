"""How long every command takes that works from a finished run's folder alone.

    python -m benchmarks.verdict_speed

The run is made by formula: 300 windows of 1,024 tokens, 57 subjects of 246 questions, six variants, in shards as small
as those of a real run. Each command runs in a process of its own, so that its imports count. The target is 5 seconds
each; the exit code is 1 when one takes longer. CPU seconds are told too: on a machine that does other work beside, they
are what can be compared.
"""

import argparse
import resource
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tests.fixtures.runs import SEVEN, SUBJECTS, Shape, make_run

_TARGET_SECONDS = 5.0
_SUBJECTS = 57
_QUESTIONS = 246
_WINDOWS = 300
_SHARD_ROWS = 4096
_GATE_VERDICTS = (1, 4)
_POLICY = "configs/gates/release.yaml"
_RENDER = "import sys; from pathlib import Path; from qeval.report.render import render; render(Path(sys.argv[1]))"
_PROGRAM = "import sys; from qeval.cli.app import run_program; sys.exit(run_program(sys.argv[1:]))"


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the run, time every command, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where the run is made, or lies already (default: a new folder)")
    parser.add_argument("--times", type=int, default=3, help="runs of each command; the fastest counts (default: 3)")
    asked = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        run = asked.folder or Path(temporary) / "run"
        if not (run / "run.json").exists():
            make_run(run, large())
        taken = {name: _fastest(command, asked.times) for name, command in commands(run).items()}
    for name, (seconds, cpu) in taken.items():
        print(
            f"{name:<10} {seconds:6.2f} s  CPU {cpu:6.2f} s  {'' if seconds < _TARGET_SECONDS else 'over the target'}"
        )
    return int(max(seconds for seconds, _ in taken.values()) >= _TARGET_SECONDS)


def large() -> Shape:
    """300 thousand tokens, 14 thousand questions, six variants."""
    names = [*SUBJECTS, *(f"subject_{i}" for i in range(_SUBJECTS - len(SUBJECTS)))]
    return Shape(
        variants=SEVEN,
        windows=_WINDOWS,
        length=1024,
        subjects=tuple(names),
        questions=_QUESTIONS,
        shard_rows=_SHARD_ROWS,
    )


def commands(run: Path) -> dict[str, list[str]]:
    """What is timed, by name, as the words of a command line."""
    program = [sys.executable, "-c", _PROGRAM]
    return {
        "report": [sys.executable, "-c", _RENDER, str(run)],
        "gate": [*program, "gate", str(run), "--policy", _POLICY],
        "explain": [*program, "explain", str(run), "awq"],
        "card": [*program, "card", str(run)],
        "diff": [*program, "diff", str(run), str(run)],
    }


def _fastest(command: list[str], times: int) -> tuple[float, float]:
    """Wall and CPU seconds of the fastest of some runs."""
    return min(_seconds(command) for _ in range(times))


def _seconds(command: list[str]) -> tuple[float, float]:
    before, start = _cpu(), time.perf_counter()
    done = subprocess.run(command, check=False, stdout=subprocess.DEVNULL)
    if done.returncode not in (0, *_GATE_VERDICTS):
        raise SystemExit(f"{shlex.join(command[3:])} ended with {done.returncode}")
    return time.perf_counter() - start, _cpu() - before


def _cpu() -> float:
    """CPU seconds of all finished child processes."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    sys.exit(main())

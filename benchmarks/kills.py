"""A comparison killed at random moments, each time followed by the same command: what is lost, what is done twice.

    python -m benchmarks.kills --moments 50

A tiny random model with two variants, on tokens and questions. Each moment is drawn over the length of an undisturbed
run. The rows and the variants' weights must be its, byte for byte; the run's ledger says how many jobs were begun more
than once. The last lines are a ratio: the work of killed and resumed runs over that of undisturbed ones, and survivors
over kills. The exit code is 1 when a kill was not survived.
"""

import argparse
import random
import shutil
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.fixtures.bench import Bench
from tests.fixtures.kills import Killed, Place, kill_and_go_on, undisturbed

_METHODS = "rtn:g32,awq:g32"


def main() -> int:
    """Kill, go on, and count."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--moments", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    draw = random.Random(arguments.seed)
    with TemporaryDirectory(prefix="qeval-kills-") as folder:
        bench = Bench(Path(folder))
        whole = Place(bench.folder / "whole")
        seconds = undisturbed(bench, whole, methods=_METHODS)
        jobs = whole.jobs_run().total()
        print(f"undisturbed: {seconds:.1f} s, {jobs} jobs", flush=True)
        found = []
        for number in range(arguments.moments):
            place = Place(bench.folder / f"killed-{number}")
            found.append(kill_and_go_on(bench, whole, place, draw.random() * seconds, methods=_METHODS))
            shutil.rmtree(place.folder)
            print(_line(number, found[-1]), flush=True)
    return _judged(found, jobs)


def _line(number: int, killed: Killed) -> str:
    when = f"killed at {killed.seconds:.2f} s" if killed.in_time else "over before it was killed"
    return f"{number}: {when}, {killed.repeated} jobs repeated, {'survived' if killed.survived else killed}"


def _judged(found: list[Killed], jobs: int) -> int:
    kills = [killed for killed in found if killed.in_time]
    survived = sum(killed.survived for killed in kills)
    repeated = sum(killed.repeated for killed in kills)
    most = max((killed.repeated for killed in kills), default=0)
    print(f"work done twice: {repeated} of {jobs * len(kills)} jobs, at most {most} a kill")
    print(f"work ratio, killed and resumed over undisturbed: {1 + repeated / max(1, jobs * len(kills)):.4f}")
    print(f"survived: {survived} of {len(kills)} kills ({len(found) - len(kills)} runs were over before theirs)")
    return 0 if survived == len(kills) else 1


if __name__ == "__main__":
    sys.exit(main())

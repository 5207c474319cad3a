"""Mangle the files at every door of qeval, and count what came of it: `python benchmarks/fuzz_doors.py [--examples N]`.

A reader either takes a mangled file or says in one sentence what is wrong. Anything else is a fault: an error that is
not qeval's own, a process that ends by a signal, more than a minute, more than 4 GiB. Each door runs in a process of
its own, so that a crash is seen; the seeds of faults are printed, and `--door NAME --seed N` repeats one.
"""

import argparse
import json
import multiprocessing
import os
import resource
import shutil
import sys
import time
import traceback
from collections import Counter
from pathlib import Path
from tempfile import mkdtemp

sys.path.insert(0, str(Path(__file__).parents[1]))

from qeval.errors import QevalError
from tests.fixtures.doors import DOORS, copied, file_of, sound
from tests.fixtures.mangle import KINDS, mangled, other_value

_SECONDS, _BYTES = 60.0, 4 * 2**30


def tried(name: str, seed: int) -> tuple[str, str]:
    """What came of one mangled file: `taken`, `sentence`, or the fault and its text."""
    door, folder = DOORS[name], copied(sound(name))
    file = file_of(name, folder)
    kinds = [*KINDS, *(["value"] * 6 if door.text else [])]
    how = kinds[seed % len(kinds)]
    if how == "value":
        file.write_text(other_value(file.read_text(encoding="utf-8"), seed), encoding="utf-8")
    else:
        file.write_bytes(mangled(file.read_bytes(), how, seed))
    begin = time.monotonic()
    try:
        door.read(folder)
        outcome = "taken", ""
    except QevalError as error:
        text = str(error)
        outcome = ("sentence", text) if text.strip() and "\n" not in text else ("no sentence", text)
    except BaseException as error:  # noqa: BLE001 - that is what is counted
        outcome = "exception", f"{type(error).__name__}: {error} {traceback.format_tb(error.__traceback__)[-1]}"
    finally:
        shutil.rmtree(folder.parent, ignore_errors=True)
    if time.monotonic() - begin > _SECONDS:
        outcome = "slow", f"{time.monotonic() - begin:.0f} s"
    if resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 > _BYTES:
        outcome = "memory", ""
    return outcome


def _work(name: str, seeds: list[int], path: Path) -> None:
    os.environ["QEVAL_HOME"] = mkdtemp(prefix="qeval-fuzz-")
    for seed in seeds:
        path.write_text(json.dumps({"seed": seed}))
        kind, text = tried(name, seed)
        with path.with_suffix(".jsonl").open("a") as file:
            file.write(json.dumps([seed, kind, text]) + "\n")


def main() -> None:
    """Try every door, or one, and print a table of outcomes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, default=500)
    parser.add_argument("--door")
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    asked = parser.parse_args()
    total: Counter[str] = Counter()
    folder = Path(mkdtemp(prefix="qeval-fuzzed-"))
    for place, name in enumerate([asked.door] if asked.door else DOORS):
        path, begin = folder / str(place), time.monotonic()
        path.with_suffix(".jsonl").touch()
        seeds, signals = list(range(asked.seed, asked.seed + asked.examples)), 0
        while seeds:
            process = multiprocessing.get_context("spawn").Process(target=_work, args=(name, seeds, path))
            process.start()
            process.join()
            if process.exitcode == 0:
                break
            signals += 1
            at = json.loads(path.read_text())["seed"]
            print(f"  {name}, seed {at}: the process ended with {process.exitcode}")
            seeds = seeds[seeds.index(at) + 1 :]
        lines = [json.loads(line) for line in path.with_suffix(".jsonl").read_text().splitlines()]
        counts = Counter(kind for _, kind, _ in lines) + Counter(signal=signals)
        total += counts
        print(f"{name}: {dict(counts)} in {time.monotonic() - begin:.0f} s", flush=True)
        seen: set[str] = set()
        for seed, kind, text in lines:
            if kind not in ("taken", "sentence") and text[-200:] not in seen:
                seen.add(text[-200:])
                print(f"  seed {seed}: {kind}: {text[:700]}", flush=True)
    print(f"all: {dict(total)}")


if __name__ == "__main__":
    main()

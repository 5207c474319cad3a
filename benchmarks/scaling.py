"""What a comparison takes against the number of workers, each with one thread, on one random model and text.

    python benchmarks/scaling.py --workers 1,2 --shards 12

A Llama of random weights and two variants, so three models on every shard of 4,096 tokens. The variants are made
beforehand; each number of workers then scores everything from nothing, in turns. Two times are told: from the first
job's begin to the last one's end, by the run's ledger, and the whole command's, imports, loading and report included.
Ratios are against one worker; the exit code is 1 when two workers reach less than 1.8 times the jobs per second of one
on a machine of at least two free cores.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from qeval.store.ledger import read_ledger
from tests.fixtures.bench import text
from tests.fixtures.tiny import save_tiny

_METHODS = "rtn:g32,rtn:int8-channel"
_WINDOW, _SHARD_WINDOWS = 512, 8
_NEEDED = 1.8


class Took(NamedTuple):
    """Seconds of one comparison: of its jobs, and of all."""

    jobs: float
    whole: float
    shares: list[int]
    """Jobs by process."""


def main() -> int:
    """Run with each number of workers in turns, and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", default="1,2")
    parser.add_argument("--shards", type=int, default=12)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=1)
    arguments = parser.parse_args()
    counts = [int(word) for word in arguments.workers.split(",")]
    print(f"load of the last minute: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores", flush=True)
    best: dict[int, Took] = {}
    with TemporaryDirectory(prefix="qeval-scaling-") as name:
        folder = _made(Path(name), arguments.layers, arguments.shards)
        _compare(folder, 1, windows=1)
        for _ in range(arguments.repeats):
            for count in counts:
                took = _compare(folder, count, windows=arguments.shards * _SHARD_WINDOWS)
                print(f"{count} workers: jobs {took.jobs:.1f} s, whole {took.whole:.1f} s, {took.shares}", flush=True)
                best[count] = min(took, best.get(count, took))
    return _judged(best)


def _made(folder: Path, layers: int, shards: int) -> Path:
    sizes = {"hidden_size": 512, "intermediate_size": 1536, "num_attention_heads": 8, "num_key_value_heads": 4}
    settings = {"num_hidden_layers": layers, "max_position_embeddings": 1024, "initializer_range": 0.03}
    save_tiny(folder / "model", vocab_size=8192, dtype=torch.float32, **sizes, **settings)
    (folder / "corpus.txt").write_text(text(shards * _SHARD_WINDOWS * _WINDOW // 30), encoding="utf-8")
    return folder


def _compare(folder: Path, workers: int, windows: int) -> Took:
    """One command from nothing but the variants."""
    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    shutil.rmtree(folder / "home" / "states", ignore_errors=True)
    flags = {
        "model": folder / "model", "methods": _METHODS, "tasks": "kl,ppl", "corpus": folder / "corpus.txt",
        "window": _WINDOW, "stride": _WINDOW, "max-windows": windows, "out": out, "threads": workers,
        "workers": workers,
    }  # fmt: skip
    words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    command = [sys.executable, "-c", "from qeval.cli.app import main; main()", "compare", *words, "--quiet"]
    start = time.perf_counter()
    environment = os.environ | {"QEVAL_HOME": str(folder / "home"), "OMP_NUM_THREADS": str(workers)}
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    whole = time.perf_counter() - start
    with read_ledger(out) as ledger:
        tried = ledger.attempts()
    owners = [attempt.owner for attempt in tried]
    ends = [attempt.ended for attempt in tried if attempt.ended is not None]
    span = max(ends) - min(attempt.began for attempt in tried)
    return Took(span, whole, [owners.count(owner) for owner in dict.fromkeys(owners)])


def _judged(best: dict[int, Took]) -> int:
    one = best.get(1)
    if one is None:
        return 0
    for count, took in best.items():
        print(f"{count} workers: {one.jobs / took.jobs:.2f} times one (whole command {one.whole / took.whole:.2f})")
    return 0 if 2 not in best or one.jobs / best[2].jobs >= _NEEDED else 1


if __name__ == "__main__":
    sys.exit(main())

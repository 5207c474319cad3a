"""What a comparison takes against tokens, variants, model size and workers, on random models and one text.

    python benchmarks/scaling.py                     # all four, one thread a worker
    python benchmarks/scaling.py --quick             # the same with a third of the points and tokens
    python benchmarks/scaling.py --axes workers --workers 1,2 --shards 12
    python benchmarks/scaling.py --axes stream-workers

A Llama of random weights is scored with its variants on shards of 4,096 tokens. The variants are made beforehand; each
run then scores everything from nothing, in turns (`--repeats`; the best of each point counts). Two times are told: from
the first job's begin to the last one's end, by the run's ledger, and the whole command's, imports, loading and report
included. Against tokens, variants and size a straight line is fitted to the first by least squares: its slope, its
intercept, and R^2, the share of the variance that it explains. The exit code is 1 when a line explains less than 98 %,
or when two workers reach less than 1.8 times the jobs per second of one on a machine of at least two free cores. With
`stream-workers`, which reads the model a layer at a time in every worker, two must take at most 0.6 of one's time.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from qeval.store.ledger import read_ledger
from tests.fixtures.bench import text
from tests.fixtures.tiny import save_tiny

_METHODS = ("rtn:g32", "rtn:int8-channel", "rtn:int3-g32", "rtn:g64", "rtn:g32-asym", "rtn:int3-channel")
_WINDOW, _SHARD_WINDOWS = 512, 8
_WIDTH, _INNER, _VOCABULARY = 512, 1536, 8192
_NEEDED = {"workers": 1.8, "stream-workers": 1 / 0.6}
"""The multiple of one worker's rate that two must reach, by axis."""
_STRAIGHT = 0.98


class Point(NamedTuple):
    """One comparison: decoder layers, shards of the text, variants, workers, and whether layers are streamed."""

    layers: int
    shards: int
    variants: int = 2
    workers: int = 1
    stream: bool = False


class Took(NamedTuple):
    """Seconds of one comparison: of its jobs, of all, and of processors."""

    jobs: float
    whole: float
    cpu: float
    """Of all its processes; on a loaded machine this is what can be compared."""
    shares: list[int]
    """Jobs by process."""


class Line(NamedTuple):
    """Seconds = intercept + slope * x, and the share of the seconds' variance that this explains."""

    slope: float
    intercept: float
    explained: float


class Axis(NamedTuple):
    """Points along one quantity: what it is called, and each point's."""

    unit: str
    points: tuple[Point, ...]
    of: Callable[[Point], float]


def main() -> int:
    """Run every point in turns, print lines and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--axes", default="tokens,variants,size,workers")
    parser.add_argument("--workers", default="1,2")
    parser.add_argument("--shards", type=int, default=12)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="three points a line, a third of the shards")
    arguments = parser.parse_args()
    shards = max(3, arguments.shards // 3) if arguments.quick else arguments.shards
    axes = _axes(arguments.layers, shards, [int(word) for word in arguments.workers.split(",")], quick=arguments.quick)
    chosen = {name: axes[name] for name in arguments.axes.split(",")}
    print(f"load of the last minute: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores", flush=True)
    with TemporaryDirectory(prefix="qeval-scaling-") as name:
        best = _measured(Path(name), list(dict.fromkeys(p for axis in chosen.values() for p in axis.points)), arguments)
    good = [
        _workers_told(axis, best, _NEEDED[name]) if name in _NEEDED else _line_told(axis, best)
        for name, axis in chosen.items()
    ]
    return 0 if all(good) else 1


def _axes(layers: int, shards: int, workers: Sequence[int], *, quick: bool) -> dict[str, Axis]:
    """Points along each quantity, the others held."""
    steps = (1, 2, 3) if quick else (1, 2, 3, 4, 5, 6)
    few = max(1, shards // 3)

    def spread(most: int) -> list[int]:
        return sorted({max(1, most * step // steps[-1]) for step in steps})

    return {
        "tokens": Axis("thousand tokens", tuple(Point(layers, n) for n in spread(shards)), _tokens),
        "variants": Axis("variants", tuple(Point(layers, few, n) for n in spread(6)), lambda p: p.variants),
        "size": Axis("million weights", tuple(Point(n, few) for n in spread(2 * layers)), _weights),
        "workers": Axis("workers", tuple(Point(layers, shards, workers=n) for n in workers), lambda p: p.workers),
        "stream-workers": Axis(
            "streaming workers",
            tuple(Point(layers, shards, workers=n, stream=True) for n in workers),
            lambda p: p.workers,
        ),
    }


def _tokens(point: Point) -> float:
    return point.shards * _SHARD_WINDOWS * _WINDOW / 1e3


def _weights(point: Point) -> float:
    """Of the matrices that a token goes through: projections (grouped queries: half for keys and values), mlp, head."""
    layer = 3 * _WIDTH**2 + 3 * _WIDTH * _INNER
    return (point.layers * layer + _VOCABULARY * _WIDTH) / 1e6


def fitted(x: Sequence[float], y: Sequence[float]) -> Line:
    """The line of the least squares.

    >>> fitted([1, 2, 3], [3, 5, 7])
    Line(slope=2.0, intercept=1.0, explained=1.0)
    """
    slope, intercept = np.polyfit(x, y, 1)
    left = np.asarray(y) - (slope * np.asarray(x) + intercept)
    total = np.asarray(y) - np.mean(y)
    explained = 1 - float(left @ left) / float(total @ total)
    return Line(*(round(float(value), 9) for value in (slope, intercept, explained)))


def _measured(folder: Path, points: Sequence[Point], arguments: argparse.Namespace) -> dict[Point, Took]:
    """The best of each point's runs; all variants are made first."""
    most = max(point.shards for point in points)
    (folder / "corpus.txt").write_text(text(most * _SHARD_WINDOWS * _WINDOW // 30), encoding="utf-8")
    for layers in dict.fromkeys(point.layers for point in points):
        _save(folder, layers)
        variants = max(point.variants for point in points if point.layers == layers)
        _compare(folder, Point(layers, 1, variants), windows=1)
    best: dict[Point, Took] = {}
    for _ in range(arguments.repeats):
        for point in points:
            took = _compare(folder, point, windows=point.shards * _SHARD_WINDOWS)
            print(
                f"{point}: jobs {took.jobs:.1f} s, whole {took.whole:.1f} s, processors {took.cpu:.1f} s, "
                f"jobs by process {took.shares}, load {os.getloadavg()[0]:.1f}",
                flush=True,
            )
            best[point] = min(took, best.get(point, took))
    return best


def _save(folder: Path, layers: int) -> None:
    sizes = {"hidden_size": _WIDTH, "intermediate_size": _INNER, "num_attention_heads": 8, "num_key_value_heads": 4}
    settings = {"num_hidden_layers": layers, "max_position_embeddings": 1024, "initializer_range": 0.03}
    save_tiny(folder / f"model-{layers}", vocab_size=_VOCABULARY, dtype=torch.float32, **sizes, **settings)


def _compare(folder: Path, point: Point, windows: int) -> Took:
    """One command from nothing but the variants."""
    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    shutil.rmtree(folder / "home" / "states", ignore_errors=True)
    flags = {
        "model": folder / f"model-{point.layers}", "methods": ",".join(_METHODS[: point.variants]), "tasks": "kl,ppl",
        "corpus": folder / "corpus.txt", "window": _WINDOW, "stride": _WINDOW, "max-windows": windows, "out": out,
        "threads": point.workers, "workers": point.workers, "device": "cpu",
    }  # fmt: skip
    words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    words += ["--stream"] if point.stream else []
    command = [sys.executable, "-c", "from qeval.cli.app import main; main()", "compare", *words, "--quiet"]
    start, before = time.perf_counter(), _cpu_of_children()
    environment = os.environ | {"QEVAL_HOME": str(folder / "home"), "OMP_NUM_THREADS": str(point.workers)}
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    whole, cpu = time.perf_counter() - start, _cpu_of_children() - before
    with read_ledger(out) as ledger:
        tried = ledger.attempts()
    owners = [attempt.owner for attempt in tried]
    ends = [attempt.ended for attempt in tried if attempt.ended is not None]
    span = max(ends) - min(attempt.began for attempt in tried)
    return Took(span, whole, cpu, [owners.count(owner) for owner in dict.fromkeys(owners)])


def _cpu_of_children() -> float:
    """Seconds of processors that ended commands and their workers took."""
    times = os.times()
    return times.children_user + times.children_system


def _line_told(axis: Axis, best: dict[Point, Took]) -> bool:
    """Print the line along an axis; whether it is straight."""
    line = fitted([axis.of(point) for point in axis.points], [best[point].jobs for point in axis.points])
    print(
        f"{axis.unit}: {line.slope:.3g} s each, {line.intercept:+.2f} s, R^2 {line.explained:.4f} "
        f"({len(axis.points)} points)"
    )
    return line.explained >= _STRAIGHT


def _workers_told(axis: Axis, best: dict[Point, Took], needed: float) -> bool:
    """Print how many times one worker's rate each number reaches; whether two reach what is needed."""
    by_count = {point.workers: best[point] for point in axis.points}
    one = by_count.get(1)
    if one is None:
        return True
    for count, took in by_count.items():
        whole, share = one.whole / took.whole, took.cpu / count / one.cpu
        print(
            f"{count} {axis.unit}: {one.jobs / took.jobs:.2f} times one (whole command {whole:.2f}); processor time a "
            f"worker {share:.2f} of one's, which is the share of its time that {count} free cores would take"
        )
    return 2 not in by_count or one.jobs / by_count[2].jobs >= needed


if __name__ == "__main__":
    sys.exit(main())

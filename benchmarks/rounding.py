"""Round-to-nearest against the memory: seconds of `quantize` beside those of plain copies of the same matrix.

    python -m benchmarks.rounding

A copy to new memory, as `quantize` makes its codes in, a copy over an old one, and rounding take turns on one matrix in
one process; each line has the best of the repeats, since what disturbs a run only ever slows it. GB/s count the fp32
weights read. On memory alone rounding would take about 1.1 copies: it reads the weights twice (range, then codes) and
writes a quarter of them, where a copy reads once and writes once.
"""

import argparse
import time
from collections.abc import Callable

import torch

from qeval.quant.grid import parse
from qeval.quant.rtn import quantize_rtn

GRIDS = ("int4-g128", "int4-g32", "int4-g128-asym", "int8-channel", "int8-tensor")


def seconds(work: Callable[[], object]) -> float:
    """What one run takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    """Print a line a grid."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=15)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    weight = torch.randn(arguments.rows, arguments.columns, generator=torch.Generator().manual_seed(0))
    old = weight.clone()
    gigabytes = weight.numel() * weight.element_size() / 1e9
    for name in GRIDS:
        grid = parse(name)
        works = weight.clone, lambda: old.copy_(weight), lambda grid=grid: quantize_rtn(weight, grid)
        times = [[seconds(work) for work in works] for _ in range(arguments.repeats)]
        new, over, rounding = (min(column) for column in zip(*times, strict=True))
        copies = f"copies: new {gigabytes / new:.2f}, over an old one {gigabytes / over:.2f} GB/s"
        ratios = f"{rounding / new:.1f} and {rounding / over:.1f} times their seconds"
        print(f"{name:15} {gigabytes / rounding:5.2f} GB/s; {copies}; {ratios}", flush=True)


if __name__ == "__main__":
    main()

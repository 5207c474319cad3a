"""Round-to-nearest against the memory: seconds of `quantize` beside those of a plain copy of the same matrix.

    python -m benchmarks.rounding

Copy and rounding take turns on one matrix in one process; each line has the best of the repeats, since what disturbs a
run only ever slows it. GB/s count the fp32 weights read. Rounding reads them twice (range, then codes) and writes a
quarter of them, so that on memory alone it would take 1.1 times a copy, which reads once and writes once.
"""

import argparse
import time
from collections.abc import Callable

import torch

from qeval.quant.grid import parse
from qeval.quant.rtn import quantize

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
    gigabytes = weight.numel() * weight.element_size() / 1e9
    for name in GRIDS:
        grid, copies, roundings = parse(name), [], []
        for _ in range(arguments.repeats):
            copies.append(seconds(weight.clone))
            roundings.append(seconds(lambda grid=grid: quantize(weight, grid)))  # type: ignore[misc]
        copy, rounding = min(copies), min(roundings)
        ratio = f"{rounding / copy:.1f} copies"
        print(f"{name:15} {gigabytes / rounding:6.2f} GB/s, a copy {gigabytes / copy:6.2f} GB/s: {ratio}", flush=True)


if __name__ == "__main__":
    main()

"""qeval's AWQ against NVIDIA Model Optimizer's `awq_lite`: one model, one calibration text, one grid, one process.

    python benchmarks/awq_vs_modelopt.py
    python benchmarks/awq_vs_modelopt.py --corpus test.txt --calibration valid.txt --samples 16 --length 512

All search input scales for INT4 in symmetric blocks of 128 on the same token ids, head and embedding in float. qeval
runs twice: without a clip search (`awq_lite` has none) and with the one that its `awq` does by default. The variants
are then scored by the same lines on the same held-out windows: KL(baseline || variant) in nats, the mean over all
positions. Seconds are those of calibrating and choosing, one side after the other, each on its own copy of the model,
none computing the head; `--repeats` takes turns. Prints lines and a JSON object. The exit code is 1 when neither of
qeval's recipes is ten times faster at no higher KL, 77 when nvidia-modelopt isn't installed.
"""

import argparse
import copy
import importlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from statistics import median
from typing import Any

import torch
from torch import Tensor

from qeval.backends.install import installed
from qeval.compare.loading import source_of_model
from qeval.compare.plan import calibration_of
from qeval.compare.settings import CalibrationChoice, ModelChoice
from qeval.compare.variants import BaselineModel
from qeval.config import parse_method
from qeval.metrics.tokens import mean_kl
from qeval.quantize.build import build_variant, source_of
from qeval.quantize.statistics import collect
from qeval.tasks.corpus import encode, load_corpus

RECIPES = ("awq:int4-g128-full-noclip", "awq:int4-g128-full")
_NEEDED = 10
PEER, PEER_METHOD = "modelopt.torch.quantization", "awq_lite"
_SKIPPED = 77
Samples = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Side:
    """One side's seconds a repeat, by the clock and of this process's processor time, and its KL from the baseline."""

    name: str
    seconds: list[float]
    cpu_seconds: list[float]
    kl_nats: float


def run_qeval(recipe: str, source: BaselineModel, samples: Samples) -> Callable[[], Any]:
    """Calibrate and choose; what opens the model with the result in place."""
    statistics = collect(source.model, source.description, samples, 0, _nobody)
    made = source_of(source.model, source.description, source.head, samples, statistics)
    variant = build_variant(made, parse_method(recipe), "benchmark", _nobody)
    skip, dtype = source.description.head, torch.float32
    return lambda: _lent(source.model, installed(source.model, variant, skip=skip, keep_dtype=dtype))


def run_modelopt(source: BaselineModel, samples: Samples) -> Callable[[], Any]:
    """The same by `awq_lite`, on a copy of the model, in Model Optimizer's own configuration of that name."""
    mtq = importlib.import_module(PEER)
    model = copy.deepcopy(source.model)

    def forward(quantized: Any) -> None:
        for sample in samples:
            quantized.base_model(input_ids=torch.tensor([list(sample)], device=model.device), use_cache=False)

    with torch.inference_mode():
        mtq.quantize(model, mtq.INT4_AWQ_CFG, forward)
    return lambda: _lent(model)


def _nobody(_: int) -> None:
    """Nobody is told how far it is."""


@contextmanager
def _lent(model: Any, context: Any = None) -> Iterator[Any]:
    with context or torch.inference_mode():
        yield model


@torch.inference_mode()
def states_of(model: Any, windows: Tensor) -> Tensor:
    """The final hidden states of all windows, [positions, d_model]."""
    return torch.cat([model.base_model(input_ids=w[None], use_cache=False).last_hidden_state[0] for w in windows])


def compare(arguments: argparse.Namespace) -> dict[str, Side]:
    """All sides, in turns."""
    loaded, source = source_of_model(ModelChoice(arguments.model, device=arguments.device))
    asked = CalibrationChoice(arguments.calibration, arguments.samples, arguments.length)
    samples = calibration_of(asked, loaded).samples
    ids = encode(loaded.tokenizer, load_corpus(arguments.corpus).text)[: arguments.windows * arguments.window]
    windows = torch.tensor(ids, device=arguments.device).reshape(arguments.windows, arguments.window)
    base, logits = states_of(source.model, windows), source.head.logits
    runs = {recipe: partial(run_qeval, recipe) for recipe in RECIPES} | {PEER_METHOD: run_modelopt}
    sides: dict[str, Side] = {}
    for _ in range(arguments.repeats):
        for name, run in runs.items():
            start, before = time.perf_counter(), time.process_time()
            opened = run(source, samples)
            seconds, cpu = time.perf_counter() - start, time.process_time() - before
            with opened() as model:
                kl = mean_kl(logits, base, logits, states_of(model, windows))
            side = sides.setdefault(name, Side(name, [], [], kl))
            side.seconds.append(seconds)
            side.cpu_seconds.append(cpu)
            print(f"{name}: {seconds:.1f} s ({cpu:.1f} s of processor time), KL {kl:.5f} nats", flush=True)
    return sides


def main() -> int:
    """Run both sides and compare them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="an alias, a hub id, a folder or a GGUF file")
    parser.add_argument("--calibration", default="pydoc", help="a source that qeval knows, or a text file")
    parser.add_argument("--samples", type=int, default=16, help="calibration sequences")
    parser.add_argument("--length", type=int, default=512, help="tokens in each")
    parser.add_argument("--corpus", default="pydoc", help="what KL is measured on")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch, for both sides")
    parser.add_argument("--repeats", type=int, default=1)
    arguments = parser.parse_args()
    try:
        peer = version("nvidia-modelopt")
    except PackageNotFoundError:
        print("Skipped: nvidia-modelopt is not installed (pip install nvidia-modelopt, in an environment of its own).")
        return _SKIPPED
    importlib.import_module(PEER)  # before the clock starts
    torch.set_num_threads(arguments.threads)
    sides = compare(arguments)
    passed = [_judged(sides[recipe], sides[PEER_METHOD], peer) for recipe in RECIPES]
    settings = {"modelopt": peer} | vars(arguments)
    print(json.dumps({"sides": [asdict(side) for side in sides.values()], "settings": settings}))
    return int(not any(passed))


def _judged(ours: Side, theirs: Side, version_of_peer: str) -> bool:
    """Print how one recipe compares; whether it is as much faster as is asked for at no higher KL."""
    ratio = median(theirs.seconds) / median(ours.seconds)
    cpu_ratio = median(theirs.cpu_seconds) / median(ours.cpu_seconds)
    kls = f"KL {ours.kl_nats:.5f} to {theirs.kl_nats:.5f} nats"
    peer = f"{PEER_METHOD} of nvidia-modelopt {version_of_peer}"
    print(f"{ours.name}: {ratio:.1f} times as fast as {peer} ({cpu_ratio:.1f} by processor time); {kls}")
    return ratio >= _NEEDED and ours.kl_nats <= theirs.kl_nats


if __name__ == "__main__":
    sys.exit(main())

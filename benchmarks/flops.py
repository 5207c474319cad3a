"""What share of the machine's fp32 matrix-product rate scoring reaches, and where the rest of the time goes.

    python benchmarks/flops.py --model demo --window 1024 --rounds 5

The peak is the best of square products of 1024 and 2048, measured in this process with the same threads, in turns
with the scoring of one batch of random tokens, so that a machine that others use slows both. Counted are the model's
own products: projections, attention over what a causal mask leaves, and the head at every position. The table comes
from one more pass with clocks around the model's parts. Prints a line and JSON. The exit code is 1 below `--target`.
"""

import argparse
import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import nn

from qeval.backends.torch import TorchSession
from qeval.metrics.tokens import model_numbers
from qeval.models.info import LoadedModel
from qeval.models.load import load_model
from qeval.models.source import resolve
from qeval.types import Request

_SIDES = (1024, 2048)
_ATTENTION = "scaled_dot_product_attention"


@dataclass(frozen=True)
class Counted:
    """Operations of one batch, by part."""

    projections: float
    attention: float
    head: float

    @property
    def every(self) -> float:
        """All of them."""
        return self.projections + self.attention + self.head


def count(model: Any, sequences: int, window: int) -> Counted:
    """Two operations a multiplication and addition; of attention's square, what lies at or below the diagonal."""
    config = model.config.get_text_config()
    head = model.get_output_embeddings()
    tokens = sequences * window
    inside = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear) and m is not head)
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    pairs = sequences * window * (window + 1) / 2
    attention = config.num_hidden_layers * 2 * 2 * pairs * config.num_attention_heads * size
    return Counted(2.0 * inside * tokens, attention, 2.0 * head.weight.numel() * tokens)


def score(session: TorchSession, requests: list[Request]) -> None:
    """What a baseline's corpus job computes: states of every position, logits, log-softmax, entropy."""
    states = torch.cat(session.states(requests))
    targets = torch.tensor([token for request in requests for token in request.tokens])
    model_numbers(session.logits, states, targets, session.block_rows)


def peak() -> float:
    """Operations a second of a large square product, the best of some."""
    return max(_rate(torch.ones(side, side)) for side in _SIDES for _ in range(2))


def _rate(a: torch.Tensor) -> float:
    start = time.perf_counter()
    a @ a
    return float(2.0 * a.shape[0] ** 3 / (time.perf_counter() - start))


def parts(loaded: LoadedModel, session: TorchSession, requests: list[Request]) -> dict[str, float]:
    """Seconds by part of one scoring, with clocks around modules; what no clock saw is the rest."""
    spent: dict[str, float] = defaultdict(float)
    with _clocks(loaded.model, spent):
        start = time.perf_counter()
        states = torch.cat(session.states(requests))
        forward = time.perf_counter() - start
    inside = sum(spent.values())
    targets = torch.zeros(len(states), dtype=torch.long)
    start = time.perf_counter()
    for first in range(0, len(states), session.block_rows):
        session.logits(states[first : first + session.block_rows])
    spent["head product"] = time.perf_counter() - start
    start = time.perf_counter()
    model_numbers(session.logits, states, targets, session.block_rows)
    spent["log-softmax, entropy"] = max(0.0, time.perf_counter() - start - spent["head product"])
    spent["rotary, residuals, masks, Python"] = forward - inside
    return dict(spent)


@contextmanager
def _clocks(model: Any, spent: dict[str, float]) -> Iterator[None]:
    handles, starts = [], {}

    def watch(module: nn.Module, label: str) -> None:
        handles.append(module.register_forward_pre_hook(lambda m, _: starts.__setitem__(id(m), time.perf_counter())))

        def stop(m: nn.Module, *_: Any) -> None:
            spent[label] += time.perf_counter() - starts[id(m)]

        handles.append(module.register_forward_hook(stop))

    for name, module in model.base_model.named_modules():
        if isinstance(module, nn.Linear):
            watch(module, "projections")
        elif not list(module.children()) and isinstance(module, nn.Embedding):
            watch(module, "embedding")
        elif not list(module.children()):
            watch(module, "norms" if "norm" in name else "rotary table" if "rotary" in name else "activation")
    original = getattr(nn.functional, _ATTENTION)
    setattr(nn.functional, _ATTENTION, _timed(original, spent))
    try:
        yield
    finally:
        setattr(nn.functional, _ATTENTION, original)
        for handle in handles:
            handle.remove()


def _timed(function: Callable[..., Any], spent: dict[str, float]) -> Callable[..., Any]:
    def timed(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        found = function(*args, **kwargs)
        spent["attention"] += time.perf_counter() - start
        return found

    return timed


def main() -> int:
    """Measure in turns, print, compare with the target."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--sequences", type=int, default=2, help="windows a batch")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--target", type=float, default=0.75)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    loaded = load_model(resolve(arguments.model))
    session = TorchSession(loaded.model)
    ids = torch.randint(loaded.info.vocab_size, (arguments.sequences, arguments.window)).tolist()
    requests = [Request(tuple(row), tuple(range(arguments.window))) for row in ids]
    counted = count(loaded.model, arguments.sequences, arguments.window)
    score(session, requests)
    peaks, seconds = [], []
    for _ in range(arguments.rounds):
        peaks.append(peak())
        start = time.perf_counter()
        score(session, requests)
        seconds.append(time.perf_counter() - start)
    peaks.append(peak())
    shares = [counted.every / s / ((peaks[i] + peaks[i + 1]) / 2) for i, s in enumerate(seconds)]
    best, table = max(shares), parts(loaded, session, requests)
    whole = sum(table.values())
    for label, value in sorted(table.items(), key=lambda item: -item[1]):
        print(f"{label:34s} {value:8.3f} s {value / whole:6.1%}")
    result = {
        "share_of_peak_median": median(shares), "share_of_peak_best": best, "peak_gflops": max(peaks) / 1e9,
        "scoring_gflops": counted.every / min(seconds) / 1e9, "threads": arguments.threads,
        "window": arguments.window, "operations": vars(counted), "parts_seconds": table,
    }  # fmt: skip
    print(f"scoring reaches {median(shares):.1%} (median; best {best:.1%}) of the fp32 peak, {max(peaks) / 1e9:.0f} "
          f"GFLOP/s on {arguments.threads} threads, windows of {arguments.window}")  # fmt: skip
    print(json.dumps(result))
    return 0 if median(shares) >= arguments.target else 1


if __name__ == "__main__":
    sys.exit(main())

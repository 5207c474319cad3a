"""qeval's measurement of its `onnxruntime-genai` engine beside that package's own way: a plain loop of a Generator.

    qeval export --model demo --method rtn:g32 --accuracy-level 4 --out int4
    python benchmarks/bench_vs_genai.py --folder int4 --batch 1 --prompt 64 --generate 64

The plain loop is that of the package's own benchmark script: `append_tokens` is the prompt, the first
`generate_next_token` only picks from its logits, and each one after that is a token. qeval's side is the engine's
`prefill` and `step`. Both run the same prompts over one model in memory (two copies of it in one process differ by 7 %,
whichever way they are run: where their weights come to lie decides that), and take turns token by token, the order of
each turn by lot, so that a machine that drifts favours neither.

Figures are medians. The two agree where the median of the turns' ratios is within 5 % of 1, for the prompt and for
generation; the exit code is 1 where they don't.
"""

import argparse
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnxruntime_genai as og

from qeval.bench.engines.genai import GenaiEngine

_TOLERANCE = 0.05


class Turn(NamedTuple):
    """Seconds that the same piece of work took on both sides."""

    plain: float
    ours: float


class PlainLoop:
    """A Generator as one would write it down."""

    def __init__(self, model: Any, batch: int, capacity: int) -> None:
        """Room for `batch` sequences of `capacity` tokens; end-of-sequence ends none of them."""
        parameters = og.GeneratorParams(model)
        parameters.set_search_options(batch_size=batch, do_sample=False, max_length=capacity, min_length=capacity)
        self._generator = og.Generator(model, parameters)

    def prompt(self, prompts: np.ndarray) -> None:
        """Run the prompts [batch, length]."""
        self._generator.append_tokens(prompts.astype(np.int32))

    def pick(self) -> None:
        """Pick the first token, which runs nothing."""
        self._generator.generate_next_token()

    def token(self) -> None:
        """Run the token that was picked, and pick the next."""
        self._generator.generate_next_token()


class Ours:
    """The engine, as `qeval bench` runs it."""

    def __init__(self, engine: GenaiEngine, batch: int, capacity: int) -> None:
        """Forget what was before."""
        engine.reset(batch, capacity)
        self._engine, self._tokens = engine, np.empty(0, np.int64)

    def prompt(self, prompts: np.ndarray) -> None:
        """Run the prompts [batch, length]."""
        self._tokens = self._engine.prefill(prompts)

    def token(self) -> None:
        """Run the tokens that were proposed."""
        self._tokens = self._engine.step(self._tokens)


def turn(plain: Callable[[], None], ours: Callable[[], None], lot: random.Random) -> Turn:
    """One piece of work on both sides, in the order that the lot gives."""
    seconds: dict[Callable[[], None], float] = {}
    for side in lot.sample([plain, ours], 2):
        start = time.perf_counter()
        side()
        seconds[side] = time.perf_counter() - start
    return Turn(seconds[plain], seconds[ours])


def repeat(engine: GenaiEngine, prompts: np.ndarray, generate: int, lot: random.Random) -> tuple[Turn, list[Turn]]:
    """The prompts, then `generate` tokens after the first."""
    room = len(prompts), prompts.shape[1] + generate + 1
    plain, ours = PlainLoop(engine.model, *room), Ours(engine, *room)
    prompt = turn(lambda: plain.prompt(prompts), lambda: ours.prompt(prompts), lot)
    plain.pick()
    return prompt, [turn(plain.token, ours.token, lot) for _ in range(generate)]


def agrees(name: str, turns: list[Turn], tokens: int) -> bool:
    """Print both sides' median seconds and tokens per second, and the turns' ratio; whether that is near 1."""
    print(f"{name:10}", end="")
    for side, seconds in (("plain loop", [each.plain for each in turns]), ("qeval", [each.ours for each in turns])):
        median = statistics.median(seconds)
        print(f"  {side} {median * 1e3:9.2f} ms {tokens / median:8.1f} tokens/s", end="")
    ratios = [each.plain / each.ours for each in turns]
    low, ratio, high = statistics.quantiles(ratios, n=4)
    print(f"  ratio {ratio:.3f} (quartiles {low:.3f} to {high:.3f}, {len(turns)} turns)")
    return abs(ratio - 1) <= _TOLERANCE


def main() -> int:
    """Measure both sides and compare them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="an ONNX folder with a genai_config.json")
    parser.add_argument("--batch", type=int, default=1, help="sequences at a time (default: 1)")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of a prompt (default: 64)")
    parser.add_argument("--generate", type=int, default=64, help="tokens to generate (default: 64)")
    parser.add_argument("--repeats", type=int, default=11, help="at least 2 (default: 11)")
    parser.add_argument("--threads", type=int, default=1, help="of both sides (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="of the prompts and the lots (default: 0)")
    arguments = parser.parse_args()
    lot = random.Random(arguments.seed)
    prompts = np.random.default_rng(arguments.seed).integers(10, 1000, (arguments.batch, arguments.prompt))
    engine = GenaiEngine(arguments.folder, "cpu", arguments.threads)
    repeat(engine, prompts, 2, lot)  # a warm-up
    found = [repeat(engine, prompts, arguments.generate, lot) for _ in range(arguments.repeats)]
    prompt = agrees("prompt", [each for each, _ in found], prompts.size)
    generation = agrees("generation", [each for _, tokens in found for each in tokens], len(prompts))
    print("They agree within 5 %." if prompt and generation else "They differ by more than 5 %.")
    return 0 if prompt and generation else 1


if __name__ == "__main__":
    sys.exit(main())

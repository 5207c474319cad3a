"""Rounded activations against weights alone: CPU seconds of scoring one window in torch, the head included.

    python -m benchmarks.scheme_cost

The same weights with and without the rounding of inputs take turns in one process; each line has the least CPU time of
the repeats (of the process, so that other work on the machine counts little), and their ratio. Divergences, which cost
the same for both, are left out, so that a run's own ratio is smaller.
"""

import argparse
import time
from dataclasses import replace

import torch

from qeval.backends.torch import TorchBackend
from qeval.compare.schemes import with_scheme
from qeval.config import parse_method
from qeval.models.load import load_model
from qeval.models.source import resolve
from qeval.models.structure.graph import describe_model
from qeval.models.structure.head import head_of
from qeval.quant.variant import Variant
from qeval.quantize.build import build_variant, source_of
from qeval.types import Request

RECIPES = ("rtn:int4-g128+a-int4-token", "rtn:mxfp4+a-mxfp4", "rtn:nvfp4+a-nvfp4", "rtn:fp8+a-fp8", "int8-w8a8")


def cpu_seconds(backend: TorchBackend, variant: Variant, request: Request) -> float:
    """Return the CPU time of a window's states and logits."""
    with backend.open(variant) as session, torch.inference_mode():
        start = time.process_time()
        session.logits(session.states([request])[0])
        return time.process_time() - start


def main() -> None:
    """Print a line a recipe."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--recipes", nargs="+", default=RECIPES)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    loaded = load_model(resolve(arguments.model), device="cpu", dtype=None)
    model, description, head = loaded.model, describe_model(loaded.model), head_of(loaded.model)
    backend = TorchBackend(model, description, head, torch.float16)
    generator = torch.Generator().manual_seed(0)
    ids = tuple(torch.randint(0, loaded.info.vocab_size, (arguments.tokens,), generator=generator).tolist())
    request = Request(ids, tuple(range(len(ids))))
    source = source_of(model, description, head, [ids[:128]], {})
    for name in arguments.recipes:
        recipe = parse_method(name)
        weights = build_variant(source, recipe.weights_alone, "weights", lambda _: None)
        whole = with_scheme(weights, recipe, model, description, [ids[:128]], lambda _: None)
        pair = (weights, replace(whole, key="whole"))
        times = [[cpu_seconds(backend, each, request) for each in pair] for _ in range(arguments.repeats)]
        alone, rounded = (min(column) for column in zip(*times, strict=True))
        print(f"{name:28} {alone:6.2f} s alone, {rounded:6.2f} s: {rounded / alone:.2f} times", flush=True)


if __name__ == "__main__":
    main()

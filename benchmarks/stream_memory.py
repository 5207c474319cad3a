"""What a streamed run takes in memory, and in seconds, beside the same run with the whole model in memory.

    python benchmarks/stream_memory.py --megabytes 400 --share 4
    python benchmarks/stream_memory.py --megabytes 600 --share 4 --method awq:g32
    python benchmarks/stream_memory.py --megabytes 300 --share 4 --experts 8

Makes a model of random weights (fp16; with `--experts` a mixture, two a token), runs `qeval compare` with one method on
it streamed, with `--max-memory` at the weights' size divided by `--share`, and unstreamed, each in a child process that
has run a tiny model first, so that the program and its libraries are there already. Prints each one's peak beyond that
(VmHWM, reset before the run) and compares the rows. The exit code is 1 when the limit was not kept or a number differs
by more than 1e-5.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from qeval.cli.app import run_program
from qeval.store.rows import concat
from tests.fixtures.bench import save_mmlu, text
from tests.fixtures.tiny import save_tiny, tiny_tokenizer

_TOLERANCE = 1e-5
_WIDTH, _INNER, _VOCABULARY = 768, 2048, 16384


def save_model(folder: Path, megabytes: int, experts: int = 0) -> int:
    """A Llama of random fp16 weights of about that size in `folder`, or a Mixtral of so many experts; and its bytes."""
    layers = max(2, round((megabytes * 1e6 - 4 * _VOCABULARY * _WIDTH) / 2 / (3 * _WIDTH**2 + 3 * _WIDTH * _INNER)))
    sizes: dict[str, Any] = {
        "vocab_size": _VOCABULARY, "hidden_size": _WIDTH, "num_hidden_layers": layers, "num_attention_heads": 12,
        "num_key_value_heads": 6, "max_position_embeddings": 1024, "bos_token_id": None, "eos_token_id": None,
        "dtype": torch.float16, "tie_word_embeddings": False,
    }  # fmt: skip
    torch.manual_seed(0)
    if experts:
        mixture = MixtralConfig(intermediate_size=_INNER // experts, num_local_experts=experts, **sizes)
        MixtralForCausalLM(mixture).half().save_pretrained(folder)
    else:
        LlamaForCausalLM(LlamaConfig(intermediate_size=_INNER, **sizes)).half().save_pretrained(folder)
    tiny_tokenizer(vocab_size=_VOCABULARY).save_pretrained(folder)
    return (folder / "model.safetensors").stat().st_size


def child(arguments: argparse.Namespace) -> None:
    """Run a tiny model, then the real one, and print what the latter took beyond what was there."""
    folder = arguments.folder
    os.environ["QEVAL_HOME"] = str(folder / "home" / arguments.child)
    flags = [
        "--methods",
        arguments.method,
        "--tasks",
        "kl,ppl,mmlu",
        "--corpus",
        str(folder / "corpus.txt"),
        "--window",
        "128",
    ]
    flags += ["--stride", "128", "--max-windows", str(arguments.windows), "--mmlu-dir", str(folder / "mmlu")]
    flags += ["--calibration", str(folder / "corpus.txt"), "--calibration-samples", "8", "--calibration-length", "128"]
    flags += ["--shots", "2", "--threads", str(arguments.threads), "--device", "cpu", "--quiet"]
    more = ["--stream", "--max-memory"] if arguments.child == "streamed" else []
    tiny = [*flags, *more, *(["1GiB"] if more else []), "--model", str(folder / "tiny"), "--out", str(folder / "warm")]
    if code := run_program(["compare", *tiny]):
        raise SystemExit(code)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before, start = _status("VmRSS"), time.perf_counter()
    real = [*flags, *more, *([str(arguments.limit)] if more else []), "--model", str(folder / "model")]
    code = run_program(["compare", *real, "--out", str(folder / arguments.child)])
    print(json.dumps({"seconds": time.perf_counter() - start, "bytes": _status("VmHWM") - before, "program": before}))
    raise SystemExit(code)


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def _measured(arguments: argparse.Namespace, kind: str, folder: Path, limit: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--child", kind, "--folder", str(folder), "--limit", str(limit)]
    command += ["--method", arguments.method, "--windows", str(arguments.windows), "--threads", str(arguments.threads)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(
        f"{kind:12s} {found['bytes'] / 2**20:7.0f} MiB beyond the program's {found['program'] / 2**20:.0f} MiB, "
        f"{found['seconds']:.1f} s",
        flush=True,
    )
    return found


def largest_difference(folder: Path) -> float:
    """The largest difference of a number between the two runs' rows."""
    worst = 0.0
    for kind in ("tokens", "items"):
        one, other = (
            concat(kind, sorted((folder / name / "rows" / kind).glob("*.parquet"))).to_pandas()
            for name in ("streamed", "whole")
        )
        order = [c for c in ("variant", "window", "position", "subject", "item") if c in one]
        one, other = (frame.sort_values(order, ignore_index=True) for frame in (one, other))
        if not one[order].equals(other[order]):
            raise SystemExit(f"The {kind} rows of the two runs are not the same ones.")
        for name in one.select_dtypes("number"):
            worst = max(worst, float((one[name] - other[name]).abs().max()))
        for name in ("choice_loglikelihoods",) if kind == "items" else ():
            worst = max(worst, *(float(abs(a - b).max()) for a, b in zip(one[name], other[name], strict=True)))
    return worst


def main() -> int:
    """Make the model, measure both, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=400, help="of the fp16 weights")
    parser.add_argument("--share", type=float, default=4, help="--max-memory is the weights' size divided by it")
    parser.add_argument("--method", default="rtn:g32", help="one method of `qeval methods`")
    parser.add_argument("--experts", type=int, default=0, help="in every layer, in place of one MLP; 0: none")
    parser.add_argument("--windows", type=int, default=16, help="of 128 tokens")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--child", choices=("streamed", "whole"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--limit", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = save_model(folder / "model", arguments.megabytes, arguments.experts)
        save_tiny(folder / "tiny", max_position_embeddings=1024)
        save_mmlu(folder / "mmlu")
        (folder / "corpus.txt").write_text(text(1000), encoding="utf-8")
        limit = int(size / arguments.share)
        print(f"weights      {size / 2**20:7.0f} MiB; --max-memory {limit / 2**20:.0f} MiB", flush=True)
        streamed, whole = (_measured(arguments, kind, folder, limit) for kind in ("streamed", "whole"))
        worst = largest_difference(folder)
    print(f"memory       {whole['bytes'] / streamed['bytes']:.1f} times less, limit used to "
          f"{streamed['bytes'] / limit:.0%}; time {streamed['seconds'] / whole['seconds']:.2f} times")  # fmt: skip
    print(f"rows         differ by at most {worst:.1e}")
    return 0 if streamed["bytes"] <= limit and worst <= _TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main())

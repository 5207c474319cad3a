"""qeval's KL-divergence beside `llama-perplexity --kl-divergence`: one float model, three GGUF quantizations of it.

    python benchmarks/kl_vs_llamacpp.py --gguf SmolLM2-135M-Instruct.Q4_1.gguf --corpus wikitext-test.txt --chunks 8

The GGUF file is dequantized to F32 and quantized to every type by `llama-quantize`. Both sides then score the same
files on the same windows of 512 tokens, their second half: llama.cpp with its own kernels, qeval on what transformers
reads of them, in fp32. The two differ by llama.cpp's 8-bit activations and by its 16-bit logits, which cost some
thousandths of a nat by themselves, and by nothing else: the exit code is 1 when the KL differs by more than 0.005 nats
plus 10 %. Loading a model and tokenizing count on neither side.

Without the binaries (build llama.cpp's `llama-perplexity` and `llama-quantize`, and give their folder by `--bin` or
have it on the PATH) there is nothing to measure, and the exit code is 0.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qeval.backends.torch import TorchSession
from qeval.models.load import load_model
from qeval.models.source import resolve
from qeval.score.corpus import baseline_columns, shards_of, variant_columns, window_states
from qeval.tasks.corpus import load_corpus
from qeval.tasks.protocols import PROTOCOLS

_BINARIES = ("llama-perplexity", "llama-quantize")
_TOLERANCE, _FLOOR_NATS = 0.10, 0.005
_WINDOW = 512
_STARTS = re.compile(r"calculating perplexity over|computing over")
_NAMES = {"variant": "v", "backend": "torch", "corpus": "c"}


@dataclass(frozen=True)
class Scored:
    """One model on one side: mean KL from the baseline in nats (NaN: the baseline), perplexity, seconds to score."""

    kl: float
    ppl: float
    seconds: float


class LlamaCpp:
    """llama.cpp's perplexity tool on one corpus."""

    def __init__(self, perplexity: str, corpus: Path, logits: Path, arguments: argparse.Namespace) -> None:
        """`logits` is where the baseline's are kept."""
        self._command = [perplexity, "-f", str(corpus), "-c", str(_WINDOW), "-b", str(_WINDOW), "-ngl", "0"]
        self._command += ["--chunks", str(arguments.chunks), "-t", str(arguments.threads)]
        self._logits = logits

    def baseline(self, gguf: Path) -> Scored:
        """Score the float model and keep its logits."""
        text, seconds = self._run(gguf)
        return Scored(float("nan"), _number(r"Final estimate: PPL = ([\d.]+)", text), seconds)

    def variant(self, gguf: Path) -> Scored:
        """Compare a quantized model with the logits that were kept."""
        text, seconds = self._run(gguf, "--kl-divergence")
        return Scored(
            _number(r"Mean\s+KLD:\s+([-\d.]+)", text), _number(r"Mean PPL\(Q\)\s*:\s*([\d.]+)", text), seconds
        )

    def _run(self, gguf: Path, *flags: str) -> tuple[str, float]:
        """What the tool printed, and the seconds from where it says that it starts to score."""
        command = [*self._command, "-m", str(gguf), "--kl-divergence-base", str(self._logits), *flags]
        lines, start = [], None
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                lines.append(line)
                start = time.perf_counter() if start is None and _STARTS.search(line) else start
        if process.returncode or start is None:
            raise SystemExit(f"{command[0]} failed with {process.returncode}; its last words:\n{''.join(lines)[-800:]}")
        return "".join(lines), time.perf_counter() - start


class Qeval:
    """qeval's own arithmetic on what transformers reads of the same files."""

    def __init__(self, corpus: Path, arguments: argparse.Namespace) -> None:
        """The windows are cut when the first model, whose tokenizer they need, is there."""
        self._corpus, self._arguments = corpus, arguments
        self._shards: Any = ()
        self._states: list[torch.Tensor] = []
        self._session: TorchSession | None = None

    def baseline(self, gguf: Path) -> Scored:
        """Score the float model and keep its final states."""
        loaded = load_model(resolve(str(gguf)))
        ids = loaded.tokenizer(load_corpus(str(self._corpus)).text, add_special_tokens=False)["input_ids"]
        made = PROTOCOLS["llamacpp-512"].windows(ids, bos=_bos(loaded.tokenizer), max_windows=self._arguments.chunks)
        self._shards, self._session = shards_of(made.windows), TorchSession(loaded.model)
        start = time.perf_counter()
        self._states = [self._run(self._session, shard) for shard in self._shards]
        rows = [baseline_columns(self._session, *pair, _NAMES) for pair in zip(self._shards, self._states, strict=True)]
        return _scored(rows, start)

    def variant(self, gguf: Path) -> Scored:
        """Compare a quantized model with the states that were kept."""
        session = TorchSession(load_model(resolve(str(gguf))).model)
        assert self._session is not None
        start = time.perf_counter()
        rows = [
            variant_columns(self._session.logits, base, session, self._run(session, shard), shard, _NAMES)
            for shard, base in zip(self._shards, self._states, strict=True)
        ]
        return _scored(rows, start)

    def bytes_kept(self) -> int:
        """Bytes of the baseline's states."""
        return sum(states.numel() * states.element_size() for states in self._states)

    def _run(self, session: TorchSession, shard: Any) -> torch.Tensor:
        return window_states(session, shard.windows, self._arguments.batch_tokens, lambda done: None)


def _scored(rows: Sequence[dict[str, Any]], start: float) -> Scored:
    nll, kl = (np.concatenate([_values(part[name]) for part in rows]) for name in ("nll", "kl_nats"))
    mean = float(np.nanmean(kl)) if np.isfinite(kl).any() else float("nan")
    return Scored(mean, float(np.exp(np.nanmean(nll))), time.perf_counter() - start)


def _values(column: Any) -> np.ndarray:
    return np.array(column.to_pandas(), dtype=np.float64) if hasattr(column, "to_pandas") else np.asarray(column)


def _bos(tokenizer: Any) -> int | None:
    """BOS where the tokenizer puts one, as llama.cpp does."""
    return tokenizer.bos_token_id if tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id] else None


def _number(pattern: str, text: str) -> float:
    found = re.search(pattern, text)
    if found is None:
        raise SystemExit(f"llama-perplexity printed nothing like '{pattern}'; its last words:\n{text[-800:]}")
    return float(found[1])


def _called(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, errors="replace")
    if done.returncode:
        raise SystemExit(f"{command[0]} failed with {done.returncode}; its last words:\n{done.stderr[-800:]}")
    return done.stdout + done.stderr


def _quantized(quantize: str, source: Path, kind: str, folder: Path) -> Path:
    made = folder / f"model.{kind}.gguf"
    _called([quantize, "--allow-requantize", str(source), str(made), kind])
    return made


def _table(kinds: Sequence[str], theirs: Sequence[Scored], ours: Sequence[Scored], chunks: int) -> bool:
    """Print both sides; whether their KL agrees."""
    print(f"{'model':8} {'KL llama.cpp':>13} {'KL qeval':>10} {'ppl llama.cpp':>14} {'ppl qeval':>10}", end="")
    print(f" {'s/window':>9} {'qeval':>7}")
    agree = True
    for kind, their, our in zip(kinds, theirs, ours, strict=True):
        per_window = their.seconds / chunks, our.seconds / chunks
        print(f"{kind:8} {their.kl:13.6f} {our.kl:10.6f} {their.ppl:14.4f} {our.ppl:10.4f}", end="")
        print(f" {per_window[0]:9.3f} {per_window[1]:7.3f}")
        agree &= not abs(their.kl - our.kl) > _FLOOR_NATS + _TOLERANCE * our.kl  # NaN, the baseline's, is not compared
    return agree


def main() -> int:
    """Run both sides on every model, taking turns, and compare them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf", type=Path, required=True, help="the model; what is quantized in it is dequantized")
    parser.add_argument("--corpus", type=Path, required=True, help="a UTF-8 text file")
    parser.add_argument("--types", default="Q8_0,Q5_0,Q4_0", help="GGUF types, separated by commas")
    parser.add_argument("--chunks", type=int, default=8, help="windows of 512 tokens (default: 8)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of both sides")
    parser.add_argument("--batch-tokens", type=int, default=2048, help="qeval's")
    parser.add_argument("--bin", help="the folder of llama.cpp's binaries (default: the PATH)")
    arguments = parser.parse_args()
    perplexity, quantize = (shutil.which(name, path=arguments.bin) for name in _BINARIES)
    if perplexity is None or quantize is None:
        print(f"Skipped: {' and '.join(_BINARIES)} are not in {arguments.bin or 'the PATH'}.")
        return 0
    torch.set_num_threads(arguments.threads)
    kinds = arguments.types.split(",")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        base = _quantized(quantize, arguments.gguf, "F32", folder)
        llama, ours = (
            LlamaCpp(perplexity, arguments.corpus, folder / "logits", arguments),
            Qeval(arguments.corpus, arguments),
        )
        pairs = [(llama.baseline(base), ours.baseline(base))]
        for kind in kinds:
            variant = _quantized(quantize, base, kind, folder)
            pairs.append((llama.variant(variant), ours.variant(variant)))
        theirs, own = zip(*pairs, strict=True)
        agree = _table(["F32", *kinds], theirs, own, arguments.chunks)
        scored = arguments.chunks * (_WINDOW // 2 - 1)
        bytes_kept = (folder / "logits").stat().st_size / scored, ours.bytes_kept() / scored
    seconds = sum(each.seconds for each in theirs), sum(each.seconds for each in own)
    print(f"bytes kept a scored token   llama.cpp {bytes_kept[0]:,.0f}, qeval {bytes_kept[1]:,.0f}", end="")
    print(f" ({bytes_kept[0] / bytes_kept[1]:.1f} times less)")
    print(f"seconds, baseline and {len(kinds)} variants   llama.cpp {seconds[0]:.1f}, qeval {seconds[1]:.1f}", end="")
    print(f" (ratio {seconds[0] / seconds[1]:.2f})")
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())

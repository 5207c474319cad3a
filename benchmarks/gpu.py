"""Where the time of `qeval compare --methods awq,rtn,mixed` goes on a GPU, phase by phase, without a download.

    python benchmarks/gpu.py --shape llama-3.2-3b --windows 64 --questions 20

The model has the shape that is named and random weights; text and questions are made up, so every figure but time and
memory means nothing. Beside each phase's seconds stands what share of the machine's own rate its matrix products
reach, the rate being that of a product of 8192 by 8192 in the compute type, timed in this process. Questions a second
beside lm-evaluation-harness's: `benchmarks/mmlu_vs_lm_eval.py --device cuda`. Prints a table, and JSON with --json.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from qeval.compare.cost import flops_per_second
from qeval.compare.environment import describe_environment
from qeval.compare.plan import Plan, make_plan
from qeval.compare.run import membership, run_comparison
from qeval.compare.settings import CalibrationChoice, CorpusChoice, ModelChoice, Settings, TaskChoice
from qeval.config import parse_methods
from qeval.paths import HOME
from qeval.progress import Advance, Silent
from qeval.score.choices import shared_tokens

SHAPES = {
    "llama-3.2-3b": {
        "vocab_size": 128256, "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28,
        "num_attention_heads": 24, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True,
    },
    "llama-3.1-8b": {
        "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": False,
    },
    "tiny": {
        "vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True,
    },
}  # fmt: skip
_SUBJECTS = 4


@dataclass(frozen=True)
class Phase:
    """One phase of the run: its name, seconds, and the share of the machine's rate (None where no count is known)."""

    name: str
    seconds: float
    share: float | None


class Timed(Silent):
    """Keeps the seconds of every phase."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, label: str, units: int) -> Iterator[Advance]:
        del units
        start = time.perf_counter()
        yield lambda done: None
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds[label] = self.seconds.get(label, 0.0) + time.perf_counter() - start


def main() -> int:
    """Measure, and print a table."""
    arguments = parse(sys.argv[1:])
    with TemporaryDirectory() as temporary:
        os.environ[HOME] = str(Path(temporary) / "home")  # nothing that an earlier run made is found again
        report = measure(arguments, Path(temporary))
    if arguments.json:
        print(json.dumps(report, indent=1))
        return 0
    print(f"{report['device']}, {report['torch']}: {report['tflops']:.1f} TFLOP/s in {report['compute']}")
    for phase in report["phases"]:
        share = "" if phase["share"] is None else f"{100 * phase['share']:6.1f} %"
        print(f"  {phase['seconds']:9.2f} s {share:>9}  {phase['name']}")
    print(f"  {report['seconds']:9.2f} s            whole; peak of the GPU {report['peak_gpu_gib']:.2f} GiB")
    return 0


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, object]:
    """One run in `folder`, from nothing."""
    settings = settings_for(arguments, folder)
    progress, start = Timed(), time.perf_counter()
    with progress.phase("load and check", 1):
        plan = make_plan(settings)
    rate = flops_per_second(str(plan.source.device), plan.source.compute_dtype)
    with membership(plan, progress) as ledger:
        record = run_comparison(plan, progress, ledger)
    seconds = time.perf_counter() - start
    environment = describe_environment(settings.model.device)
    return {
        "device": environment.device,
        "torch": environment.torch,
        "compute": plan.model.compute_dtype,
        "tflops": rate / 1e12,
        "phases": [
            asdict(Phase(name, taken, _share(plan, name, taken, rate))) for name, taken in progress.seconds.items()
        ],
        "seconds": seconds,
        "peak_gpu_gib": (environment.peak_gpu_bytes or 0) / 2**30,
        "failed": [variant.name for variant in record.variants if variant.status == "failed"],
    }


def settings_for(arguments: argparse.Namespace, folder: Path) -> Settings:
    """What the run is asked for; the model and its texts are made in `folder`."""
    model = save_model(folder / "model", arguments.shape, arguments.context)
    text = "".join(f"Line {i}: the {i * i % 97} birds saw {i * 7 % 31} boats.\n" for i in range(40 * arguments.windows))
    (folder / "corpus.txt").write_text(text, encoding="utf-8")
    (folder / "seen.txt").write_text(text[::-1], encoding="utf-8")
    window = min(1024, arguments.context)
    return Settings(
        model=ModelChoice(str(model), device=arguments.device, compute=arguments.compute),
        recipes=tuple(parse_methods(arguments.methods)),
        variants=(),
        tasks=("kl", "ppl", "mmlu"),
        corpus=CorpusChoice(str(folder / "corpus.txt"), None, window, window // 2, arguments.windows),
        questions=TaskChoice(save_questions(folder / "mmlu", arguments.questions), (), None, 2),
        calibration=CalibrationChoice(str(folder / "seen.txt"), 8, min(512, arguments.context)),
        out=folder / "out",
        threads=arguments.threads,
    )


def save_model(folder: Path, shape: str, context: int) -> Path:
    """A checkpoint in bf16 with random weights, and a tokenizer of bytes."""
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPES[shape], max_position_embeddings=context, bos_token_id=None, eos_token_id=None)
    with torch.device("cuda" if torch.cuda.is_available() and shape != "tiny" else "cpu"):
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    model.cpu().save_pretrained(folder)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return folder


def save_questions(folder: Path, each: int) -> Path:
    """Subjects of MMLU with made-up questions, in its csv layout."""
    names = ("astronomy", "anatomy", "marketing", "virology")[:_SUBJECTS]
    for split, count in (("dev", 5), ("test", each)):
        (folder / split).mkdir(parents=True)
        for name in names:
            rows = [
                f"What is {i} in {name}?,first {i},second {i},third {i},other,{'ABCD'[i % 4]}" for i in range(count)
            ]
            (folder / split / f"{name}_{split}.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return folder


def _share(plan: Plan, name: str, seconds: float, rate: float) -> float | None:
    """The share of `rate` that a scoring phase's matrix products reach."""
    if not name.startswith("score "):
        return None
    if name.endswith("corpus"):
        scored = sum(len(window.kl_positions) for shard in plan.shards for window in shard.windows)
        heads = 1 if name.startswith("score baseline:") else 2
        flops = plan.shape.forward_flops(plan.corpus_tokens, heads * scored)
    else:
        tokens = sum(shared_tokens(part) for suite in plan.suites for part in suite.parts())
        flops = plan.shape.forward_flops(tokens, sum(suite.info.items for suite in plan.suites))
    return flops / seconds / rate


def parse(words: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.2-3b")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compute", choices=("float32", "bfloat16"), help="the checkpoint's bf16 on a GPU by default")
    parser.add_argument("--methods", default="awq,rtn,mixed")
    parser.add_argument("--windows", type=int, default=64, help="windows of 1024 tokens with stride 512")
    parser.add_argument("--questions", type=int, default=20, help=f"in each of {_SUBJECTS} subjects")
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", action="store_true")
    return parser.parse_args(words)


if __name__ == "__main__":
    sys.exit(main())

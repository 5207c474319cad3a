"""Where the time of `qeval compare --methods awq,rtn,mixed` goes on a GPU, phase by phase, without a download.

    python benchmarks/gpu.py --shape llama-3.2-3b --windows 64 --questions 20
    python benchmarks/gpu.py --shape llama-3.1-8b --device-map auto    # one model on all GPUs of the machine

The model has the shape that is named and random weights; text and questions are made up, so every figure but time and
memory means nothing. Beside each phase's seconds stands what share of the machine's own rate its matrix products
reach, the rate being that of a product of 8192 by 8192 in the compute type, timed in this process. Then the same
questions are answered by the baseline's session and by lm-evaluation-harness's `hf` model, subject by subject in turns;
`hf` has a model of its own and the batch size that was its fastest. Prints a table, and JSON with --json.
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
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.mmlu_vs_lm_eval import Side, run_lm_eval, run_qeval
from qeval.backends.base import Session
from qeval.compare.cost import flops_per_second
from qeval.compare.environment import describe_environment
from qeval.compare.plan import Plan, make_plan
from qeval.compare.run import membership, run_comparison
from qeval.compare.settings import CalibrationChoice, CorpusChoice, ModelChoice, Settings
from qeval.compare.task_choice import TaskChoice
from qeval.config import parse_methods
from qeval.errors import is_out_of_memory
from qeval.models.device import release_cached
from qeval.models.info import LoadedModel
from qeval.models.load import load_model
from qeval.models.source import resolve
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
_SUBJECTS = ("astronomy", "anatomy", "marketing", "virology")
_SHOTS = 2


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
    beside = report["questions"]
    print(
        f"{beside['count']} questions: qeval {beside['qeval_per_second']:.2f} a second, lm-eval's hf "
        f"{beside['lm_eval_per_second']:.2f} in batches of {beside['lm_eval_batch']}: {beside['ratio']:.2f} times; "
        f"log-likelihoods differ by {beside['most_nats']:.1e} nats at most"
    )
    return 0


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One run in `folder`, from nothing, then its questions beside lm-eval's `hf` model."""
    settings = settings_for(arguments, folder)
    progress, start = Timed(), time.perf_counter()
    with progress.phase("load and check", 1):
        plan = make_plan(settings)
    rate = flops_per_second(str(plan.source.device), plan.source.compute_dtype)
    with membership(plan, progress) as ledger:
        record = run_comparison(plan, progress, ledger)
    seconds = time.perf_counter() - start
    with plan.backend.open(None) as session:
        beside = beside_lm_eval(plan, session, arguments)
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
        "questions": beside,
    }


def beside_lm_eval(plan: Plan, session: Session, arguments: argparse.Namespace) -> dict[str, float]:
    """Questions a second of the baseline's session, and of lm-eval's `hf` model at its best batch size."""
    choice, asked = plan.settings.model, plan.settings.questions
    theirs = load_model(resolve(choice.name), device=choice.device, dtype=choice.compute)
    told = argparse.Namespace(
        mmlu_dir=asked.mmlu_dir, limit=asked.limit, shots=asked.shots, batch_tokens=plan.batch_tokens
    )
    run_qeval(plan.loaded, _SUBJECTS[0], told, session)  # what is compiled or cached, is so before the clock runs
    batch = best_batch(theirs, told, arguments.lm_eval_most)
    model = hf_model(theirs, batch)

    ours, others = list[Side](), list[Side]()
    for subject in _SUBJECTS:
        ours.append(run_qeval(plan.loaded, subject, told, session))
        others.append(run_lm_eval(theirs, model, subject, told))
    count = sum(len(side.loglikelihoods) for side in ours)
    rates = [count / sum(side.seconds for side in sides) for sides in (ours, others)]
    differences = [abs(a.loglikelihoods - b.loglikelihoods).max() for a, b in zip(ours, others, strict=True)]
    return {
        "count": count,
        "qeval_per_second": rates[0],
        "lm_eval_per_second": rates[1],
        "lm_eval_batch": batch,
        "ratio": rates[0] / rates[1],
        "most_nats": float(max(differences)),
    }


def best_batch(loaded: LoadedModel, told: argparse.Namespace, most: int) -> int:
    """The batch size, a power of two up to `most`, at which lm-eval answers a subject's questions fastest."""
    seconds: dict[int, float] = {}
    run_lm_eval(loaded, hf_model(loaded, 1), _SUBJECTS[0], told)
    for batch in (1 << power for power in range(most.bit_length())):
        try:
            seconds[batch] = run_lm_eval(loaded, hf_model(loaded, batch), _SUBJECTS[0], told).seconds
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            break
    release_cached()
    return min(seconds, key=seconds.__getitem__)


def hf_model(loaded: LoadedModel, batch: int) -> HFLM:
    """lm-eval's own model around one that is loaded."""
    return HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=batch)


def settings_for(arguments: argparse.Namespace, folder: Path) -> Settings:
    """What the run is asked for; the model and its texts are made in `folder`."""
    model = save_model(folder / "model", arguments.shape, arguments.context)
    text = "".join(f"Line {i}: the {i * i % 97} birds saw {i * 7 % 31} boats.\n" for i in range(40 * arguments.windows))
    (folder / "corpus.txt").write_text(text, encoding="utf-8")
    (folder / "seen.txt").write_text(text[::-1], encoding="utf-8")
    window = min(1024, arguments.context)
    return Settings(
        model=ModelChoice(
            str(model), device=arguments.device, compute=arguments.compute, device_map=arguments.device_map
        ),
        recipes=tuple(parse_methods(arguments.methods)),
        variants=(),
        tasks=("kl", "ppl", "mmlu"),
        corpus=CorpusChoice(str(folder / "corpus.txt"), None, window, window // 2, arguments.windows),
        questions=TaskChoice(save_questions(folder / "mmlu", arguments.questions), (), None, _SHOTS),
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
    end = "\u0100"  # the letter of byte 0: lm-eval asks for a token that ends texts
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end).save_pretrained(folder)
    return folder


def save_questions(folder: Path, each: int) -> Path:
    """Subjects of MMLU with made-up questions, in its csv layout."""
    for split, count in (("dev", 5), ("test", each)):
        (folder / split).mkdir(parents=True)
        for name in _SUBJECTS:
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
    parser.add_argument("--device-map", choices=("auto",), help="spread one model over all GPUs (--device cuda)")
    parser.add_argument("--compute", choices=("float32", "bfloat16"), help="the checkpoint's bf16 on a GPU by default")
    parser.add_argument("--methods", default="awq,rtn,mixed")
    parser.add_argument("--windows", type=int, default=64, help="windows of 1024 tokens with stride 512")
    parser.add_argument("--questions", type=int, default=20, help=f"in each of {len(_SUBJECTS)} subjects")
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--lm-eval-most", type=int, default=64, help="the largest batch size tried for lm-eval")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", action="store_true")
    return parser.parse_args(words)


if __name__ == "__main__":
    sys.exit(main())

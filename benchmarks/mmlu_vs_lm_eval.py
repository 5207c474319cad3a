"""qeval's session against lm-evaluation-harness's own `hf` model: the same questions, the same weights, one process.

    python benchmarks/mmlu_vs_lm_eval.py --mmlu-dir FOLDER --subjects anatomy,marketing --limit 20

Both sides start from the harness's task and end with a log-likelihood for every choice: rendering and tokenization
count on both. The sides take turns subject by subject, so that a machine that slows down slows both. The exit code
is 1 when the two disagree: an argmax on more than 0.1 % of the questions, or a log-likelihood by more than 1e-3 nats.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from lm_eval.models.huggingface import HFLM

from qeval.backends.base import Session
from qeval.backends.torch import TorchSession
from qeval.models.info import LoadedModel
from qeval.models.load import load_model
from qeval.models.source import resolve
from qeval.paths import shipped
from qeval.score.choices import score_questions
from qeval.tasks.harness import SAMPLE, load_suite

_TOLERANCE_NATS = 1e-3
_AGREEMENT = 0.999


@dataclass(frozen=True)
class Side:
    """One side's answers on one subject: log-likelihoods [questions, choices] in nats, and the seconds taken."""

    loglikelihoods: np.ndarray
    seconds: float


def run_qeval(loaded: LoadedModel, subject: str, arguments: argparse.Namespace, session: Session | None = None) -> Side:
    """qeval's way: prefixes shared, only scored positions through the head; in a session of its own by default."""
    start = time.perf_counter()
    suite = _suite(loaded, subject, arguments)
    session = session or TorchSession(loaded.model)
    scores = score_questions(session, suite.questions, arguments.batch_tokens, lambda done: None)
    values = np.array([[score for score, _ in found] for found in scores])
    return Side(values, time.perf_counter() - start)


def run_lm_eval(loaded: LoadedModel, model: HFLM, subject: str, arguments: argparse.Namespace) -> Side:
    """lm-eval's way, on its own task with the same rows."""
    task = _suite(loaded, subject, arguments).tasks[subject]
    start = time.perf_counter()
    task.build_all_requests(limit=arguments.limit)
    scores = model.loglikelihood(task.instances, disable_tqdm=True)
    values = np.array([score for score, _ in scores]).reshape(-1, len(task.config.doc_to_choice))
    return Side(values, time.perf_counter() - start)


def _suite(loaded: LoadedModel, subject: str, arguments: argparse.Namespace):  # noqa: ANN202 - a Suite
    return load_suite(
        "mmlu",
        loaded.tokenizer,
        max_length=loaded.info.context_length,
        bos="auto",
        shots=arguments.shots,
        limit=arguments.limit,
        folder=arguments.mmlu_dir,
        subjects=(subject,),
    )


def report(pairs: Sequence[tuple[Side, Side]]) -> bool:
    """Print how the sides compare; whether they agree."""
    ours, theirs = (np.concatenate([pair[side].loglikelihoods for pair in pairs]) for side in (0, 1))
    seconds = [sum(pair[side].seconds for pair in pairs) for side in (0, 1)]
    rates = [len(ours) / value for value in seconds]
    difference = float(np.abs(ours - theirs).max())
    agreement = float((ours.argmax(-1) == theirs.argmax(-1)).mean())
    print(f"questions             {len(ours)}")
    print(f"qeval                 {rates[0]:.3f} questions/s ({seconds[0]:.1f} s)")
    print(f"lm-eval hf            {rates[1]:.3f} questions/s ({seconds[1]:.1f} s)")
    print(f"ratio                 {rates[0] / rates[1]:.2f}")
    print(f"max |d loglikelihood| {difference:.2e} nats")
    print(f"argmax agreement      {agreement:.4%}")
    return difference <= _TOLERANCE_NATS and agreement >= _AGREEMENT


def main() -> int:
    """Run both sides and compare them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="an alias, a hub id, a folder or a GGUF file")
    parser.add_argument("--mmlu-dir", type=Path, help="csv files in MMLU's layout; the shipped sample by default")
    parser.add_argument("--subjects", default="", help="separated by commas; all by default")
    parser.add_argument("--limit", type=int, help="the first so many questions of each subject")
    parser.add_argument("--shots", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="of PyTorch, for both sides")
    parser.add_argument("--batch-tokens", type=int, default=2048, help="qeval's")
    parser.add_argument("--lm-eval-batch", type=int, default=1, help="lm-eval's batch size; 1 is its best on a CPU")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    loaded = load_model(resolve(arguments.model), device=arguments.device)
    model = HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=arguments.lm_eval_batch)
    folder = arguments.mmlu_dir or shipped(SAMPLE)
    found = sorted(path.name.removesuffix("_test.csv") for path in folder.glob("test/*_test.csv"))
    pairs = []
    for subject in arguments.subjects.split(",") if arguments.subjects else found:
        pairs.append((run_qeval(loaded, subject, arguments), run_lm_eval(loaded, model, subject, arguments)))
        ours, theirs = pairs[-1]
        count = len(ours.loglikelihoods)
        print(f"{subject}: {count} questions, qeval {ours.seconds:.1f} s, lm-eval {theirs.seconds:.1f} s", flush=True)
    return 0 if report(pairs) else 1


if __name__ == "__main__":
    sys.exit(main())

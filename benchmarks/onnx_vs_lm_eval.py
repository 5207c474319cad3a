"""qeval on ONNX Runtime against lm-evaluation-harness's own `onnxruntime-genai` model: one folder, the same questions.

    python benchmarks/onnx_vs_lm_eval.py --model demo --subjects anatomy,marketing --questions 20

Both sides read the same ONNX folder, made here or given with --folder, with the same number of threads. Both start
from the harness's task and end with a log-likelihood for every choice: rendering and tokenization count on both,
opening the model on neither. The sides take turns subject by subject, so that a machine that slows down slows both.
The harness's ONNX models never put a BOS token in front, whatever the tokenizer does; so qeval doesn't here either,
and the token ids are the same. The exit code is 1 when the two disagree: another argmax anywhere, or a log-likelihood
that differs by more than 1e-3 nats.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from lm_eval.models.onnxruntime_genai import ONNXRuntimeGenAILM
from transformers import AutoTokenizer

from qeval.backends.onnx.folder import opened
from qeval.backends.onnx.providers import choose_provider
from qeval.backends.onnx.session import OrtSession
from qeval.compare.settings import BackendChoice, CalibrationChoice, ModelChoice
from qeval.config import parse_method
from qeval.jobs.export import export_variant
from qeval.paths import shipped
from qeval.progress import Silent
from qeval.score.choices import score_questions
from qeval.tasks.harness import SAMPLE, Suite, load_suite

_TOLERANCE_NATS = 1e-3
_MMLU = Path(__file__).parents[2] / "shared" / "data" / "mmlu"


@dataclass(frozen=True)
class Side:
    """One side's answers on one subject: log-likelihoods [questions, choices] in nats, and the seconds taken."""

    loglikelihoods: np.ndarray
    seconds: float


class Harness(ONNXRuntimeGenAILM):
    """The harness's model with a given number of threads; without one GenAI takes a thread a core."""

    def __init__(self, folder: Path, threads: int) -> None:
        """`folder` is an export of the model builder's kind."""
        self._threads = threads
        super().__init__(str(folder), execution_provider="cpu")

    def _select_ep(self, config: Any) -> None:
        super()._select_ep(config)
        options = {"intra_op_num_threads": self._threads}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))


def run_qeval(session: OrtSession, tokenizer: Any, subject: str, arguments: argparse.Namespace) -> Side:
    """qeval's way: prefixes shared, only scored positions through the head."""
    start = time.perf_counter()
    suite = suite_of(tokenizer, session.max_length, subject, arguments)
    scores = score_questions(session, suite.questions, arguments.batch_tokens, lambda done: None)
    values = np.array([[score for score, _ in found] for found in scores])
    return Side(values, time.perf_counter() - start)


def run_lm_eval(model: Harness, subject: str, arguments: argparse.Namespace) -> Side:
    """lm-eval's way, on its own task with the same rows."""
    task = suite_of(model.tokenizer, model.max_length, subject, arguments).tasks[subject]
    start = time.perf_counter()
    task.build_all_requests(limit=arguments.questions)
    scores = model.loglikelihood(task.instances, disable_tqdm=True)
    values = np.array([score for score, _ in scores]).reshape(-1, len(task.config.doc_to_choice))
    return Side(values, time.perf_counter() - start)


def suite_of(tokenizer: Any, max_length: int, subject: str, arguments: argparse.Namespace) -> Suite:
    """The first questions of a subject, without BOS."""
    return load_suite(
        "mmlu",
        tokenizer,
        max_length=max_length,
        bos="never",
        shots=arguments.shots,
        limit=arguments.questions,
        folder=mmlu_folder(arguments),
        subjects=(subject,),
    )


def report(pairs: Sequence[tuple[Side, Side]], names: tuple[str, str]) -> bool:
    """Print how the sides compare; whether they agree."""
    ours, theirs = (np.concatenate([pair[side].loglikelihoods for pair in pairs]) for side in (0, 1))
    seconds = [sum(pair[side].seconds for pair in pairs) for side in (0, 1)]
    difference = float(np.abs(ours - theirs).max())
    same = int((ours.argmax(-1) == theirs.argmax(-1)).sum())
    print(f"{'questions':<24}{len(ours)}")
    for name, value in zip(names, seconds, strict=True):
        print(f"{name:<24}{len(ours) / value:.3f} questions/s ({value:.1f} s)")
    print(f"{'ratio':<24}{seconds[1] / seconds[0]:.2f}")
    print(f"{'max |d loglikelihood|':<24}{difference:.2e} nats")
    print(f"{'same argmax':<24}{same} of {len(ours)}")
    return difference <= _TOLERANCE_NATS and same == len(ours)


@contextmanager
def exported(arguments: argparse.Namespace) -> Iterator[Path]:
    """The folder that was given, or one exported for as long as the block lasts."""
    if arguments.folder:
        yield arguments.folder
        return
    recipe = None if arguments.method == "float" else parse_method(arguments.method)
    with TemporaryDirectory() as temporary:
        out = Path(temporary) / "model"
        model, choice = ModelChoice(arguments.model), BackendChoice(("ort",))
        calibration = CalibrationChoice()
        export_variant(model, recipe, calibration, choice, out, threads=arguments.threads, seed=0, progress=Silent())
        yield out


def mmlu_folder(arguments: argparse.Namespace) -> Path:
    """MMLU's csv files: those given, those beside the project, or the shipped sample."""
    return arguments.mmlu_dir or (_MMLU if _MMLU.is_dir() else shipped(SAMPLE))


def subjects_of(arguments: argparse.Namespace) -> list[str]:
    """The subjects asked for, or all that are there."""
    if arguments.subjects:
        return arguments.subjects.split(",")
    return sorted(path.name.removesuffix("_test.csv") for path in mmlu_folder(arguments).glob("test/*_test.csv"))


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """The flags of a benchmark of MMLU on an exported folder."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="an alias, a hub id, a folder or a GGUF file")
    parser.add_argument("--method", default="rtn", help="what the weights are quantized by, or `float`")
    parser.add_argument("--folder", type=Path, help="a folder that `qeval export` or the model builder made, instead")
    parser.add_argument("--mmlu-dir", type=Path, help="csv files in MMLU's layout; those beside the project by default")
    parser.add_argument("--subjects", default="", help="separated by commas; all by default")
    parser.add_argument("--questions", type=int, help="the first so many questions of each subject")
    parser.add_argument("--shots", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of both sides")
    parser.add_argument("--batch-tokens", type=int, default=2048, help="qeval's")
    return parser


def main() -> int:
    """Run both sides and compare them."""
    arguments = parser_of(__doc__).parse_args()
    torch.set_num_threads(arguments.threads)
    pairs = []
    with exported(arguments) as folder, opened(folder, choose_provider("cpu"), threads=arguments.threads) as found:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model = Harness(folder, arguments.threads)
        if tokenizer("A").input_ids != tokenizer("A", add_special_tokens=False).input_ids:
            print("This model's tokenizer adds special tokens; lm-eval leaves them out, and so both sides do here.")
        for subject in subjects_of(arguments):
            ours = run_qeval(found.session, tokenizer, subject, arguments)
            pairs.append((ours, run_lm_eval(model, subject, arguments)))
            seconds = [side.seconds for side in pairs[-1]]
            count = len(ours.loglikelihoods)
            print(f"{subject}: {count} questions, qeval {seconds[0]:.1f} s, lm-eval {seconds[1]:.1f} s", flush=True)
    return 0 if report(pairs, ("qeval", "lm-eval genai")) else 1


if __name__ == "__main__":
    sys.exit(main())

"""MMLU on one ONNX Runtime session, twice: with the prefixes of a subject shared, and one full prompt a question.

    python benchmarks/onnx_prefix.py --model demo --subjects anatomy,marketing --questions 50

Both ways score the four letters of a question in one forward, only the scored positions through the head; the one
difference is that the shared way runs a subject's examples once. They take turns subject by subject on the same
questions, tokenized beforehand. The exit code is 1 when the two disagree: another argmax anywhere, or a
log-likelihood that differs by more than 1e-3 nats.
"""

import sys
import time
from collections.abc import Sequence

import numpy as np
import torch
from onnx_vs_lm_eval import Side, exported, parser_of, report, subjects_of, suite_of
from transformers import AutoTokenizer

from qeval.backends.onnx.folder import opened
from qeval.backends.onnx.providers import choose_provider
from qeval.backends.onnx.session import OrtSession
from qeval.score.choices import score_questions
from qeval.tasks.harness import Question


def score(session: OrtSession, parts: Sequence[Sequence[Question]], batch_tokens: int) -> Side:
    """The answers when the questions of each part are scored together, and of different parts not."""
    start = time.perf_counter()
    found = [scores for part in parts for scores in score_questions(session, part, batch_tokens, lambda done: None)]
    values = np.array([[value for value, _ in scores] for scores in found])
    return Side(values, time.perf_counter() - start)


def main() -> int:
    """Run both ways and compare them."""
    arguments = parser_of(__doc__).parse_args()
    torch.set_num_threads(arguments.threads)
    pairs = []
    with exported(arguments) as folder, opened(folder, choose_provider("cpu"), threads=arguments.threads) as found:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        session = found.session
        for subject in subjects_of(arguments):
            questions = suite_of(tokenizer, session.max_length, subject, arguments).questions
            shared = score(session, [questions], arguments.batch_tokens)
            whole = score(session, [[question] for question in questions], arguments.batch_tokens)
            pairs.append((shared, whole))
            times = f"shared {shared.seconds:.1f} s, whole {whole.seconds:.1f} s"
            print(f"{subject}: {len(questions)} questions, {times}", flush=True)
    return 0 if report(pairs, ("prefixes shared", "one prompt a question")) else 1


if __name__ == "__main__":
    sys.exit(main())

"""Time `qeval import` and `qeval gate` on lm-eval's samples of all of MMLU: 14,042 questions of each model.

The samples are made here, in lm-eval's form and of its size (every prompt four times, about 11 KB a question). Both
commands run as processes of their own, so that the time of starting Python counts.

    python -m benchmarks.import_mmlu --variants 6
"""

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

QUESTIONS = 14_042
SUBJECTS = 57
PROMPT_LETTERS = 2_600
DATE = "2026-01-02T03-04-05.000000"
POLICY = """name: mmlu
rules:
  - {metric: mmlu_acc_drop, at_most: 2.0 points}
  - {metric: mmlu_flips, at_most: 30 %}
"""


def write_samples(folder: Path, noise: float, seed: int) -> None:
    """Write one model's samples, a file a subject, and the record of its groups beside them."""
    folder.mkdir(parents=True)
    names = [f"mmlu_subject_{number:02d}" for number in range(SUBJECTS)]
    shared, own = np.random.default_rng(1), np.random.default_rng(seed)
    gold = shared.integers(0, 4, QUESTIONS)
    scores = shared.normal(-2, 1, (QUESTIONS, 4))
    scores[np.arange(QUESTIONS), gold] += 1.2
    scores += noise * own.normal(size=scores.shape)
    for place, name in enumerate(names):
        rows = range(place, QUESTIONS, SUBJECTS)
        lines = [json.dumps(_sample(number, row, int(gold[row]), scores[row])) for number, row in enumerate(rows)]
        (folder / f"samples_{name}_{DATE}.jsonl").write_text("\n".join(lines) + "\n")
    record = {"group_subtasks": {"mmlu": names}, "higher_is_better": {name: {"acc": True} for name in names}}
    (folder / f"results_{DATE}.json").write_text(json.dumps(record))


def _sample(number: int, row: int, gold: int, scores: np.ndarray) -> dict[str, object]:
    prompt = (f"Question {row} of a made-up test, with five examples before it.\n" * 50)[:PROMPT_LETTERS]
    pairs = [[str(float(score)), "False"] for score in scores]
    return {
        "doc_id": number, "doc": {"question": prompt[:300], "choices": list("abcd"), "answer": gold},
        "target": str(gold),
        "arguments": {f"gen_args_{i}": {"arg_0": prompt, "arg_1": f" {letter}"} for i, letter in enumerate("ABCD")},
        "resps": [[pair] for pair in pairs], "filtered_resps": pairs, "filter": "none", "metrics": ["acc"],
        "doc_hash": hashlib.sha256(f"doc {row}".encode()).hexdigest(),
        "prompt_hash": hashlib.sha256(prompt.encode()).hexdigest(),
        "target_hash": hashlib.sha256(str(gold).encode()).hexdigest(),
        "acc": float(scores.argmax() == gold),
    }  # fmt: skip


def main() -> None:
    """Print the seconds of both commands, and whether torch was loaded."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--variants", type=int, default=6)
    parser.add_argument("--folder", type=Path, help="where the samples are kept; else a temporary folder")
    choice = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = choice.folder or Path(temporary)
        names = ["baseline", *(f"variant{number}" for number in range(1, choice.variants + 1))]
        for place, name in enumerate(names):
            if not (folder / name).exists():
                write_samples(folder / name, 0.1 * place, place)
        size = sum(path.stat().st_size for path in folder.glob("*/*.jsonl"))
        (folder / "policy.yaml").write_text(POLICY)
        print(f"{size / 1e6:.0f} MB of samples")
        out = Path(temporary) / "run"
        _timed(["import", *(f"{name}={folder / name}" for name in names), "--out", str(out), "--quiet"])
        _timed(["gate", str(out), "--policy", str(folder / "policy.yaml"), "--quiet"])


def _timed(words: list[str]) -> None:
    code = "import sys; from qeval.cli.app import run_program; run_program(sys.argv[1:]); print('torch' in sys.modules)"
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code, *words], check=True, capture_output=True, text=True)
    print(f"qeval {words[0]}: {time.perf_counter() - began:.2f} s, torch loaded: {done.stdout.split()[-1]}")


if __name__ == "__main__":
    main()

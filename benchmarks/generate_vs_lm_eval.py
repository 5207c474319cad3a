"""qeval's greedy answers against lm-evaluation-harness's own `hf` model: one task, one model, one process.

    python benchmarks/generate_vs_lm_eval.py --limit 24
    python benchmarks/generate_vs_lm_eval.py --model ./my-model --task gsm8k_cot --limit 100 --batch-sizes 1,16

Without --task, questions in GSM8K's form are made, with four examples that all prompts share; the task is written for
this project. Both sides start from the harness's requests and end with texts: encoding counts on both. Prints items a
second of each side and how many texts are equal. The exit code is 1 when fewer than 95 % of lm-eval's texts at batch
size 1 are qeval's: in half precision, or where two tokens tie, a batch may round otherwise.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from lm_eval.models.huggingface import HFLM

from qeval.backends.torch import TorchSession
from qeval.models.load import load_model
from qeval.models.source import resolve
from qeval.models.vocabulary import end_tokens
from qeval.score.lm import QevalLM
from qeval.tasks.harness_tasks import load_harness_tasks

_EQUAL = 0.95
_NAMES = ("Ann", "Ben", "Eve", "Max", "Ida", "Tom")
_THINGS = ("pens", "figs", "cups", "maps", "kites", "shells")


@dataclass(frozen=True)
class Side:
    """One side's texts, and the seconds that they took."""

    name: str
    texts: list[str]
    seconds: float


def sums(count: int, start: int) -> list[dict[str, str]]:
    """Return word problems with worked answers, no two alike."""
    rows = []
    for i in range(start, start + count):
        a, b, c = 3 + i % 17, 2 + i * 7 % 23, 1 + i * 5 % 9
        name, thing = _NAMES[i % 6], _THINGS[i * 5 % 6]
        question = f"{name} has {a} {thing} and buys {b} boxes with {c} {thing} each. How many {thing} has {name} now?"
        answer = f"The boxes hold {b} * {c} = {b * c} {thing}. {a} + {b * c} = {a + b * c}.\n#### {a + b * c}"
        rows.append({"question": question, "answer": answer})
    return rows


def write_task(folder: Path, count: int, shots: int) -> Path:
    """Write the task and its data; return the YAML file."""
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sums(count, shots)), encoding="utf-8")
    config = {
        "task": "sums_in_gsm8k_form",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "sums.jsonl")}, "cache_dir": str(folder / "cache")},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_target": "{{answer}}",
        "num_fewshot": shots,
        "fewshot_config": {"sampler": "first_n", "samples": sums(shots, 0)},
        "generation_kwargs": {"until": ["Question:", "\n\n"], "do_sample": False, "max_gen_toks": 128},
        "metric_list": [{"metric": "exact_match"}],
    }
    path = folder / "sums.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


def requests_of(task: str, limit: int) -> list[Any]:
    """Return the harness's requests of a task."""
    requests = []
    for each in load_harness_tasks(task).values():
        each.build_all_requests(limit=limit)
        requests += each.instances
    return requests


def run(name: str, lm: Any, requests: Sequence[Any]) -> Side:
    """Return one side's texts and time."""
    start = time.perf_counter()
    texts = lm.generate_until(list(requests), disable_tqdm=True)
    return Side(name, texts, time.perf_counter() - start)


def report(ours: Side, others: Sequence[Side]) -> bool:
    """Print how the sides compare; return whether the texts agree."""
    agrees = True
    count = len(ours.texts)
    print(f"{ours.name}: {count} items in {ours.seconds:.1f} s, {count / ours.seconds:.3f} items/s")
    for side in others:
        equal = sum(a == b for a, b in zip(ours.texts, side.texts, strict=True))
        agrees = agrees and (side is not others[0] or equal >= _EQUAL * count)
        print(
            f"{side.name}: {count} items in {side.seconds:.1f} s, {count / side.seconds:.3f} items/s; qeval is "
            f"{side.seconds / ours.seconds:.2f} times as fast, {equal} of {count} texts are equal"
        )
    return agrees


def main() -> int:
    """Run both sides."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--task")
    parser.add_argument("--limit", type=int, default=24)
    parser.add_argument("--shots", type=int, default=4)
    parser.add_argument("--batch-sizes", default="1,8")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    loaded = load_model(resolve(arguments.model), device=arguments.device)
    session = TorchSession(loaded.model)
    ends = end_tokens(loaded.model, loaded.tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        task = arguments.task or str(write_task(Path(folder), arguments.limit, arguments.shots))
        requests = requests_of(task, arguments.limit)
        ours = run("qeval", QevalLM(session, loaded.tokenizer, stops=ends), requests)
        others = []
        for size in map(int, arguments.batch_sizes.split(",")):
            lm = HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=size)
            others.append(run(f"lm-eval hf, batch {size}", lm, requests))
    return 0 if report(ours, others) else 1


if __name__ == "__main__":
    sys.exit(main())

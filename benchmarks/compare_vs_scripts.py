"""One `qeval compare` with six variants against lm-eval once a variant and a script that stores logits.

    python benchmarks/compare_vs_scripts.py --mmlu-dir FOLDER --subjects anatomy --limit 10 --windows 2

Both sides do KL, perplexity and MMLU for the baseline and the same six variants (INT4 and INT8 by rounding to
nearest), each in one child process with the same threads. The straightforward side runs the harness's `hf` model for
the questions of each variant, keeps the baseline's logits as fp32 and compares each variant's with them; it is given
the dequantized weights for nothing (their making counts on qeval's side alone). Prints seconds, peak memory and the
ratios. The exit code is 1 when perplexities differ by more than 0.1 %, or KL by more than 1 %.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM

from qeval.backends.install import installed
from qeval.cli.app import run_program
from qeval.models.load import load_model
from qeval.models.source import resolve
from qeval.paths import home, shipped
from qeval.store.variants import load_variant, read_manifest
from qeval.tasks.corpus import bos_token, encode, load_corpus
from qeval.tasks.harness import SAMPLE, load_suite
from qeval.tasks.protocols import choose_protocol

METHODS = "rtn,rtn:g32,rtn:int4-g64,rtn:int4-channel,rtn:int8-channel,rtn:int8-g128"


def qeval_side(arguments: argparse.Namespace) -> dict[str, Any]:
    """`qeval compare`, and what its report says."""
    out = arguments.folder / "out"
    flags = ["--model", arguments.model, "--methods", METHODS, "--tasks", "kl,ppl,mmlu", "--protocol", "pydoc-1024"]
    flags += ["--max-windows", str(arguments.windows), "--limit", str(arguments.limit), "--out", str(out), "--quiet"]
    flags += ["--mmlu-dir", str(arguments.mmlu_dir), "--threads", str(arguments.threads), "--device", "cpu"]
    flags += ["--subjects", arguments.subjects] if arguments.subjects else []
    start = time.perf_counter()
    if code := run_program(["compare", *flags]):
        raise SystemExit(code)
    seconds = time.perf_counter() - start
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    found = {v["name"]: v["metrics"] for v in report["variants"]}
    values = {n: {m: found[n][m]["value"] for m in ("kl_nats", "ppl")} for n in METHODS.split(",")}
    return {"seconds": seconds, "values": values}


def script_side(arguments: argparse.Namespace) -> dict[str, Any]:
    """The harness once a model, and logits kept from one model to the next."""
    torch.set_num_threads(arguments.threads)
    start = time.perf_counter()
    loaded = load_model(resolve(arguments.model))
    ids, bos = encode(loaded.tokenizer, load_corpus("pydoc").text), bos_token(loaded.tokenizer, "auto")
    made = choose_protocol(name="pydoc-1024").windows(ids, bos=bos, max_windows=arguments.windows)
    windows = [torch.tensor([window.tokens]) for window in made.windows]
    reference = HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=1)
    base = _logits(loaded.model, windows)
    _questions(loaded, reference, arguments)
    folders = {read_manifest(p.parent).weights_sha256: p.parent for p in home().glob("variants/*/manifest.json")}
    values = {}
    for folder in folders.values():
        variant = load_variant(folder)
        with installed(loaded.model, variant, skip="lm_head.weight", keep_dtype=torch.float16):
            logits = _logits(loaded.model, windows)
            values[variant.key] = _compared(base, logits, windows)
            del logits
            _questions(loaded, reference, arguments)
    return {"seconds": time.perf_counter() - start, "values": values}


@torch.inference_mode()
def _logits(model: Any, windows: list[torch.Tensor]) -> list[torch.Tensor]:
    return [model(window).logits[0] for window in windows]


def _compared(base: list[torch.Tensor], logits: list[torch.Tensor], windows: list[torch.Tensor]) -> dict[str, float]:
    kls, nlls = [], []
    for p, q, window in zip(base, logits, windows, strict=True):
        log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
        kls.append((log_p.exp() * (log_p - log_q)).sum(-1))
        nlls.append(-log_q[:-1].gather(1, window[0, 1:, None]))
    return {"kl_nats": float(torch.cat(kls).mean()), "ppl": float(torch.cat(nlls).mean().exp())}


def _questions(loaded: Any, model: HFLM, arguments: argparse.Namespace) -> None:
    subjects = tuple(filter(None, arguments.subjects.split(",")))
    suite = load_suite(
        "mmlu", loaded.tokenizer, max_length=loaded.info.context_length, bos="auto", shots=5,
        limit=arguments.limit, folder=arguments.mmlu_dir, subjects=subjects,
    )  # fmt: skip
    for task in suite.tasks.values():
        task.build_all_requests(limit=arguments.limit)
        model.loglikelihood(task.instances, disable_tqdm=True)


def _child(arguments: argparse.Namespace, side: str, folder: Path) -> dict[str, Any]:
    command = [sys.executable, __file__, "--side", side, "--folder", str(folder), "--model", arguments.model]
    command += ["--subjects", arguments.subjects, "--limit", str(arguments.limit), "--windows", str(arguments.windows)]
    command += ["--threads", str(arguments.threads), "--mmlu-dir", str(arguments.mmlu_dir)]
    environment = os.environ | {"QEVAL_HOME": str(folder / "home")}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    took = f"{found['seconds']:8.1f} s ({found['cpu_seconds']:.1f} s of CPU)"
    print(f"{side:8s} {took}, peak memory {found['peak_bytes'] / 2**30:.2f} GiB", flush=True)
    return found


def _agree(ours: dict[str, Any], theirs: dict[str, Any], folder: Path) -> bool:
    """Whether the two sides say the same of every variant, found by its name in the run's record."""
    record = json.loads((folder / "out" / "run.json").read_text(encoding="utf-8"))
    keys = {variant["name"]: variant["key"] for variant in record["variants"]}
    same = True
    for name, own in ours["values"].items():
        other = theirs["values"][keys[name]]
        differences = {metric: abs(own[metric] / other[metric] - 1) for metric in own}
        same &= differences["ppl"] <= 1e-3 and differences["kl_nats"] <= 1e-2
        print(f"  {name:18s} KL {own['kl_nats']:.6f} / {other['kl_nats']:.6f}, perplexity {own['ppl']:.4f} / "
              f"{other['ppl']:.4f}")  # fmt: skip
    return same


def main() -> int:
    """Run both sides in children, qeval's first, since the other takes its variants."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--mmlu-dir", type=Path, default=shipped(SAMPLE))
    parser.add_argument("--subjects", default="", help="separated by commas; all by default")
    parser.add_argument("--limit", type=int, default=5, help="questions a subject")
    parser.add_argument("--windows", type=int, default=2, help="of 1024 tokens")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--side", choices=("qeval", "scripts"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        found = (qeval_side if arguments.side == "qeval" else script_side)(arguments)
        used = resource.getrusage(resource.RUSAGE_SELF)
        found |= {"peak_bytes": used.ru_maxrss * 1024, "cpu_seconds": used.ru_utime + used.ru_stime}
        print(json.dumps(found))
        return 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if (home() / "models").is_dir():  # the converted demo model is no part of either side's work
            (folder / "home").mkdir()
            (folder / "home" / "models").symlink_to((home() / "models").resolve())
        ours, theirs = _child(arguments, "qeval", folder), _child(arguments, "scripts", folder)
        same = _agree(ours, theirs, folder)
    print(f"ratio    {theirs['seconds'] / ours['seconds']:.2f} times faster, "
          f"{theirs['peak_bytes'] / ours['peak_bytes']:.2f} times less memory")  # fmt: skip
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())

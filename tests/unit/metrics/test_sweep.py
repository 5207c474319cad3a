"""The sweep against a computation in fp64, and its kernel against torch's operators."""

import math
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

from qeval.metrics.sweep import COLUMNS, Swept, kl_of_rows, numbers, sweep_logits
from qeval.metrics.tokens import distance, model_numbers
from tests.fixtures.pretend_gpu import pretend_gpu

KERNEL = """
import torch
from triton.runtime import interpreter
from qeval.metrics import sweep_kernel
from qeval.metrics.sweep import plain_sweep
from tests.unit.metrics.test_sweep import logits

# what the interpreter reads: four bytes wherever a load's mask lets it
builder = interpreter.InterpreterBuilder
bytes_read, masked_load = [0], builder.create_masked_load
def count(self, pointers, mask, *rest):
    bytes_read[0] += 4 * int(mask.data.sum())
    return masked_load(self, pointers, mask, *rest)
builder.create_masked_load = count

for vocabulary in (1, 7, 4096, 4097, 9000):
    base, other, targets = logits(vocabulary)
    bytes_read[0] = 0
    swept = sweep_kernel.kernel_sweep(base, other, targets)
    targets_read = len(base) * 4 * 4  # of each position its target (int64) and at most two logits
    assert 16 * base.numel() <= bytes_read[0] <= 16 * base.numel() + targets_read
    wanted = torch.stack(plain_sweep(base, other, targets))
    torch.testing.assert_close(swept, wanted, rtol=1e-5, atol=1e-5, equal_nan=True)
    assert torch.equal(swept[3], wanted[3])
    strided = torch.stack([base, other], 1)
    apart = sweep_kernel.kernel_sweep(strided[:, 0], strided[:, 1], targets)
    assert torch.equal(apart.nan_to_num(), swept.nan_to_num())
assert sweep_kernel.kernel_sweep(base[:0], other[:0], targets[:0]).shape == (8, 0)
print("equal")
"""


def logits(vocabulary, rows=6):
    random = torch.Generator().manual_seed(vocabulary)
    base = torch.randn(rows, vocabulary, generator=random) * 4
    other = base + torch.randn(rows, vocabulary, generator=random) * 0.3
    return base, other, torch.tensor([0, -1, vocabulary - 1, 0, -1, vocabulary // 2])


def by_hand(base, other, target):
    """The eight numbers of one position by Python's own floats."""

    def log_probabilities(row):
        top = max(row)
        log_sum = top + math.log(math.fsum(math.exp(x - top) for x in row))
        return [x - log_sum for x in row]

    p, q = log_probabilities(base.tolist()), log_probabilities(other.tolist())
    kl = math.fsum(math.exp(a) * (a - b) for a, b in zip(p, q, strict=True))
    reverse = math.fsum(math.exp(b) * (b - a) for a, b in zip(p, q, strict=True))
    absolute = math.fsum(math.exp(a) * abs(a - b) for a, b in zip(p, q, strict=True))
    same = float(p.index(max(p)) == q.index(max(q)))
    entropy = -math.fsum(math.exp(b) * b for b in q)
    chosen = (math.nan, math.nan) if target < 0 else (p[target], q[target])
    overlap = math.fsum(min(math.exp(a), math.exp(b)) for a, b in zip(p, q, strict=True))
    return [kl, reverse, absolute, same, *chosen, entropy, overlap]


def test_every_column_is_what_its_name_says():
    base, other, targets = logits(300)
    wanted = [by_hand(*row) for row in zip(base, other, targets.tolist(), strict=True)]
    swept = sweep_logits(base, other, targets)
    assert swept.shape == (COLUMNS, 6)
    torch.testing.assert_close(swept.T, torch.tensor(wanted, dtype=torch.float64), rtol=1e-5, atol=1e-5, equal_nan=True)
    torch.testing.assert_close(kl_of_rows(base, other), Swept(*swept).kl_nats, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(numbers(other, targets), swept[5:7], rtol=0, atol=0, equal_nan=True)
    assert 0 < Swept(*swept).top1_agreement.mean() <= 1


def test_overlap_is_what_a_speculative_sampler_accepts():
    """A draft of the variant's is kept with probability min(1, p / q): Leviathan et al., arXiv 2211.17192."""
    base, other, targets = logits(40)
    overlap = Swept(*sweep_logits(base, other, targets)).overlap
    draws, random = 200_000, torch.Generator().manual_seed(1)
    p, q = base.double().softmax(-1), other.double().softmax(-1)
    drafted = torch.multinomial(q, draws, replacement=True, generator=random)
    ratio = p.gather(-1, drafted) / q.gather(-1, drafted)
    accepted = (torch.rand(ratio.shape, generator=random, dtype=torch.float64) < ratio).double().mean(-1)
    error = (overlap * (1 - overlap) / draws).sqrt()
    assert ((accepted - overlap).abs() < 4 * error).all()
    assert float(overlap.min()) < 0.95
    assert torch.equal(
        Swept(*sweep_logits(base, base.clone(), targets)).overlap.round(decimals=6), torch.ones(6).double()
    )


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton, which comes with torch for CUDA, is not installed")
def test_the_kernel_is_torchs_operators_in_tritons_interpreter():
    """The kernel runs on the CPU, program by program, and reads every logit twice: 16 bytes a logit of the pair.

    What a GPU's compiler makes of it is proven when a model loads.
    """
    told = subprocess.run(
        [sys.executable, "-c", KERNEL],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert told.stdout.strip() == "equal", told.stderr


class TestOnAGpu:
    """Counted on the pretended GPU, which has no Triton: torch's operators take the kernel's place."""

    def test_the_host_reads_the_columns_once(self):
        weight = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
        states = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
        targets = torch.arange(64) % 50
        cpu = distance(lambda x: x @ weight.T, states, lambda x: x @ weight.T * 1.1, states, targets, 4)
        with pretend_gpu() as log:
            on_gpu, states_on_gpu = weight.to("cuda:0"), states.to("cuda:0")

            def base(x):
                return x.to("cuda:0") @ on_gpu.T

            log.reads.clear()
            log.copies.clear()
            gpu = distance(base, states, lambda x: base(x) * 1.1, states_on_gpu, targets, 4)
            assert sum(log.reads.values()) == 1
            assert sum(count for (_, way), count in log.copies.items() if way == "H2D") <= 4  # columns, targets, states
            assert model_numbers(base, states_on_gpu, targets, 4).log_p.device.type == "cpu"
        for name in ("kl_nats", "reverse_kl_nats", "kl_abs_modelopt", "top1_agreement", "base_log_p"):
            torch.testing.assert_close(getattr(gpu, name), getattr(cpu, name), rtol=1e-12, atol=0)

"""What a GPU would be asked to do, counted on the pretended one: launches and waits of the host, by work."""

import numpy as np
import pytest
import torch

from qeval.backends.torch import TorchSession
from qeval.models.load import load_model
from qeval.models.source import resolve
from qeval.quant.awq import choose_clip, choose_scales
from qeval.quant.gptq import factorize
from qeval.quant.gptq import quantize_gptq as quantize_in_order
from qeval.quant.grid import parse
from qeval.quant.pack import pack_tensor, unpack_tensor
from qeval.quant.rtn import quantize_rtn
from qeval.quant.statistics import InputStatistics
from qeval.score.schedule import schedule
from qeval.types import Request
from tests.fixtures.pretend_gpu import pretend_gpu
from tests.fixtures.tiny import save_tiny

SHRINK = 8
LLAMA_3B_LAYER = {"qkv": ([3072, 1024, 1024], 3072), "o": ([3072], 3072), "gate/up": ([8192, 8192], 3072),
                  "down": ([3072], 8192)}  # fmt: skip
"""Rows of the matrices that share an input, and its width, of Llama-3.2-3B."""
LAYERS = 28


MMLU = [100, 135, 152, 100, 265, 144, 100, 100, 100, 173, 102, 100, 235, 114, 145, 378, 126, 100, 310, 203, 100, 165,
        198, 193, 390, 270, 238, 151, 545, 216, 204, 237, 223, 131, 121, 108, 163, 112, 103, 234, 100, 783, 346, 895,
        306, 311, 324, 282, 1534, 272, 612, 110, 245, 201, 100, 166, 171]  # fmt: skip
"""Questions of each of MMLU's 57 subjects (Hendrycks et al., arXiv 2009.03300), in the order of their names."""


def mmlu_lengths(questions, seed):
    """Tokens of a subject's questions after its five examples: 106 in the mean of all, most short, a few of 500."""
    lengths = np.random.default_rng(seed).lognormal(np.log(84), 0.7, questions)
    return [int(length) for length in lengths.clip(20, 600)]


def test_mmlu_takes_at_most_140_forward_passes_on_a_gpu():
    requests = []
    for subject, questions in enumerate(MMLU):
        examples = tuple(1000 * subject + place for place in range(12))
        for number, length in enumerate(mmlu_lengths(questions, subject)):
            own = (10**6 + len(requests), *range(number, number + length - 1))
            requests.append(Request((*examples, *own), (len(examples) + length - 1,)))
    assert len(requests) == 14_042
    batches = schedule(requests, 32_768, packs=True)
    tokens = sum(len(request.tokens) for batch in batches for request in batch.call.requests)
    assert 1_400_000 < tokens < 1_600_000
    assert len(batches) <= 140
    assert len({batch.call.path for batch in batches}) == len(MMLU)  # and as many short passes over the examples


def test_windows_cost_one_read_a_forward_pass_and_no_copy_to_the_host(tmp_path):
    """The read is transformers' own, which looks whether a batch is packed; final states stay where they are."""
    save_tiny(tmp_path / "m", max_position_embeddings=128)
    windows = [Request(tuple(range(3 + row, 67 + row)), tuple(range(64))) for row in range(4)]
    with pretend_gpu() as log:
        session = TorchSession(load_model(resolve(str(tmp_path / "m")), device="cuda:0").model)
        log.reads.clear()
        log.moved.clear()
        session.states(windows)
        assert sum(log.reads.values()) <= 1
        assert log.bytes_to_host() == 0


@pytest.fixture
def small_pieces(monkeypatch):
    """Matrices are an eighth as wide and as high here, and pieces a 64th as large: as many pieces as at full size."""
    monkeypatch.setattr("qeval.arithmetic.GPU_NUMBERS", (1 << 26) // SHRINK**2)


def on_gpu(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to("cuda:0")


def test_launches_of_awq_and_rounding_on_llama_3b(small_pieces):
    grid = parse("int4-g16")  # blocks of 128 at full size
    with pretend_gpu() as log:
        for rows, columns in LLAMA_3B_LAYER.values():
            weights = [on_gpu(each // SHRINK, columns // SHRINK) for each in rows]
            inputs = InputStatistics(64, on_gpu(columns // SHRINK).abs(), on_gpu(64, columns // SHRINK))
            choice = choose_scales(weights, [grid] * len(weights), inputs)
            for weight in weights:
                clip = choose_clip(weight * choice.scales, grid, inputs.sketch)
                quantize_rtn(weight * choice.scales, grid, clip)
        assert sum(log.launches.values()) * LAYERS < 150_000
        assert sum(log.reads.values()) * LAYERS < 2_000


def test_gptq_reads_once_a_matrix_not_a_block(small_pieces):
    with pretend_gpu() as log:
        inputs = on_gpu(512, 256)
        factor = factorize(inputs.T @ inputs, damping=0.01, act_order=True)
        before = sum(log.reads.values())
        quantize_in_order(on_gpu(64, 256), parse("int4-g32"), factor)
        assert sum(log.reads.values()) - before <= 4


def test_the_same_choices_as_on_the_cpu(small_pieces):
    grid = parse("int4-g16")
    weight = torch.randn(96, 64, generator=torch.Generator().manual_seed(1))
    sketch = torch.randn(32, 64, generator=torch.Generator().manual_seed(2))
    magnitude = sketch.abs().mean(0)
    cpu = choose_scales([weight], [grid], InputStatistics(32, magnitude, sketch))
    clip = choose_clip(weight, grid, sketch)
    with pretend_gpu():
        inputs = InputStatistics(32, magnitude.to("cuda:0"), sketch.to("cuda:0"))
        gpu = choose_scales([weight.to("cuda:0")], [grid], inputs)
        assert (gpu.alpha, gpu.loss) == (cpu.alpha, pytest.approx(cpu.loss, rel=1e-6))
        assert torch.equal(choose_clip(weight.to("cuda:0"), grid, inputs.sketch).cpu(), clip)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("columns", [1, 7, 32, 45])
def test_codes_are_packed_on_the_device_as_on_the_cpu(bits, columns):
    codes = torch.randint(2**bits, (5, columns), dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))
    packed = pack_tensor(codes, bits)
    assert torch.equal(unpack_tensor(packed, bits, columns), codes)
    with pretend_gpu() as log:
        on_device = pack_tensor(codes.to("cuda:0"), bits)
        assert torch.equal(on_device.cpu(), packed)
        log.reads.clear()
        back = unpack_tensor(on_device, bits, columns)
        assert not log.reads
        assert torch.equal(back.cpu(), codes)

"""GGUF files that qeval writes: the variant's codes in ggml's blocks, Llama's rows and rotary factors, refusals."""

import gguf
import numpy as np
import pytest
import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from qeval.backends.llamacpp.gguf_writer import to_gguf, write_gguf
from qeval.backends.llamacpp.library import describe_weights
from qeval.backends.torch import TorchSession
from qeval.bench.engines import gguf_file
from qeval.bench.engines.base import greedy
from qeval.bench.engines.engine_spec import EngineSpec
from qeval.bench.engines.llamacpp import LlamaCppEngine
from qeval.errors import UsageError
from qeval.models.load import load_model
from qeval.models.source import resolve
from qeval.quant.grid import parse
from qeval.quant.rtn import quantize_rtn
from qeval.quant.variant import Variant
from tests.fixtures.engines import prompts, slow_greedy, slow_logits
from tests.fixtures.engines_llamacpp import float_file, tiny
from tests.fixtures.families import tiny_family
from tests.fixtures.tiny import save_tiny, tiny_llama, tiny_tokenizer

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10_000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip


def weight_of(grid, rows=6, columns=96):
    generator = torch.Generator().manual_seed(0)
    return quantize_rtn(torch.randn(rows, columns, generator=generator), parse(grid))


def in_fp16(weight, kind):
    """The matrix with its scales (and Q4_1's offsets) in fp16, by its definition, weight by weight."""
    rows, columns = weight.codes.shape
    size = min(weight.grid.block_size(columns), columns)
    held = torch.full_like(weight.scales, weight.grid.zero) if weight.zeros is None else weight.zeros.float()
    scales, zeros = (
        part.expand(rows, -1).repeat_interleave(size, dim=1)[:, :columns] for part in (weight.scales, held)
    )
    if kind in ("Q4_1", "Q5_1"):
        return weight.codes * scales.half().float() + (-scales * zeros).half().float()
    return (weight.codes - zeros) * scales.half().float()


@pytest.mark.parametrize(
    ("grid", "kind"),
    [
        ("int4-g32", "Q4_0"), ("int4-g96", "Q4_0"), ("int4-channel", "Q4_0"), ("int4-tensor", "Q4_0"),
        ("int4-g32-asym", "Q4_1"), ("int4-g32-signed", "Q4_0"), ("int8-g32-half", "Q8_0"),
        ("int5-g32", "Q5_0"), ("int5-g64-signed", "Q5_0"), ("int5-channel-asym", "Q5_1"),
        ("int3-g32", "Q4_1"), ("int8-channel", "Q8_0"), ("int8-g32", "Q8_0"),
    ],
)  # fmt: skip
def test_blocks_hold_the_very_codes(grid, kind):
    """By gguf's own dequantization."""
    weight = weight_of(grid, columns=192)
    data, found = to_gguf(weight)
    assert found.name == kind
    expected = in_fp16(weight, kind).numpy()
    np.testing.assert_allclose(gguf.quants.dequantize(data, found), expected, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("grid", ["int4-g48", "int8-g32-asym", "int6-g32", "nvfp4", "mxfp4", "fp8-tensor"])
def test_a_grid_that_no_type_spells_is_left_to_floats(grid):
    assert to_gguf(weight_of(grid)) is None


def test_a_width_that_blocks_of_32_do_not_divide_is_left_to_floats():
    assert to_gguf(weight_of("int4-g16", columns=48)) is None


def checkpoint(folder, model):
    model.save_pretrained(folder)
    tiny_tokenizer(vocab_size=model.config.vocab_size).save_pretrained(folder)
    return load_model(resolve(str(folder)))


def test_llama_3s_factors_are_those_of_transformers(tmp_path):
    model = tiny_llama(rope_parameters=LLAMA3)
    write_gguf(checkpoint(tmp_path / "model", model), None, "fp32", tmp_path / "out.gguf")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "out.gguf").tensors}
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](model.config, "cpu")
    plain = 10_000.0 ** -(torch.arange(0, 16, 2) / 16)
    np.testing.assert_allclose(tensors["rope_freqs.weight"].data, (plain / scaled).numpy(), rtol=1e-5)


def test_a_tied_head_is_written_once(tmp_path):
    write_gguf(checkpoint(tmp_path / "m", tiny_llama(tie_word_embeddings=True)), None, "fp16", tmp_path / "out.gguf")
    names = [tensor.name for tensor in gguf.GGUFReader(tmp_path / "out.gguf").tensors]
    assert "token_embd.weight" in names
    assert "output.weight" not in names
    assert describe_weights(tmp_path / "out.gguf") == "15 x F16"


def test_other_models_and_variants_are_refused_in_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("QEVAL_HOME", str(tmp_path / "home"))
    tiny_family("Gemma2", vocab_size=256).save_pretrained(tmp_path / "gemma")
    tiny_tokenizer().save_pretrained(tmp_path / "gemma")
    with pytest.raises(UsageError, match="not of Gemma2ForCausalLM"):
        gguf_file.prepare_gguf(EngineSpec(resolve(str(tmp_path / "gemma")), None))
    folder = save_tiny(tmp_path / "yarn", rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0})
    with pytest.raises(UsageError, match="positions of type 'yarn'"):
        gguf_file.prepare_gguf(EngineSpec(resolve(str(folder)), None))
    scaled = Variant("key", {}, {}, {"model.layers.0.mlp.up_proj.weight": torch.ones(64)}, ())
    with pytest.raises(UsageError, match="scales the input of"):
        write_gguf(tiny(), scaled, "fp32", tmp_path / "out.gguf")


def test_a_file_that_is_given_is_taken_and_one_that_is_written_is_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("QEVAL_HOME", str(tmp_path))
    source = resolve(str(tiny().folder))
    assert gguf_file.prepare_gguf(EngineSpec(source, float_file())) == float_file()
    made = gguf_file.prepare_gguf(EngineSpec(source, None))
    assert (
        made
        == gguf_file.prepare_gguf(EngineSpec(source, None))
        != gguf_file.prepare_gguf(EngineSpec(source, None, "fp16"))
    )
    assert made.read_bytes()[:4] == b"GGUF"


def variant():
    weights = {
        name: quantize_rtn(parameter.detach(), parse("int4-g32"))
        for name, parameter in tiny().model.named_parameters()
        if name.endswith("proj.weight")
    }
    return Variant("key", weights, {}, {}, ())


class TestOnLlamaCpp:
    """What needs llama.cpp itself."""

    @pytest.fixture(autouse=True)
    def installed(self):
        pytest.importorskip("llama_cpp")

    @pytest.mark.parametrize("rope", [LLAMA3, {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}])
    def test_rotary_positions_are_turned_as_in_transformers(self, rope, tmp_path):
        loaded = checkpoint(tmp_path / "model", tiny_llama(rope_parameters=rope, tie_word_embeddings=True))
        write_gguf(loaded, None, "fp32", tmp_path / "out.gguf")
        engine, given = LlamaCppEngine(tmp_path / "out.gguf", exact=True), prompts(3, 90, 256)
        assert greedy(engine, given, 5) == slow_greedy(TorchSession(loaded.model), given, 5)
        engine.close()

    def test_a_variant_answers_as_its_fake_quantized_twin(self, tmp_path):
        """Within 3 % of the largest logit: llama.cpp rounds activations to int8 in products by quantized weights."""
        write_gguf(tiny(), variant(), "fp32", tmp_path / "out.gguf")
        engine, given = LlamaCppEngine(tmp_path / "out.gguf"), prompts(1, 12, 256)
        assert engine.identity.weights == "12 x Q4_0, scales in fp16; 4 x F32"
        assert engine.identity.provider == "CPU"
        engine.reset(1, 16)
        engine.prefill(given)
        model = type(tiny().model)(tiny().model.config).eval()
        model.load_state_dict(tiny().model.state_dict() | {n: w.dequantize() for n, w in variant().weights.items()})
        expected = slow_logits(TorchSession(model), given[0].tolist())
        assert abs(engine.logits()[0] - expected).max() <= 0.05 * abs(expected).max()
        engine.close()

    def test_what_is_no_gguf_or_no_gpu_is_told(self, tmp_path):
        (tmp_path / "torn.gguf").write_bytes(float_file().read_bytes()[:3000])
        with pytest.raises(UsageError, match="torn"):
            LlamaCppEngine(tmp_path / "torn.gguf")
        with pytest.raises(UsageError, match="built for the CPU"):
            LlamaCppEngine(float_file(), device="cuda")

    def test_closing_twice_is_no_harm(self):
        engine = LlamaCppEngine(float_file())
        engine.reset(2, 8)
        engine.close()
        engine.close()
        assert engine.memory().cache_bytes == 0

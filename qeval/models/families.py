"""One tiny model of random weights for each family: its true architecture, hidden 64, 2 layers, vocabulary 256.

The widths are awkward on purpose (112 is no multiple of 32), and norm gains are random too: ones would hide a gain that
is 1 + weight. Nothing here says how a family is quantized: that is traced (`models/structure/graph.py`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from qeval.models.silence_transformers import quiet

SIZES: Mapping[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.15,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "attn_implementation": "sdpa",
}
_WINDOW = 8
_ALTERNATING = {"sliding_window": _WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
_EXPERTS = {"num_experts_per_tok": 2, "output_router_logits": False}


def _long_rope(channels: int) -> dict[str, Any]:
    """Return settings by which sequences beyond 16 tokens have other frequencies; `channels` are rotated in pairs."""
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10_000.0,
        "factor": 16.0,
        "short_factor": [1.0] * (channels // 2),
        "long_factor": [4.0 + i for i in range(channels // 2)],
    }
    return {"rope_parameters": rope, "original_max_position_embeddings": 16}


@dataclass(frozen=True)
class Family:
    """A family of models: the start of its configuration class's name, and the settings it needs besides `SIZES`."""

    config: str
    line: str
    settings: Mapping[str, Any] = field(default_factory=dict)


FAMILIES: Mapping[str, Family] = {
    "Llama": Family("Llama", "Llama 2, CodeLlama, Orca-2, SmolLM2, DeepSeek-R1 distills; grouped queries"),
    "Llama3": Family(
        "Llama",
        "Llama 3.x; long-context frequencies, tied head",
        {
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500_000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            },
        },
    ),
    "Mistral": Family("Mistral", "a sliding window in every layer", {"sliding_window": _WINDOW}),
    "Phi": Family(
        "Phi", "Phi-2; attention beside the feed-forward, biases, a part is rotated", {"num_key_value_heads": 4}
    ),
    "Phi3": Family(
        "Phi3",
        "Phi-3; fused qkv and gate_up",
        {"num_key_value_heads": 4, "original_max_position_embeddings": 256},
    ),
    "Phi3.5": Family("Phi3", "LongRoPE", {"num_key_value_heads": 4, **_long_rope(16)}),
    "Phi4-mini": Family(
        "Phi3",
        "grouped queries fused, a part is rotated, LongRoPE, tied head",
        {"tie_word_embeddings": True, **_long_rope(12), "partial_rotary_factor": 0.75},
    ),
    "Gemma": Family(
        "Gemma", "gains of 1 + weight, scaled embedding, one key-value head", {"head_dim": 16, "num_key_value_heads": 1}
    ),
    "Gemma2": Family(
        "Gemma2",
        "soft caps, alternating windows, norms after too",
        # sdpa knows no soft cap
        {"head_dim": 16, "final_logit_softcapping": 3.0, "attn_implementation": "eager", **_ALTERNATING},
    ),
    "Gemma3": Family(
        "Gemma3Text", "norms of queries and keys, alternating windows, tied head", {"head_dim": 16, **_ALTERNATING}
    ),
    "Qwen2": Family("Qwen2", "Qwen2, Qwen2.5, DeepSeek-R1 distills; biases of queries, keys and values"),
    "Qwen3": Family("Qwen3", "norms of queries and keys", {"head_dim": 16}),
    "SmolLM3": Family("SmolLM3", "layers without positions", {"no_rope_layer_interval": 2}),
    "Olmo": Family("Olmo", "norms without gains"),
    "Olmo2": Family("Olmo2", "norms after what they norm"),
    "StableLm": Family("StableLm", "StableLM 3B; layer norms with biases, a part is rotated"),
    "StableLm2": Family(
        "StableLm",
        "StableLM 2; attention beside the feed-forward, norms by head",
        {"use_qkv_bias": True, "use_parallel_residual": True, "qk_layernorm": True},
    ),
    "GPT2": Family("GPT2", "Conv1D, learned positions, tied head", {"n_inner": 112, "num_key_value_heads": 4}),
    "GPTNeoX": Family(
        "GPTNeoX", "Pythia; qkv fused head by head, attention beside the feed-forward", {"num_key_value_heads": 4}
    ),
    "Granite": Family(
        "Granite",
        "multipliers, scaled logits",
        {"logits_scaling": 4.0, "residual_multiplier": 0.5, "embedding_multiplier": 2.0},
    ),
    "Ernie4_5": Family("Ernie4_5", "ERNIE 4.5; tied head", {"tie_word_embeddings": True, "head_dim": 16}),
    "HunYuan": Family("HunYuanDenseV1", "norms of queries and keys after the rotation", {"head_dim": 16}),
    "Nemotron": Family("Nemotron", "gains around one with biases, squared ReLU without a gate"),
    "Cohere": Family("Cohere", "Command R; one norm for both, scaled logits", {"logit_scale": 0.25}),
    "Mixtral": Family("Mixtral", "4 experts in a stack, 2 a token", {"num_local_experts": 4, **_EXPERTS}),
    "Phimoe": Family("Phimoe", "Phi-3.5-MoE; layer norms with biases", {"num_local_experts": 4, **_EXPERTS}),
    "Qwen2Moe": Family(
        "Qwen2Moe",
        "experts beside a shared one with a gate",
        {"num_experts": 4, "moe_intermediate_size": 48, "shared_expert_intermediate_size": 80, **_EXPERTS},
    ),
    "Qwen3Moe": Family(
        "Qwen3Moe",
        "experts, norms of queries and keys",
        {"num_experts": 4, "moe_intermediate_size": 48, "head_dim": 16, **_EXPERTS},
    ),
}
"""What `qeval models --check` and the contract suite go through, by the name that `--family` takes."""


def tiny_family(name: str, **changes: Any) -> Any:
    """Build the tiny model of a family, fp32, in eval mode without gradients; `changes` go to its configuration."""
    family = FAMILIES[name]
    config = getattr(transformers, f"{family.config}Config")(**{**SIZES, **family.settings, **changes})
    with quiet():
        return random_model(config)


def random_model(config: Any) -> Any:
    """Return a model of a configuration with random weights of seed 0, fp32, in eval mode without gradients.

    Vectors (norm gains and biases) are moved off their ones and zeros too.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.data.add_(0.2 * torch.randn_like(parameter))
    return model.eval().requires_grad_(False)


def byte_tokenizer(vocab: Mapping[str, int] | None = None) -> PreTrainedTokenizerFast:
    """Build a tokenizer of one token a byte of UTF-8, so that any text encodes: no merges, no special tokens."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(BPE(vocab=dict(vocab or {letter: i for i, letter in enumerate(letters)}), merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend)

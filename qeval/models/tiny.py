"""One tiny model of random weights for each causal model type that transformers has, from its configuration alone.

A default configuration is of some published size; every size in it is replaced by a small one that goes by its name.
Types whose sizes hang together otherwise have settings of their own.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from qeval.errors import QevalError, first_line
from qeval.models.families import random_model
from qeval.models.silence_transformers import quiet

CAUSAL_TYPES = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
"""The model types that transformers maps to a causal language model."""
TINY_VOCABULARY, TINY_CONTEXT = 256, 512
_MOST_PARAMETERS = 20_000_000
_SIZES: tuple[tuple[str, int], ...] = (
    (r"num_kv_shared_layers", 0),
    (r".*vocab_size.*|vocabulary_size|encoder_hash_byte_group_vocab", TINY_VOCABULARY),
    (r"max_position_embeddings|n_positions|n_ctx|max_seq_len|max_target_positions|max_sequence_length", TINY_CONTEXT),
    (r"original_max_position_embeddings", TINY_CONTEXT),
    (r"sliding_window|attention_window_size|window_size|attention_chunk_size|local_window_size", 8),
    (r"(mamba_)?chunk_size|index_topk", 8),
    (r"(mamba_d_state|ssm_state_size|state_size)", 16),
    (r"(mamba_d_head|mamba_head_?dim)", 32),
    (r"(mamba_)?(n_?groups|dt_rank)|time_step_rank", 1),
    (r"index_n_heads", 16),
    (r"qk_rope_head_dim", 8),
    (r".*(head_dim|qk_nope_head_dim|v_head_dim)|d_kv|kv_channels", 16),
    (r"rotary_dim", 8),
    (r".*lora_rank.*", 32),
    (r"(n_group|topk_group|num_expert_group|n_shared_experts|num_shared_experts|first_k_dense_replace)", 1),
    (r".*(experts_per_tok|experts_per_token|num_experts_per_tok|moe_topk|top_k_experts|moe_k|top_k).*", 2),
    (r"(num_|n_|moe_num_)?(local_|routed_)?(experts|num_experts)(_per_layer)?|num_local_experts|n_routed_experts", 4),
    (r".*(moe|expert).*(intermediate|ffn|ff).*", 48),
    (r".*(key_value_heads|kv_heads|num_kv)", 2),
    (r".*(attention_heads|n_heads?|num_heads|_heads)", 4),
    (r".*(num_hidden_layers|n_layers?|num_layers|decoder_layers|encoder_layers|depth|_layers)", 2),
    (r".*(intermediate|ffn|feed_forward|n_inner|mlp).*(size|dim|hidden)?", 96),
    (
        r".*(hidden_size|n_embd|d_model|embed_dim|embedding_size|_dim|^dim|projection_dim|hidden_dim|adapter_input_size).*",
        64,
    ),
)
"""Patterns of settings' names, the first that matches counts, and what is small for each."""
_NONE = {
    "head_dim": 16, "num_key_value_heads": 4, "n_routed_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2,
    "n_shared_experts": 1,
}  # fmt: skip
"""Sizes that are None in a default configuration and can't be."""
_IDS = {"pad": 0, "bos": 1, "eos": 2, "decoder_start": 1, "unk": 0, "sep": 2, "cls": 1, "mask": 0}
_DROPPED = (
    "model_type", "architectures", "transformers_version", "dtype", "_name_or_path", "per_layer_config", "torch_dtype",
    "attention_layers", "qk_head_dim",
)  # fmt: skip
_HYBRID = ["linear_attention", "full_attention"]
_OWN: Mapping[str, Mapping[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "blt": {"patching_threshold": 5.05, "local_attention_window_len": 8},  # of random bytes every other ends a patch
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10_000.0, "clip_qkv": 8.0}},
    "dory": {
        "n_input_layers": 2,
        "n_recurrent_layers": 2,
        "n_output_layers": 2,
        "num_hidden_layers": 6,
        "initializer_range": 0.2,
        "layer_types": ["sliding_attention", "full_attention"] * 3,
    },
    "dots3_note_text": {
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_kv_lora_rank": 32,
        "swa_q_lora_rank": 32,
        "swa_head_dim": 16,
        "swa_qk_nope_head_dim": 8,
        "swa_v_head_dim": 16,
    },
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_d_head": 32},
    "gemma3n_text": {"intermediate_size": [96, 96], "activation_sparsity_pattern": [0.95, 0.0]},
    "gemma4_text": {"global_head_dim": 32},
    "gemma4_unified_text": {"global_head_dim": 32},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": _HYBRID},
    "hrm_text": {"num_layers_per_stack": 2, "num_hidden_layers": 16},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"num_layers": 2, "zero_expert_num": 2},
    "mamba2": {"num_heads": 8},
    "qwen4_exp_text": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
    },
    "recurrent_gemma": {"num_hidden_layers": 3, "lru_width": 64},
    "reformer": {"axial_pos_embds": False, "is_decoder": True, "hash_seed": 0, "num_buckets": 4},
    "xlm": {"causal": True},
    "xlnet": {"d_head": 16, "d_inner": 256, "attn_type": "uni"},
    "xlstm": {"chunk_size": 16, "num_blocks": 2},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "num_hidden_layers": 4,
        "num_key_value_heads": 4,
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
    },
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "num_hidden_layers": 4,
        "num_key_value_heads": 4,
        "hybrid_layer_ids": [1, 3],
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "adapter_rank": 8,
    },
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10_000.0}}},
}
"""Settings that a type needs beside."""


def tiny_config(model_type: str) -> Any:
    """Return a type's configuration with every size small.

    Raises:
        QevalError: Its class takes no such sizes; the first line of its own error is told.
    """
    config_class = CONFIG_MAPPING[model_type]
    try:
        with quiet():
            return config_class(**_small(config_class().to_dict(), config_class))
    except Exception as error:
        raise QevalError(f"its configuration takes no tiny sizes ({first_line(error)})") from error


def tiny_model(config: Any) -> Any:
    """Return a model of a configuration with random weights, fp32, in eval mode without gradients.

    Raises:
        QevalError: It can't be built, or is not tiny after all.
    """
    try:
        with quiet():
            with torch.device("meta"):
                count = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())
            if count > _MOST_PARAMETERS:
                raise QevalError(f"it has {count:,} parameters with every size made small")
            return random_model(config)
    except QevalError:
        raise
    except Exception as error:
        raise QevalError(f"it can't be built ({type(error).__name__}: {first_line(error)})") from error


def _small(settings: Mapping[str, Any], config_class: Any) -> dict[str, Any]:
    """Return settings with small sizes; those of parts (a text's, an image's) too."""
    small: dict[str, Any] = {}
    parts = getattr(config_class, "sub_configs", {})
    for name, value in settings.items():
        if name in parts and isinstance(value, dict):
            small[name] = _small(value, parts[name])
        elif name not in _DROPPED:
            small[name] = _small_value(name, value, int(settings.get("num_hidden_layers") or 0))
    if "kv_lora_rank" in small:  # every head has keys of its own, made out of one latent
        small |= {"num_key_value_heads": small["num_attention_heads"], "head_dim": small.get("qk_rope_head_dim", 16)}
    if small.get("is_decoder") is False:
        small["is_decoder"] = True
    return {**small, **_OWN.get(getattr(config_class, "model_type", ""), {})}


def _small_value(name: str, value: Any, layers: int) -> Any:
    if value is None:
        return _NONE.get(name)
    if name.endswith(("token_id", "token_index")):
        return _IDS.get(name.partition("_token")[0], TINY_VOCABULARY - 1)
    if isinstance(value, list) and layers > 2 and len(value) == layers:
        return [value[0], next((other for other in value if other != value[0]), value[-1])]
    if isinstance(value, bool) or not isinstance(value, int):
        return value
    small = next((small for pattern, small in _SIZES if re.fullmatch(pattern, name)), value)
    return min(small, value) if value > 0 else value

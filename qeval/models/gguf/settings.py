"""A GGUF file's metadata as a transformers configuration; every key of its architecture counts.

llama.cpp's keys are read for the architectures below, each key into a setting, or checked to say what the model does
anyway, or known to change nothing. Any other is refused by its name: it may change the numbers.
Sources: gguf's constants.py (names), llama.cpp's convert_hf_to_gguf.py and src/llama-model.cpp (meanings, defaults).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader

from qeval.errors import UsageError
from qeval.models.gguf.rope import rope_parameters

_FLOAT_TYPE = "FLOAT32"
_IRRELEVANT = ("rope.scaling.finetuned", "tensor_data_layout", "leading_dense_block_count")
"""Keys that change nothing: who trained it so, how the converter found it, and (zero alone) which layers are dense."""
_ROPE = (
    "rope.freq_base", "rope.dimension_count", "rope.scale_linear", "rope.scaling.type", "rope.scaling.factor",
    "rope.scaling.original_context_length", "rope.scaling.attn_factor", "rope.scaling.yarn_ext_factor",
    "rope.scaling.yarn_attn_factor", "rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow", "rope.freq_base_swa",
)  # fmt: skip
_SIZES = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
}
_RMS = {"attention.layer_norm_rms_epsilon": "rms_norm_eps"}
_EXPERTS = {"expert_count": "num_experts", "expert_used_count": "num_experts_per_tok"}
_HEAD = ("attention.key_length", "attention.value_length")
_ARCHITECTURE, _TYPE = "general.architecture", "general.type"
_WINDOW, _PATTERN = "attention.sliding_window", "attention.sliding_window_pattern"
_ORIGINAL = "rope.scaling.original_context_length"


@dataclass(frozen=True)
class Metadata:
    """The keys of a file's architecture without its name in front, the names of its tensors with their shapes."""

    path: Path
    architecture: str
    keys: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]

    def has(self, part: str) -> bool:
        """Return whether any tensor's name holds `part`."""
        return any(part in name for name in self.shapes)

    def error(self, what: str) -> UsageError:
        """Return the error that names the file."""
        return UsageError(f"'{self.path}' {what}.")


Derive = Callable[[Metadata, dict[str, Any]], dict[str, Any]]
"""From the file and what was read so far: settings that need more than one key. Raises a UsageError."""


@dataclass(frozen=True)
class Architecture:
    """The rules by which one of llama.cpp's architectures is read.

    `keys`: settings by key, beside the sizes; `checked`: keys that may say one thing alone; `fixed`: settings that the
    architecture means; `derive`: those that take more than a key, and `derived` the keys of these; `alike`: model types
    whose checkpoints become such files.
    """

    model_type: str
    keys: Mapping[str, str] = field(default_factory=lambda: _RMS)
    checked: Mapping[str, Any] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    derive: Derive = lambda metadata, settings: {}
    derived: tuple[str, ...] = ()
    partial: bool = False
    rotary: bool = True
    """Whether a part of a head may be rotated; whether any is."""
    alike: tuple[str, ...] = ()


@dataclass(frozen=True)
class GgufSettings:
    """A file's configuration: `values` for transformers, and which of them the file itself `stated`."""

    architecture: Architecture
    values: Mapping[str, Any]
    stated: frozenset[str]


def metadata_of(reader: GGUFReader, path: Path) -> Metadata:
    """Return what a file says of its model.

    Raises:
        UsageError: It names no architecture, or one that is not read.
    """
    kind = reader.get_field(_TYPE)
    if kind is not None and kind.contents() != "model":
        raise UsageError(
            f"'{path}' holds no model but what its {_TYPE} calls '{kind.contents()}'; give the model's file."
        )

    named = reader.get_field(_ARCHITECTURE)
    architecture = str(named.contents()) if named else "none"
    if architecture not in ARCHITECTURES:
        raise UsageError(
            f"'{path}' is of the architecture '{architecture}', which can't be converted; these can: "
            f"{', '.join(ARCHITECTURES)}."
        )

    prefix = f"{architecture}."
    keys = {
        name.removeprefix(prefix): _field_value(part) for name, part in reader.fields.items() if name.startswith(prefix)
    }
    shapes = {tensor.name: tuple(int(size) for size in reversed(tensor.shape)) for tensor in reader.tensors}
    return Metadata(path, architecture, keys, shapes)


def gguf_settings(metadata: Metadata, factors: Mapping[str, np.ndarray]) -> GgufSettings:
    """Return the configuration that a file's metadata means.

    Args:
        metadata: The file's.
        factors: Its tensors of rotary factors, by name.

    Raises:
        UsageError: A key is missing, not read, or says what transformers' model can't do.
    """
    about = ARCHITECTURES[metadata.architecture]
    keys = {**_SIZES, **about.keys}
    known = {*keys, *about.checked, *about.derived, *_ROPE, *_HEAD, *_IRRELEVANT, "vocab_size", _WINDOW}
    _check_known(metadata, about, known)

    # what the file states by a key each
    stated = {setting: _single_value(metadata, key) for key, setting in keys.items() if key in metadata.keys}
    _check_stated(metadata, keys, stated)
    values = {"num_key_value_heads": stated["num_attention_heads"], **about.fixed, **stated}

    # what takes tensors' shapes or several keys
    values["vocab_size"] = _vocabulary(metadata)
    values["tie_word_embeddings"] = "output.weight" not in metadata.shapes
    values |= _head_size(metadata, values)
    if metadata.keys.get(_WINDOW):
        values["sliding_window"] = stated["sliding_window"] = int(_single_value(metadata, _WINDOW))
    values |= about.derive(metadata, values)
    if about.rotary:
        values["rope_parameters"] = rope_parameters(metadata, values, factors, partial=about.partial)

    values.setdefault("model_type", about.model_type)
    if about.model_type == "falcon":  # its own code divides the width by the heads
        del values["head_dim"]
    names = {*stated, "vocab_size", "rope_parameters", "head_dim", "model_type"} & values.keys()
    return GgufSettings(about, values, frozenset(names))


def is_zero(value: Any) -> bool:
    """Return whether a key says that something is not there."""
    return value in (0, 0.0, False) or (isinstance(value, list) and not any(value))


def _check_known(metadata: Metadata, about: Architecture, known: set[str]) -> None:
    for key, value in metadata.keys.items():
        if key not in known and not is_zero(value):
            raise metadata.error(
                f"has the key {metadata.architecture}.{key} = {str(value)[:40]}, which is not read for this "
                "architecture and may change its numbers"
            )
        if key in about.checked and value != about.checked[key]:
            raise metadata.error(
                f"has {metadata.architecture}.{key} = {str(value)[:40]} where transformers' {about.model_type} "
                f"computes with {about.checked[key]}"
            )
    if not is_zero(metadata.keys.get("leading_dense_block_count", 0)):
        raise metadata.error("has dense layers before those with experts, which is not read")


def _check_stated(metadata: Metadata, keys: Mapping[str, str], stated: Mapping[str, Any]) -> None:
    optional = {"num_key_value_heads", "intermediate_size", "attn_logit_softcapping", "final_logit_softcapping"}
    for key, setting in keys.items():
        if setting not in stated and setting not in optional:
            raise metadata.error(f"lacks the key {metadata.architecture}.{key}")


def _vocabulary(metadata: Metadata) -> int:
    shape = metadata.shapes.get("token_embd.weight", ())
    if len(shape) != 2:
        raise metadata.error("has no embedding (token_embd.weight)")
    if metadata.keys.get("vocab_size", shape[0]) != shape[0]:
        raise metadata.error(f"says {metadata.keys['vocab_size']} tokens where its embedding has {shape[0]} rows")
    return shape[0]


def _head_size(metadata: Metadata, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the size of a head, of keys and values alike."""
    whole = values["hidden_size"] // values["num_attention_heads"]
    size = int(metadata.keys.get("attention.key_length", whole))
    if metadata.keys.get("attention.value_length", size) != size:
        raise metadata.error("has heads whose values are of another length than its keys, which is not read")
    return {"head_dim": size}


def _single_value(metadata: Metadata, key: str) -> Any:
    """Return a key's value; one for all layers."""
    value = metadata.keys[key]
    if isinstance(value, list):
        if len({*value}) != 1:
            raise metadata.error(f"has {metadata.architecture}.{key} for each layer apart, which is not read")
        value = value[0]
    return value


def _field_value(part: Any) -> Any:
    """Return a field's value; a float32 as its shortest spelling names it: 1e-05, not 9.999999747378752e-06."""
    value = part.contents()
    if part.types[-1].name != _FLOAT_TYPE:
        return value
    return [_shortest(each) for each in value] if isinstance(value, list) else _shortest(value)


def _shortest(value: float) -> float:
    return float(str(np.float32(value))) if math.isfinite(value) else value


def _llama(metadata: Metadata, values: dict[str, Any]) -> dict[str, Any]:
    biases = {"attention_bias": metadata.has(".attn_q.bias"), "mlp_bias": metadata.has(".ffn_up.bias")}
    if not is_zero(metadata.keys.get("expert_count", 0)):
        if any(biases.values()):
            raise metadata.error("has experts and biases, which is not read")
        experts = {"num_local_experts": metadata.keys["expert_count"], "model_type": "mixtral", "sliding_window": None}
        return {**experts, "num_experts_per_tok": metadata.keys["expert_used_count"]}
    if values.get("sliding_window"):
        if any(biases.values()):
            raise metadata.error("has a sliding window and biases, which is not read")
        return {"model_type": "mistral"}
    return biases


def _attention_bias(metadata: Metadata, values: dict[str, Any]) -> dict[str, Any]:
    return {"attention_bias": metadata.has(".attn_q.bias")}


def _experts(metadata: Metadata, values: dict[str, Any]) -> dict[str, Any]:
    """Return the widths of experts, as the file's tensors have them."""
    settings: dict[str, Any] = {"attention_bias": metadata.has(".attn_q.bias")}
    widths = {"ffn_up_exps": "moe_intermediate_size", "ffn_up_shexp": "shared_expert_intermediate_size"}
    for name, setting in widths.items():
        if shape := metadata.shapes.get(f"blk.0.{name}.weight"):
            settings[setting] = shape[-2]
    for key, name in (
        ("expert_feed_forward_length", "ffn_up_exps"),
        ("expert_shared_feed_forward_length", "ffn_up_shexp"),
    ):
        shape = metadata.shapes.get(f"blk.0.{name}.weight", ())
        if key in metadata.keys and len(shape) > 1 and metadata.keys[key] not in (0, shape[-2]):
            raise metadata.error(f"says {key} {metadata.keys[key]} where its experts have {shape[-2]} rows")
    return settings


def _gemma(large: int) -> Derive:
    """Return what derives Gemma's settings.

    Scores are divided by the root of a head's size; in the model of `large` layers by its share of the width's.
    """

    def derive(metadata: Metadata, values: dict[str, Any]) -> dict[str, Any]:
        share = values["hidden_size"] // values["num_attention_heads"]
        scalar = share if values["num_hidden_layers"] == large else values["head_dim"]
        settings = {"query_pre_attn_scalar": scalar, **_attention_bias(metadata, values)}
        if isinstance(windows := metadata.keys.get(_PATTERN), list):
            kinds = ["sliding_attention" if is_window else "full_attention" for is_window in windows]
            settings["layer_types"] = kinds[: values["num_hidden_layers"]]
        elif windows:
            raise metadata.error(f"has {_PATTERN} {windows}, which is read as a list alone")
        return settings

    return derive


def _stablelm(metadata: Metadata, values: dict[str, Any]) -> dict[str, Any]:
    if metadata.has(".attn_q_norm."):
        raise metadata.error("has norms of each head's queries, which are not read")
    return {"use_qkv_bias": metadata.has(".attn_q.bias"), "use_parallel_residual": not metadata.has(".ffn_norm.")}


def _falcon(metadata: Metadata, values: dict[str, Any]) -> dict[str, Any]:
    newer = metadata.has(".attn_norm_2.")
    if values["num_key_value_heads"] != 1 and not newer:
        raise metadata.error(
            "is a Falcon with keys for each head, as those with ALiBi, which llama.cpp does not compute"
        )
    inner = metadata.shapes.get("blk.0.ffn_up.weight", (0,))[0]
    settings = {"new_decoder_architecture": newer, "multi_query": not newer, "ffn_hidden_size": inner}
    return {**settings, "num_kv_heads": values["num_key_value_heads"], "bias": metadata.has(".attn_qkv.bias")}


ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture(
        "llama",
        checked={"expert_weights_norm": True, "expert_weights_scale": 1.0, "expert_gating_func": 1},
        derive=_llama,
        derived=("expert_count", "expert_used_count"),
        alike=("mistral", "ministral", "mixtral"),
    ),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3", derive=_attention_bias),
    "qwen2moe": Architecture(
        "qwen2_moe",
        keys={**_RMS, **_EXPERTS},
        checked={"expert_weights_norm": False, "expert_weights_scale": 1.0, "expert_gating_func": 1},
        fixed={"norm_topk_prob": False, "decoder_sparse_step": 1, "mlp_only_layers": []},
        derive=_experts,
    ),
    "qwen3moe": Architecture(
        "qwen3_moe",
        keys={**_RMS, **_EXPERTS},
        checked={"expert_weights_norm": True, "expert_weights_scale": 1.0, "expert_gating_func": 1},
        fixed={"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []},
        derive=_experts,
    ),
    "gemma": Architecture("gemma", derive=_attention_bias),
    "gemma2": Architecture(
        "gemma2",
        keys={
            **_RMS,
            "attn_logit_softcapping": "attn_logit_softcapping",
            "final_logit_softcapping": "final_logit_softcapping",
        },
        derive=_gemma(46),
        derived=(_PATTERN,),
    ),
    "gemma3": Architecture(
        "gemma3_text",
        keys={**_RMS, "final_logit_softcapping": "final_logit_softcapping"},
        derive=_gemma(62),
        derived=(_PATTERN,),
        alike=("gemma3",),
    ),
    "phi3": Architecture(
        "phi3",
        derive=lambda metadata, values: {
            "original_max_position_embeddings": metadata.keys.get(_ORIGINAL, values["max_position_embeddings"])
        },
        partial=True,
    ),
    "starcoder2": Architecture("starcoder2", keys={"attention.layer_norm_epsilon": "norm_epsilon"}),
    "stablelm": Architecture(
        "stablelm", keys={"attention.layer_norm_epsilon": "layer_norm_eps"}, derive=_stablelm, partial=True
    ),
    "nemotron": Architecture(
        "nemotron",
        keys={"attention.layer_norm_epsilon": "norm_eps"},
        derive=lambda metadata, values: {**_attention_bias(metadata, values), "mlp_bias": metadata.has(".ffn_up.bias")},
        partial=True,
    ),
    "falcon": Architecture(
        "falcon",
        keys={"attention.layer_norm_epsilon": "layer_norm_epsilon"},
        fixed={"alibi": False, "parallel_attn": True},
        derive=_falcon,
    ),
    "gpt2": Architecture(
        "gpt2",
        keys={"attention.layer_norm_epsilon": "layer_norm_epsilon"},
        derive=lambda metadata, values: {"n_inner": values["intermediate_size"]},
        rotary=False,
    ),
}
"""What can be read, by `general.architecture`."""

"""What qeval can't score or quantize: found from the configuration before any weight is read, and by tracing.

Sessions keep keys and values of every token and share them between rows; layers that keep a running state instead
(Mamba, linear attention, short convolutions) would give wrong answers after a shared prefix, so they are refused.
"""

from pathlib import Path
from typing import Any

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from qeval.errors import UsageError
from qeval.models.graph import Description
from qeval.models.matrices import stack_of, weights_of

_ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}
_MOST_FLOAT, _TOLD_FLOAT = 0.5, 0.01
"""Shares of the decoder layers' weights that may stay in float, and that are told of."""
_NAMED_AT_MOST = 3


def check_config(config: Any, where: Path) -> None:
    """Refuse a configuration whose model qeval can't score.

    Raises:
        UsageError: it says what the model is.
    """
    named = list(config.architectures or [])
    what, text = ", ".join(named) or config.model_type, config.get_text_config()
    known = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or (named and known.isdisjoint(named)):
        raise UsageError(f"'{where}' names {what}, which is no causal language model that transformers can run.")
    if text.is_encoder_decoder:
        raise UsageError(f"'{where}' names {what}, an encoder with a decoder; qeval takes decoders alone.")
    others = sorted(set(getattr(text, "layer_types", None) or ()) - _ATTENTION)
    if others or MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]._is_stateful:
        kinds = f"layers of {', '.join(others)}" if others else "layers"
        raise UsageError(
            f"'{where}' names {what}, whose {kinds} keep a running state in the place of each token's keys and values; "
            "qeval takes models whose every layer attends."
        )


def notes_of(model: Any, description: Description) -> tuple[str, ...]:
    """Sentences on what of a model is neither scored nor quantized.

    Raises:
        UsageError: most weights of the decoder layers are in modules that qeval can't quantize.
    """
    return (*_beside_text(model, description), *_left_in_float(model, description))


def _beside_text(model: Any, description: Description) -> list[str]:
    """Vision towers and the like: what is not in the decoder."""
    decoder = model.get_decoder()
    if decoder is None or model.config.get_text_config() is model.config:
        return []
    inside = {id(parameter) for parameter in decoder.parameters()} | {id(model.get_output_embeddings().weight)}
    beside = sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in inside)
    return [
        f"{type(model).__name__} takes more than text; its language model of {len(description.layers)} layers alone is "
        f"scored and quantized, and the {beside:,} parameters beside it stay in float."
    ]


def _left_in_float(model: Any, description: Description) -> list[str]:
    prefixes = tuple(f"{layer}." for layer in description.layers)
    inside = {n: w.numel() for n, w in weights_of(model).items() if w.dim() >= 2 and n.startswith(prefixes)}
    quantized = {name for group in description.groups for name in group.names}
    left = {name: count for name, count in inside.items() if name not in quantized}
    share = sum(left.values()) / sum(inside.values())
    if share <= _TOLD_FLOAT:
        return []
    kinds = list(dict.fromkeys(stack_of(name).rpartition(".layers.")[2].partition(".")[2] for name in left))
    named = ", ".join(kinds[:_NAMED_AT_MOST]) + (" ..." if len(kinds) > _NAMED_AT_MOST else "")
    sentence = (
        f"{share:.0%} of the weights in {type(model).__name__}'s decoder layers are in modules that qeval can't "
        f"quantize ({named})"
    )
    if share > _MOST_FLOAT:
        raise UsageError(f"{sentence}, so no comparison would mean much.")
    return [f"{sentence}; they stay in float."]

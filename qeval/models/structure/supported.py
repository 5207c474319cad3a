"""The limits of what qeval scores and quantizes, seen in a configuration before any weight is read, and by tracing.

Any decoder whose forward pass is causal can be scored; whether it is, and what its sequences can share, is tried when
it is loaded (`backends/sharing.py`).
"""

import re
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import transformers
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from qeval.errors import UsageError
from qeval.escape import cut, cut_text
from qeval.models.structure.graph import Description
from qeval.models.structure.weight_views import stack_of, weights_of

_MOST_FLOAT, _TOLD_FLOAT = 0.5, 0.01
"""Shares of the decoder layers' weights that may stay in float, and that are told of."""
_NAMED_AT_MOST = 3
_CONTEXT = ("max_position_embeddings", "max_seq_len", "seq_length", "max_target_positions")
"""The names in configurations for the length of a context: most, MPT's, BLOOM's, Whisper's."""
_VERSION = re.compile(r"\d+(\.\d+){1,3}[\w.+-]{0,20}")
_LONGEST_NAME = 120
_SOUND = "continues several streams of codes of sound at once, and gives no probability of a text"
_REFUSED: Mapping[str, str] = {
    "cpmant": "attends to what stands behind a token too, so it gives no probability of a text",
    "musicgen": _SOUND,
    "musicgen_melody": _SOUND,
    "gemma4_assistant": "drafts for another model, whose keys and values it reads; qeval takes models that stand alone",
    "gemma4_unified_assistant": "drafts for another model, whose keys and values it reads; qeval takes models that "
    "stand alone",
    "prophetnet": "predicts several tokens at once, and a text's length changes its states in transformers' code",
}
"""The types of the causal mapping that are no language model of one stack, each with its reason."""
UNBOUNDED = 1 << 20
"""The context of a model without such a setting: running states and relative positions have no end of their own."""


def check_model_type(settings: Mapping[str, Any], where: Path | str) -> None:
    """Refuse the settings of a model type that the installed transformers does not have.

    Args:
        settings: A config.json as it is read.
        where: What messages call the file.

    Raises:
        UsageError: It names the class that needs code of its own, the release that has the type, or the nearest type.
    """
    kind, named = settings.get("model_type"), settings.get("architectures")
    if not isinstance(kind, str) or kind in CONFIG_MAPPING:
        return
    if settings.get("auto_map"):
        what = cut_text(", ".join(map(str, named)) if isinstance(named, list) and named else kind, _LONGEST_NAME)
        raise UsageError(
            f"'{where}' names {what}, which needs Python code from its own repository, and qeval runs none; take a "
            "checkpoint whose architecture transformers has."
        )
    raise UsageError(
        f"'{where}' is of type {cut(kind)}, which transformers {transformers.__version__} does not have"
        f"{_where_a_type_is(kind, str(settings.get('transformers_version') or ''))}."
    )


def _where_a_type_is(kind: str, saved: str) -> str:
    """Return what may be done about an unknown type, as the rest of a sentence; `saved`: the release that wrote it."""
    known = _VERSION.fullmatch(saved) is not None
    if known and _release(saved) > _release(transformers.__version__):
        return f": it was saved with {saved}, so install transformers {saved} or newer"
    if near := get_close_matches(kind, CONFIG_MAPPING, n=1, cutoff=0.7):
        return f"; the nearest that it has is '{near[0]}'"
    if known and _release(saved) < _release(transformers.__version__):
        return f" any more: it was saved with {saved}, and types that were dropped since can't be run"
    return ""


def _release(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)[:2]))


def check_supported(config: Any, where: Path | str) -> None:
    """Refuse a configuration whose model qeval can't score.

    Raises:
        UsageError: It says what the model is.
    """
    named = config.architectures or []
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise UsageError(f"'{where}' names architectures that are no names: {cut(named)}.")
    what = ", ".join(named) or config.model_type
    known = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or (named and known.isdisjoint(named)):
        raise UsageError(f"'{where}' names {what}, which is no causal language model that transformers can run.")

    if (reason := _REFUSED.get(config.model_type)) is not None:
        raise UsageError(f"'{where}' names {what}, which {reason}.")
    try:
        text = config.get_text_config()
    except ValueError as error:  # it has several
        raise UsageError(f"'{where}' names {what}, of several language models; qeval takes one alone.") from error
    context_length(text, where)


def context_length(config: Any, where: Path | str) -> int:
    """Return the tokens that a model's context holds.

    Args:
        config: The language model's own configuration.
        where: What messages call the file that it comes from.

    Raises:
        UsageError: It states none.
    """
    for name in _CONTEXT:
        length = getattr(config, name, None)
        if isinstance(length, int) and not isinstance(length, bool) and length > 0:
            return length
    if all(getattr(config, name, -1) == -1 for name in _CONTEXT):  # XLNet's is -1
        return UNBOUNDED
    raise UsageError(f"'{where}' names no context length ({_CONTEXT[0]}).")


def layer_configs(config: Any) -> list[Any]:
    """Return the configurations of a language model's decoder layers, each once: one, but where sizes differ."""
    if not getattr(config, "is_heterogeneous", False):
        return [config]
    return list(config.per_layer_config)


def support_notes(model: Any, description: Description) -> tuple[str, ...]:
    """Return sentences on what of a model is neither scored nor quantized.

    Raises:
        UsageError: Most weights of the decoder layers are in modules that qeval can't quantize.
    """
    return (*_parts_beside_text(model, description), *_left_in_float(model, description))


def _parts_beside_text(model: Any, description: Description) -> list[str]:
    """Return a sentence on what is not in the decoder: vision towers and the like."""
    decoder = model.get_decoder()
    if decoder is None or model.config.get_text_config() is model.config:
        return []
    inside = {id(parameter) for parameter in decoder.parameters()} | {id(model.get_output_embeddings().weight)}
    outside = sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in inside)
    return [
        f"{type(model).__name__} takes more than text; its language model of {len(description.layers)} layers alone is "
        f"scored and quantized, and the {outside:,} parameters beside it stay in float."
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

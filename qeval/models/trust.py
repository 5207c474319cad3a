"""Guards on a model's folder, which may not decide what code runs. Whoever opens one goes through here.

transformers takes from config.json who computes attention and experts, and a name with a slash there is a repository of
kernels that it fetches and runs; `auto_map` names Python files; `transformers_weights` other weights than those that
were hashed. qeval names the implementations itself, and hands others' programs a clean copy of the folder.
"""

import json
from collections.abc import Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from transformers.integrations import hub_kernels

from qeval import escape
from qeval.errors import UsageError
from qeval.models.checkpoint.weights import INDEX, weight_files
from qeval.models.hub.files import AROUND
from qeval.parsing import load_object

NO_HUB = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "USE_HUB_KERNELS": "NO"}
"""The environment of processes that run others' programs on a model: nothing is fetched there."""
LARGEST_CONFIG_BYTES = 16_000_000

_DATA = (".json", ".txt", ".model", ".jinja", ".bpe")
_SENTENCEPIECE = ("spiece.model", "sentencepiece.bpe.model")
_IMPLEMENTATIONS = ("attn_implementation", "experts_implementation")
_DROPPED = (
    *_IMPLEMENTATIONS, *(f"_{name}" for name in _IMPLEMENTATIONS), *(f"_{name}_internal" for name in _IMPLEMENTATIONS),
    "auto_map", "custom_pipelines", "transformers_weights", "use_kernels", "kernel_config",
)  # fmt: skip
"""Keys of a configuration that say what runs, and nothing of what a model is."""
_COUNTS = {
    "num_hidden_layers": 10_000, "num_layers": 10_000, "n_layer": 10_000, "n_layers": 10_000, "vocab_size": 1 << 25,
    "hidden_size": 1 << 22, "n_embd": 1 << 22, "d_model": 1 << 22, "intermediate_size": 1 << 24, "head_dim": 1 << 20,
    "num_attention_heads": 1 << 20, "num_key_value_heads": 1 << 20, "n_head": 1 << 20, "num_experts": 1 << 20,
    "num_local_experts": 1 << 20, "n_routed_experts": 1 << 20, "max_position_embeddings": 1 << 31,
    "sliding_window": 1 << 31,
}  # fmt: skip
"""The most that any model could have of each, far above what there is: beyond it a file is broken or hostile."""
_SMALL = ("_eps", "_epsilon")
"""How keys end whose values are added to a variance."""
_POSITIVE = frozenset({
    "num_attention_heads", "n_head", "vocab_size", "hidden_size", "n_embd", "d_model", "num_hidden_layers",
    "num_layers", "n_layer", "n_layers",
})  # fmt: skip

hub_kernels._kernels_enabled = False
"""transformers fetches no kernels' code for model types of its own either, where the package `kernels` is installed."""


def read_settings(folder: Path) -> dict[str, Any]:
    """Read a model folder's config.json, and refuse what may not be in one.

    Raises:
        UsageError: It is missing or no JSON object, names code of a repository, or has sizes that no model
            has.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise UsageError(f"'{folder}' is no model folder: there is no config.json in it.")
    content = load_object(path, largest=LARGEST_CONFIG_BYTES)
    for part in _config_sections(content):
        _check_code(part, path)
        _check_sizes(part, path)
    return content


def name_implementations(config: Any) -> Any:
    """Have transformers choose who computes attention and experts, whatever the file said; return the configuration."""
    for name in _IMPLEMENTATIONS:
        setattr(config, f"_{name}_internal", None)
    for name in getattr(config, "sub_configs", ()):
        if (part := getattr(config, name, None)) is not None and part is not config:
            name_implementations(part)
    return config


def clean_settings(folder: Path) -> dict[str, Any]:
    """Return a model folder's configuration without what says what code runs.

    Raises:
        UsageError: As `read_settings`.
    """
    settings = read_settings(folder)
    for part in _config_sections(settings):
        for key in _DROPPED:
            part.pop(key, None)
    return settings


def clean_copy(folder: Path, into: Path) -> Path:
    """Link a checkpoint's weights and tokenizer into a folder, beside its config.json without what says what runs.

    It is what other programs are given (the model builder, torch's exporter): they find no Python file, no library, no
    adapter and no name of a repository there.

    Args:
        folder: The checkpoint.
        into: An empty folder.

    Returns:
        `into`.

    Raises:
        UsageError: As `read_settings` and `weight_files`.
    """
    settings = clean_settings(folder)
    files = [path for path in known_files(folder) if path.name != "config.json"]
    files += [*weight_files(folder), *([folder / INDEX] if (folder / INDEX).is_file() else [])]
    for path in files:
        (into / path.name).symlink_to(path.resolve())
    (into / "config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")
    return into


def known_files(folder: Path) -> list[Path]:
    """Return the files beside a model's weights that qeval knows by name: configuration and tokenizer, nothing else."""
    patterns = (*AROUND, *_SENTENCEPIECE)
    return [
        path
        for path in sorted(folder.iterdir())
        if path.is_file() and path.suffix in _DATA and any(fnmatch(path.name, pattern) for pattern in patterns)
    ]


def _config_sections(content: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield a configuration, and those of its parts (`text_config`)."""
    yield content
    for key, value in content.items():
        if isinstance(value, dict) and key.endswith("_config") and key != "quantization_config":
            yield from _config_sections(value)


def _check_code(part: Mapping[str, Any], path: Path) -> None:
    for key in _IMPLEMENTATIONS:
        for spelled in (key, f"_{key}", f"_{key}_internal"):
            value = part.get(spelled)
            for name in value.values() if isinstance(value, Mapping) else (value,):
                if isinstance(name, str) and ("/" in name or "\\" in name):
                    raise UsageError(
                        f"'{path}' names a repository of code, {spelled}: {escape.cut(name)}: qeval runs none of "
                        "others' code; take the line out."
                    )


def _check_sizes(part: Mapping[str, Any], path: Path) -> None:
    for key, most in _COUNTS.items():
        value = part.get(key)
        if not isinstance(value, int) or isinstance(value, bool):
            continue  # a list has a number a layer; what is no number transformers refuses
        if value > most or (value < 1 and key in _POSITIVE):
            raise UsageError(f"'{path}' has {key} {escape.cut(value)}, which no model has; download it again.")
    for key, value in part.items():
        if key.endswith(_SMALL) and isinstance(value, (int, float)) and not 0 <= value <= 1:
            raise UsageError(f"'{path}' has {escape.cut(key)} {escape.cut(value)}, which no model has.")

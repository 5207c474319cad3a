"""What is known of a loaded model, in plain values."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from qeval.identity import digest

_NO_NUMBERS = ("transformers_version", "_name_or_path")


@dataclass(frozen=True)
class ModelInfo:
    """The baseline's weights: where they came from and what they are. Dtypes are torch's names, `float16`.

    `weights_sha256` hashes the names, dtypes, shapes and bytes of the checkpoint's tensors, however they are sharded.
    `weight_dtype` is the checkpoint's, `compute_dtype` what it is computed in. `revision` is the hub's commit.
    `notes` are sentences that a reader of the results must know.
    """

    name: str
    source: Literal["hub", "folder", "gguf", "demo"]
    hub_id: str | None
    revision: str | None
    architecture: str
    weights_sha256: str
    weight_dtype: str
    compute_dtype: str
    layers: int
    hidden_size: int
    vocab_size: int
    parameters: int
    tied_embeddings: bool
    context_length: int
    notes: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A transformers causal language model in eval mode without gradients, its tokenizer, what is known of it,
    the folder of its checkpoint, and what must be told of how that was had."""

    model: Any
    tokenizer: Any
    info: ModelInfo
    folder: Path
    warnings: tuple[str, ...] = ()

    @property
    def config_sha256(self) -> str:
        """What of the configuration may change a number: all of it but who wrote it."""
        config = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
        return digest({name: value for name, value in config.items() if name not in _NO_NUMBERS})

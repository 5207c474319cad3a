"""Facts about a loaded model, in plain values."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from qeval.errors import UsageError
from qeval.identity import digest

SourceKind = Literal["hub", "folder", "gguf", "demo", "memory"]
_NO_NUMBERS = ("transformers_version", "_name_or_path")


@dataclass(frozen=True)
class ModelInfo:
    """The baseline's weights: where they came from and what they are. Dtypes are torch's names, `float16`.

    `weights_sha256` hashes the names, dtypes, shapes and bytes of the checkpoint's tensors, however they are sharded.
    `weight_dtype` is the checkpoint's, `compute_dtype` what it is computed in. `revision` is the hub's commit.
    `notes` are sentences that a reader of the results must know.
    """

    name: str
    source: SourceKind
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
    """A transformers causal language model in eval mode without gradients, its tokenizer, and what is known of it.

    `checkpoint` is its folder; None for a model that was loaded by the caller, whose `config` is then its text.
    `warnings` are what must be told of how it was had.
    """

    model: Any
    tokenizer: Any
    info: ModelInfo
    checkpoint: Path | None
    warnings: tuple[str, ...] = ()
    config: str | None = None

    @property
    def folder(self) -> Path:
        """The folder of the checkpoint.

        Raises:
            UsageError: The model was loaded by the caller, so it has none.
        """
        if self.checkpoint is None:
            raise UsageError(needs_folder("This"))
        return self.checkpoint

    @property
    def config_sha256(self) -> str:
        """The hash of what may change a number in the configuration: all of it but who wrote it."""
        text = (self.folder / "config.json").read_text(encoding="utf-8") if self.config is None else self.config
        # A number that JSON has no form for counts by its text.
        content = json.loads(text, parse_constant=str, parse_float=_finite_or_text)
        return digest({name: value for name, value in content.items() if name not in _NO_NUMBERS})


def _finite_or_text(text: str) -> float | str:
    value = float(text)
    return value if math.isfinite(value) else text


def needs_folder(what: str) -> str:
    """Return why `what` can't be done with a model that the caller loaded, and what to do."""
    return (
        f"{what} reads a model from its folder, and this one is in memory: save it and its tokenizer with "
        "save_pretrained, and give that folder as the model."
    )

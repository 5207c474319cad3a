"""What `compare` needs of llama.cpp: which GGUF file each variant is, given or written, and how it ran."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from qeval.backends.llamacpp.backend import LlamaCppBackend, LlamaSession
from qeval.backends.llamacpp.library import NAME
from qeval.engines.gguf_file import GGUF_VERSION, check_family, written
from qeval.errors import UsageError
from qeval.models.info import LoadedModel
from qeval.quant.variant import Variant
from qeval.store.run import RuntimeRecord


@dataclass(frozen=True, eq=False)
class Llama:
    """llama.cpp for one model. `given` are GGUF files by the variant's name; all others are written.

    `unwritten`: why none can be written of this model, in a sentence; None where they can.
    """

    backend: LlamaCppBackend
    loaded: LoadedModel
    given: Mapping[str, Path]
    unwritten: str | None

    def made(self, name: str) -> str:
        """How a variant's file came to be, where that changes numbers."""
        return "given" if name in self.given else f"written {GGUF_VERSION}"

    def open(self, name: str, variant: Callable[[], Variant | None]) -> AbstractContextManager[LlamaSession]:
        """A session of the file of a name, else of one written of `variant()` (None: of the float model).

        What is left in float in a file that is written is of fp32, as the other backends compute it.

        Raises:
            UsageError: a GGUF can't hold the variant, or llama.cpp can't open it.
        """
        return self.backend.open(self.given.get(name) or written(self.loaded, variant(), "fp32"))

    def record(self, name: str, session: LlamaSession) -> RuntimeRecord:
        """How it ran, in the words of a run's record."""
        return RuntimeRecord(
            runtime=self.backend.runtime,
            provider=self.backend.provider,
            nodes={},
            exporter=None if name in self.given else "qeval",
            format=None,
            accuracy_level=None,
            shares_prefixes="one",
            facts=[
                f"{session.weights}.",
                "Products by quantized weights round activations to 8 bits; keys and values are fp16, "
                "attention is not flash attention.",
            ],
        )


def llama_of(
    loaded: LoadedModel, given: Mapping[str, Path], *, writes: bool, ids: int, threads: int, device: str
) -> Llama:
    """llama.cpp for a run. `writes`: whether there are variants whose files are to be written; `ids`: the vocabulary.

    Raises:
        UsageError: variants are to be written, and qeval writes no GGUF files of such a model.
    """
    unwritten = None
    try:
        check_family(loaded)
    except UsageError as error:
        if writes:
            raise UsageError(f"--backend {NAME}: {error}") from error
        unwritten = str(error)
    return Llama(LlamaCppBackend(threads, device, ids), loaded, given, unwritten)

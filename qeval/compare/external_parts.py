"""The parts that are scored of a checkpoint that rounds more than weights: all of it, its weights alone, or both.

A GGUF file says nothing of keys and values; `--kv-types` does.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from qeval.backends.llamacpp.cache_types import cache_types
from qeval.backends.llamacpp.library import LLAMACPP
from qeval.backends.vllm.backend import VLLM
from qeval.compare.schemes import check_scheme, scheme_details
from qeval.compare.settings import ExternalParts, Settings
from qeval.compare.variants import BaselineModel, VariantEntry
from qeval.errors import UsageError
from qeval.quant.scheme import Scheme, scheme_of
from qeval.store.variants import read_manifest

WEIGHTS_SUFFIX = "@weights"
"""Of the name of a checkpoint's weights, where they are scored beside all of it."""
_PARTS = ("keys", "values")
_PLAIN_CACHE = "f16"
"""The word of --kv-types for what is not quantized."""


@dataclass(frozen=True)
class PartsChoice:
    """The choice of what is scored of checkpoints that round more than weights.

    Attributes:
        parts: All of each, its weights alone, or both, the second as NAME@weights.
        backends: What scores them.
        caches: The keys and values of GGUF files.
    """

    parts: ExternalParts = "split"
    backends: Sequence[str] = ("torch",)
    caches: Scheme = field(default_factory=Scheme)

    def entries(self, entry: VariantEntry, flag: str, source: BaselineModel) -> list[VariantEntry]:
        """Return the variants that are scored of a checkpoint.

        Args:
            entry: The checkpoint.
            flag: The opening of errors: `--variant a=b`.
            source: The baseline.

        Raises:
            UsageError: All of it is to be scored by what takes weights alone, or the model has no such keys and values.
        """
        has_caches = entry.gguf is not None and bool(self.caches)
        scheme = self.caches if has_caches else entry.target.effective_scheme
        if not scheme:
            return [entry]
        rounded = " and ".join(scheme.formats)
        manifest = read_manifest(entry.target.folder)
        has_weights = bool(manifest.weights or manifest.stored)
        if self.parts == "weights":
            if not has_weights:
                raise UsageError(f"{flag}: it holds no quantized weight, only rounded {rounded}.")
            said = f"its weights alone, without rounded {rounded}"
            return [replace(entry, scheme=Scheme(), notes={**entry.notes, "scored": said})]
        if by := self._weights_alone_by(scheme):
            raise UsageError(
                f"{flag}: {by} weights alone, and {rounded} are rounded too. Give --external-parts weights, or score "
                "it by torch alone."
            )
        whole = self._with_caches(entry, flag, source) if has_caches else entry
        alone = replace(
            entry, name=f"{entry.name}{WEIGHTS_SUFFIX}", scheme=Scheme(), part_of=entry.name,
            notes={**entry.notes, "scored": f"its weights alone; {entry.name} is all of it"},
        )  # fmt: skip
        whole = replace(whole, notes={**whole.notes, "scored": f"as a whole: weights and {rounded}"})
        splits = self.parts == "split" and has_weights and VLLM not in self.backends  # which runs checkpoints whole
        return [whole, alone] if splits else [whole]

    def _with_caches(self, entry: VariantEntry, flag: str, source: BaselineModel) -> VariantEntry:
        """Return a GGUF file's variant with the keys and values of --kv-types."""
        try:
            check_scheme(self.caches, source.model, source.description, source.head_shapes)
        except UsageError as error:
            raise UsageError(f"{flag} with --kv-types: {error}") from error
        details = scheme_details(self.caches, source.model, source.head_shapes)
        return replace(entry, scheme=self.caches, notes={**entry.notes, **details})

    def _weights_alone_by(self, scheme: Scheme) -> str:
        """Return what of the run takes weights alone, as a sentence's beginning; empty where nothing does."""
        as_a_whole = ("torch", VLLM, *([LLAMACPP] if _is_ggmls(scheme) else []))
        others = [name for name in self.backends if name not in as_a_whole]
        return f"--backend {','.join(others)} runs" if others else ""


def parts_choice(settings: Settings, *, has_gguf: bool) -> PartsChoice:
    """Return the choice of a run.

    Args:
        settings: The run's.
        has_gguf: Whether any --variant is a GGUF file.

    Raises:
        UsageError: --kv-types names no types of ggml's, or there is no GGUF file that they could be of.
    """
    words = settings.kv_types
    if words and not has_gguf:
        raise UsageError("--kv-types is of GGUF files by --variant; recipes name their own, such as rtn+kv-q8_0.")
    return PartsChoice(settings.external_parts, settings.backends.runners, kv_scheme(words))


def kv_scheme(words: Sequence[str]) -> Scheme:
    """Return the scheme of the types of keys and values; one type is of both.

    >>> kv_scheme(["q8_0", "f16"]).names()
    {'keys': 'q8_0'}

    Raises:
        UsageError: There are more than two, or llama.cpp has no such types.
    """
    if len(words) > 2:
        raise UsageError(f"--kv-types takes one type, or those of keys and of values, not {','.join(words)}.")
    both = [*words, *words[-1:]][:2]  # one is of keys and values
    scheme = scheme_of({part: word for part, word in zip(_PARTS, both, strict=False) if word != _PLAIN_CACHE})
    try:
        cache_types(scheme)
    except UsageError as error:
        raise UsageError(f"--kv-types {','.join(words)} is of llama.cpp's types, and {error}") from error
    return scheme


def _is_ggmls(scheme: Scheme) -> bool:
    try:
        cache_types(scheme)
    except UsageError:
        return False
    return True

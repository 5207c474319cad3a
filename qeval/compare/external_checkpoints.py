"""`--variant` of a checkpoint that another tool quantized: read, checked, and kept as a variant of qeval's.

What it says of itself comes first (configuration, vocabulary, tokens), then its weights beside the baseline's, then a
few tokens through it. Nothing is scored of what fails one of them.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from qeval.backends.base import Backend, Session
from qeval.compare.external_parts import PartsChoice
from qeval.compare.external_paths import VariantPath, is_gguf
from qeval.compare.schemes import with_external_scheme
from qeval.compare.variants import BaselineModel, FitsKernel, VariantEntry
from qeval.errors import BrokenRecordError, UsageError
from qeval.files.locks import alone
from qeval.formats import torchao
from qeval.formats.assemble import Reading, assemble, padding_ids, unused_tensors
from qeval.formats.checkpoint import CheckpointTensors, open_checkpoint, read_quantization
from qeval.formats.gguf import forms_of
from qeval.formats.match_baseline import BaselineWeights
from qeval.formats.registry import format_of
from qeval.formats.scheme import ExternalScheme, read_scheme
from qeval.identity import digest
from qeval.models.checkpoint.weights import shorten_list, weights_sha256
from qeval.models.gguf.convert import convert_gguf, settings_in
from qeval.models.info import LoadedModel
from qeval.models.silence_transformers import quiet
from qeval.models.structure.rotation import same_rotation
from qeval.models.structure.trace import language_config, text_config
from qeval.models.structure.weight_views import transposed_weights, weights_of
from qeval.models.trust import read_settings
from qeval.models.vocabulary import read_tokenizer
from qeval.paths import home
from qeval.progress import Advance
from qeval.quant.grid import parse
from qeval.quant.variant import Variant
from qeval.score.token_hash import has_tokenizer, notes_on, same_tokenizer, why_other
from qeval.store.variants import Manifest, Origin, save_variant, verify_variant
from qeval.tasks.corpus import BosPolicy
from qeval.types import Request

FORMATS_VERSION = 3
"""Part of every key: raise it when the same file is read into other numbers."""

_DECIDES = (
    "model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "hidden_act", "rms_norm_eps", "layer_norm_eps", "rope_parameters",
    "partial_rotary_factor", "sliding_window", "final_logit_softcapping", "attn_logit_softcapping", "logits_scaling",
)  # fmt: skip
"""What of a configuration the numbers depend on: the baseline's is what computes."""
_PROBE_TOKENS = 16


@dataclass(frozen=True, eq=False)
class ExternalCheckpoint:
    """A checkpoint made elsewhere: what named it, where its tensors are, and how they are to be read."""

    place: VariantPath
    folder: Path
    config: Mapping[str, Any]
    reading: Reading
    method: str
    title: str
    notes: tuple[str, ...]
    stated: frozenset[str] | None = None
    """What of its configuration it states itself; None: all."""
    alike: tuple[str, ...] = ()
    """The model types whose checkpoints become such files."""

    def error(self, reason: object) -> UsageError:
        """Return the error that names the flag: `--variant a=b: its ...`."""
        return UsageError(f"{self.place.flag}: {reason}")


def is_external_checkpoint(path: Path) -> bool:
    """Return whether a path is a GGUF file or a checkpoint folder."""
    return is_gguf(path) or (path / "config.json").is_file()


def read_place(place: VariantPath, baseline: BaselineWeights) -> ExternalCheckpoint:
    """Return what lies at a place, of a format that is read.

    Raises:
        UsageError: no format reads it, its file is missing or torn, or a library is not installed.
    """
    path = place.path
    if is_gguf(path):
        return _gguf(place, baseline)
    config, quantized = read_settings(path), read_quantization(path)
    if quantized is None:
        reading = Reading(None, {}, {})
        return ExternalCheckpoint(
            place, path, config, reading, "float", "floats", ("no quantization_config: taken as it is",)
        )
    try:
        reads = format_of(quantized, str(path))
        notes = reads.notes(quantized)
    except UsageError as error:
        raise UsageError(f"{place.flag}: {error}") from error
    method = str(quantized["quant_method"])
    return ExternalCheckpoint(place, path, config, Reading(reads, quantized, {}), method, reads.title, notes)


def _gguf(place: VariantPath, baseline: BaselineWeights) -> ExternalCheckpoint:
    path = place.path
    if not path.is_file():
        raise UsageError(f"{place.flag}: the GGUF file does not exist.")
    forms = forms_of(path, baseline.parameters, len(baseline.description.layers), baseline.prefix)
    settings = settings_in(path)
    folder = convert_gguf(path)
    notes = ("dequantized by the gguf package and rounded to fp16",)
    checkpoint = ExternalCheckpoint(
        place, folder, read_settings(folder), Reading(None, {}, forms), "gguf", "GGUF", notes
    )
    return replace(
        checkpoint, stated=settings.stated, alike=(settings.architecture.model_type, *settings.architecture.alike)
    )


def baseline_of(loaded: LoadedModel, source: BaselineModel) -> BaselineWeights:
    """Return what a checkpoint is compared with."""
    parameters, turned = weights_of(loaded.model), transposed_weights(loaded.model)
    parameters.setdefault(source.description.head, source.head.weight)
    config = text_config(loaded.model)
    heads = getattr(config, "num_attention_heads", None) or 1  # Mamba has none
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return BaselineWeights(parameters, source.description, int(head_dim), f"{loaded.model.base_model_prefix}.", turned)


def check_config(checkpoint: ExternalCheckpoint, loaded: LoadedModel) -> None:
    """Refuse a checkpoint whose configuration computes something else than the baseline's.

    Raises:
        UsageError: it names the first setting that differs.
    """
    try:
        with quiet():
            text = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
            config = language_config(AutoConfig.for_model(**text))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise checkpoint.error(f"its config.json can't be used ({error}).") from error
    ours = text_config(loaded.model)
    for key in _DECIDES:
        mine, other = _setting(ours, key), _setting(config, key)
        if checkpoint.stated is not None and key not in checkpoint.stated:
            continue
        if key == "model_type" and mine in checkpoint.alike and other in checkpoint.alike:
            continue
        if mine != other and not (key == "rope_parameters" and same_rotation(ours, config)):
            raise checkpoint.error(
                f"its configuration has {key} {_short(other)} where the baseline has {_short(mine)}: it was made from "
                "another model."
            )


@dataclass(frozen=True, eq=False)
class TokenCheck:
    """The question to both sides' tokenizers: a run's texts, its BOS policy, the baseline's token hash."""

    texts: Sequence[str]
    bos: BosPolicy
    token_hash: str
    token_hash_of: Callable[[Any], str]


def check_same_tokens(made_by: str, folder: Path, ours: Any, token_check: TokenCheck) -> dict[str, str]:
    """Refuse a folder whose own tokenizer would ask it something else than the baseline; else what to tell of it.

    `made_by` is the flag that named the folder.

    Raises:
        UsageError: it says which token ids, or which BOS, differ.
    """
    if not has_tokenizer(folder):
        return {"tokenizer": "the folder holds none: it is asked the baseline's token ids"}
    tokenizer = read_tokenizer(folder)
    if not same_tokenizer(ours, tokenizer) and token_check.token_hash_of(tokenizer) != token_check.token_hash:
        reason = (
            why_other(ours, tokenizer, token_check.texts, token_check.bos)
            or "other token ids than the baseline for a question"
        )
        raise UsageError(f"{made_by} has {reason}, so nothing of it could be compared.")
    return notes_on(ours, tokenizer)


def import_checkpoints(
    places: Iterable[VariantPath], loaded: LoadedModel, source: BaselineModel, backend: Backend[Any],
    token_check: TokenCheck, fits: Sequence[FitsKernel], choice: PartsChoice,
) -> dict[str, list[VariantEntry]]:  # fmt: skip
    """Return the checkpoints made elsewhere among --variant, as variants of qeval's by name: by `choice` some are two.

    Raises:
        UsageError: one of them is of another model or tokenizer, is misread, or can't be read at all.
    """
    baseline = baseline_of(loaded, source)
    every = [read_place(place, baseline) for place in places]
    all_notes = []
    for checkpoint in every:  # what takes no reading of weights first, of all of them
        check_config(checkpoint, loaded)
        all_notes.append(check_same_tokens(checkpoint.place.flag, checkpoint.folder, loaded.tokenizer, token_check))
    entries = {}
    for checkpoint, notes in zip(every, all_notes, strict=True):
        whole = import_checkpoint(checkpoint, baseline, source, backend, notes, fits)
        entries[whole.name] = choice.entries(whole, checkpoint.place.flag, source)
    return entries


def import_checkpoint(
    checkpoint: ExternalCheckpoint,
    baseline: BaselineWeights,
    source: BaselineModel,
    backend: Backend[Any],
    notes: Mapping[str, str],
    fits: Sequence[FitsKernel],
) -> VariantEntry:
    """Return a checkpoint's variant: read unless the cache holds it, compared with the baseline, tried on a few tokens.

    `notes`: what else a reader must know of it.

    Raises:
        UsageError: it can't be the baseline's, or is misread.
    """
    with open_checkpoint(checkpoint.folder) as tensors:
        key = _key(checkpoint, tensors, source)
        folder = home() / "variants" / key
        with alone(f"variant-{key}"):
            manifest = _whole(folder) or _import(checkpoint, tensors, baseline, source, backend, folder)
    for weight in manifest.weights:
        for check in fits:
            check(weight.name, parse(weight.grid), weight.columns)
    gguf = checkpoint.place.path if is_gguf(checkpoint.place.path) else None
    return VariantEntry(
        checkpoint.place.name,
        checkpoint.method,
        folder,
        notes={"from": checkpoint.place.origin, **notes},
        gguf=gguf,
        checkpoint=None if gguf else checkpoint.folder,
    )


def _key(checkpoint: ExternalCheckpoint, tensors: CheckpointTensors, source: BaselineModel) -> str:
    return digest(
        {
            "formats": FORMATS_VERSION,
            "weights": weights_sha256(tensors.entries),
            "quantization": json.loads(json.dumps(checkpoint.reading.config, default=str)),
            "forms": dict(checkpoint.reading.forms),
            "baseline": source.weights_sha256,
        }
    )


def _whole(folder: Path) -> Manifest | None:
    """Return the manifest of a variant that the cache holds whole."""
    if not folder.exists():
        return None
    try:
        return verify_variant(folder)
    except (BrokenRecordError, UsageError):
        return None  # it is read again, and replaces what was torn


def _import(
    checkpoint: ExternalCheckpoint,
    tensors: CheckpointTensors,
    baseline: BaselineWeights,
    source: BaselineModel,
    backend: Backend[Any],
    folder: Path,
) -> Manifest:
    if any(parameter.is_meta for parameter in baseline.parameters.values()):
        raise checkpoint.error(
            "a checkpoint is laid beside the whole baseline first, which --stream does not hold; run once without "
            "--stream where memory holds both: the cache keeps what was read."
        )
    variant = _read(checkpoint, tensors, baseline, folder.name, lambda count: None)
    variant = replace(variant, details={**_details(checkpoint, tensors, baseline), **variant.details})
    whole = with_external_scheme(variant, _read_scheme(checkpoint, tensors, baseline), source.model)
    with backend.open(whole) as session:
        check_answers(checkpoint, session)
    origin = Origin(
        recipe={"method": checkpoint.method, "importance": "none"},
        model={"name": source.name, "weights_sha256": source.weights_sha256},
        calibration=None,
        float_bits=source.float_bits,
        seconds=0.0,
    )
    save_variant(whole, folder, origin)
    return verify_variant(folder)


def _read(
    checkpoint: ExternalCheckpoint, tensors: CheckpointTensors, baseline: BaselineWeights, key: str, advance: Advance
) -> Variant:
    reading = checkpoint.reading._replace(config={**checkpoint.reading.config, torchao.HEADER: tensors.header})
    try:
        return assemble(tensors, reading, baseline, key, advance)
    except UsageError as error:
        raise checkpoint.error(error) from error


def _read_scheme(
    checkpoint: ExternalCheckpoint, tensors: CheckpointTensors, baseline: BaselineWeights
) -> ExternalScheme:
    try:
        return read_scheme(tensors, checkpoint.reading, baseline)
    except UsageError as error:
        raise checkpoint.error(error) from error


def _details(checkpoint: ExternalCheckpoint, tensors: CheckpointTensors, baseline: BaselineWeights) -> dict[str, str]:
    details = {
        "made by": f"{checkpoint.title} ({'; '.join(checkpoint.notes)})" if checkpoint.notes else checkpoint.title
    }
    if extra := padding_ids(tensors, baseline):
        details["padding"] = padding_note("embedding", extra)
    if names := unused_tensors(tensors, baseline):
        details["not used"] = shorten_list(names)
    return details


def padding_note(what: str, extra: range) -> str:
    """Return the sentence that ids of a variant's own were left out."""
    return (
        f"its {what} has the ids {extra.start} to {extra.stop - 1} beyond the baseline's: left out, so that both are "
        "compared on the ids that they share"
    )


def check_answers(checkpoint: ExternalCheckpoint, session: Session) -> None:
    """Refuse a model whose logits are no numbers, or the same whatever it is asked.

    Raises:
        UsageError: it says which.
    """
    tokens = tuple((7919 * place) % session.vocab_size for place in range(1, _PROBE_TOKENS + 1))
    logits = session.logits(session.states([Request(tokens, tuple(range(_PROBE_TOKENS)))])[0]).float()
    if not torch.isfinite(logits).all():
        raise checkpoint.error("its logits are not finite.")
    if float(logits.std(dim=1).max()) == 0 or float((logits - logits[0]).abs().max()) == 0:
        raise checkpoint.error("its logits are constant: the same for every token, or at every position.")


def _setting(config: Any, key: str) -> Any:
    """Return a setting's value; that of a head's size also where it goes without saying."""
    value = getattr(config, key, None)
    return config.hidden_size // config.num_attention_heads if key == "head_dim" and value is None else value


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) < 60 else text[:57] + "..."

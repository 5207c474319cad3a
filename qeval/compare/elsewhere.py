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

from qeval.backends.base import Session
from qeval.backends.torch import TorchBackend
from qeval.compare.local import Place
from qeval.compare.variants import Entry, FitsKernel, Loaded
from qeval.compare.witness import has_tokenizer, notes_on, read_tokenizer, same_tokenizer, why_other
from qeval.errors import BrokenRecordError, UsageError
from qeval.formats import torchao
from qeval.formats.assemble import Reading, assemble, padding, unused
from qeval.formats.beside import Baseline
from qeval.formats.checkpoint import Tensors, opened, read_config, read_quantization
from qeval.formats.gguf import forms_of
from qeval.formats.registry import format_of
from qeval.identity import digest
from qeval.models.gguf import converted
from qeval.models.info import LoadedModel
from qeval.models.matrices import turned_in, weights_of
from qeval.models.quiet import quiet
from qeval.models.weights import listed, weights_sha256
from qeval.paths import home
from qeval.progress import Advance
from qeval.quant.grid import parse
from qeval.quant.variant import Variant
from qeval.store.locks import alone
from qeval.store.variants import Manifest, Origin, save_variant, verify_variant
from qeval.tasks.corpus import BosPolicy
from qeval.types import Request

FORMATS_VERSION = 2
"""Part of every key: raise it when the same file is read into other numbers."""

_DECIDES = (
    "model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "hidden_act", "rms_norm_eps", "layer_norm_eps", "rope_parameters",
    "partial_rotary_factor", "sliding_window", "final_logit_softcapping", "attn_logit_softcapping", "logits_scaling",
)  # fmt: skip
"""What of a configuration the numbers depend on: the baseline's is what computes."""
_PROBE_TOKENS = 16


@dataclass(frozen=True, eq=False)
class Made:
    """A checkpoint made elsewhere: what named it, where its tensors are, and how they are to be read."""

    place: Place
    folder: Path
    config: Mapping[str, Any]
    reading: Reading
    method: str
    title: str
    notes: tuple[str, ...]

    def error(self, reason: object) -> UsageError:
        """The error that names the flag: `--variant a=b: its ...`."""
        return UsageError(f"{self.place.flag}: {reason}")


def is_made_elsewhere(path: Path) -> bool:
    """Whether a path is a GGUF file or a checkpoint folder."""
    return path.suffix.lower() == ".gguf" or (path / "config.json").is_file()


def found(place: Place, baseline: Baseline) -> Made:
    """What lies at a place, of a format that is read.

    Raises:
        UsageError: no format reads it, its file is missing or torn, or a library is not installed.
    """
    path = place.path
    if path.suffix.lower() == ".gguf":
        return _gguf(place, baseline)
    config, quantized = read_config(path), read_quantization(path)
    if quantized is None:
        reading = Reading(None, {}, {})
        return Made(place, path, config, reading, "float", "floats", ("no quantization_config: taken as it is",))
    try:
        reads = format_of(quantized, str(path))
        notes = reads.notes(quantized)
    except UsageError as error:
        raise UsageError(f"{place.flag}: {error}") from error
    method = str(quantized["quant_method"])
    return Made(place, path, config, Reading(reads, quantized, {}), method, reads.title, notes)


def _gguf(place: Place, baseline: Baseline) -> Made:
    path = place.path
    if not path.is_file():
        raise UsageError(f"{place.flag}: the GGUF file does not exist.")
    forms = forms_of(path, baseline.parameters, len(baseline.description.layers))
    folder = converted(path)
    notes = ("dequantized by the gguf package and rounded to fp16",)
    return Made(place, folder, read_config(folder), Reading(None, {}, forms), "gguf", "GGUF", notes)


def baseline_of(loaded: LoadedModel, source: Loaded) -> Baseline:
    """What a checkpoint is laid beside."""
    parameters, turned = weights_of(loaded.model), turned_in(loaded.model)
    parameters.setdefault(source.description.head, source.head.weight)
    config = loaded.model.config.get_text_config()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Baseline(parameters, source.description, int(head_dim), f"{loaded.model.base_model_prefix}.", turned)


def check_config(made: Made, loaded: LoadedModel) -> None:
    """Refuse a checkpoint whose configuration computes something else than the baseline's.

    Raises:
        UsageError: it names the first setting that differs.
    """
    try:
        with quiet():
            text = {key: value for key, value in made.config.items() if key != "quantization_config"}
            theirs = AutoConfig.for_model(**text).get_text_config()
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise made.error(f"its config.json can't be used ({error}).") from error
    ours = loaded.model.config.get_text_config()
    for key in _DECIDES:
        mine, other = getattr(ours, key, None), getattr(theirs, key, None)
        if mine != other:
            raise made.error(
                f"its configuration has {key} {_short(other)} where the baseline has {_short(mine)}: it was made from "
                "another model."
            )


@dataclass(frozen=True, eq=False)
class Asked:
    """What both sides are asked: a run's texts, its BOS policy, the baseline's witness, another tokenizer's."""

    texts: Sequence[str]
    bos: BosPolicy
    ours: str
    theirs: Callable[[Any], str]


def check_tokens(made_by: str, folder: Path, ours: Any, asked: Asked) -> dict[str, str]:
    """Refuse a folder whose own tokenizer would ask it something else than the baseline; else what to tell of it.

    `made_by` is the flag that named the folder.

    Raises:
        UsageError: it says which token ids, or which BOS, differ.
    """
    if not has_tokenizer(folder):
        return {"tokenizer": "the folder holds none: it is asked the baseline's token ids"}
    theirs = read_tokenizer(folder)
    if not same_tokenizer(ours, theirs) and asked.theirs(theirs) != asked.ours:
        reason = why_other(ours, theirs, asked.texts, asked.bos) or "other token ids than the baseline for a question"
        raise UsageError(f"{made_by} has {reason}, so nothing of it could be compared.")
    return notes_on(ours, theirs)


def imported(
    places: Iterable[Place], loaded: LoadedModel, source: Loaded, backend: object, asked: Asked,
    fits: Sequence[FitsKernel],
) -> list[Entry]:  # fmt: skip
    """The checkpoints made elsewhere among --variant, as variants of qeval's.

    Raises:
        UsageError: one of them is of another model or tokenizer, is misread, or can't be read at all.
    """
    baseline = baseline_of(loaded, source)
    every = [found(place, baseline) for place in places]
    told = []
    for made in every:  # what takes no reading of weights first, of all of them
        check_config(made, loaded)
        told.append(check_tokens(made.place.flag, made.folder, loaded.tokenizer, asked))
    return [entry_of(made, baseline, source, backend, notes, fits) for made, notes in zip(every, told, strict=True)]


def entry_of(
    made: Made, baseline: Baseline, source: Loaded, backend: object, told: Mapping[str, str], fits: Sequence[FitsKernel]
) -> Entry:
    """The variant of a checkpoint, read unless the cache holds it, laid beside the baseline, and tried on a few tokens.

    `told`: what else a reader must know of it.

    Raises:
        UsageError: it can't be the baseline's, or is misread.
    """
    with opened(made.folder) as tensors:
        key = _key(made, tensors, source)
        folder = home() / "variants" / key
        with alone(f"variant-{key}"):
            manifest = _whole(folder) or _import(made, tensors, baseline, source, backend, folder)
    for weight in manifest.weights:
        for check in fits:
            check(weight.name, parse(weight.grid), weight.columns)
    return Entry(made.place.name, made.method, folder, told={"from": made.place.origin, **told})


def _key(made: Made, tensors: Tensors, source: Loaded) -> str:
    return digest(
        {
            "formats": FORMATS_VERSION,
            "weights": weights_sha256(tensors.entries),
            "quantization": json.loads(json.dumps(made.reading.config, default=str)),
            "forms": dict(made.reading.forms),
            "baseline": source.weights_sha256,
        }
    )


def _whole(folder: Path) -> Manifest | None:
    """The manifest of a variant that the cache holds whole."""
    if not folder.exists():
        return None
    try:
        return verify_variant(folder)
    except (BrokenRecordError, UsageError):
        return None  # it is read again, and replaces what was torn


def _import(
    made: Made, tensors: Tensors, baseline: Baseline, source: Loaded, backend: object, folder: Path
) -> Manifest:
    if any(parameter.is_meta for parameter in baseline.parameters.values()):
        raise made.error(
            "a checkpoint is laid beside the whole baseline first, which --stream does not hold; run once without "
            "--stream where memory holds both: the cache keeps what was read."
        )
    variant = _read(made, tensors, baseline, folder.name, lambda count: None)
    whole = replace(variant, details={**_details(made, tensors, baseline), **variant.details})
    if isinstance(backend, TorchBackend):
        with backend.open(whole) as session:
            check_answers(made, session)
    origin = Origin(
        recipe={"method": made.method, "importance": "none"},
        model={"name": source.name, "weights_sha256": source.weights_sha256},
        calibration=None,
        float_bits=source.float_bits,
        seconds=0.0,
    )
    save_variant(whole, folder, origin)
    return verify_variant(folder)


def _read(made: Made, tensors: Tensors, baseline: Baseline, key: str, advance: Advance) -> Variant:
    reading = made.reading._replace(config={**made.reading.config, torchao.HEADER: tensors.header})
    try:
        return assemble(tensors, reading, baseline, key, advance)
    except UsageError as error:
        raise made.error(error) from error


def _details(made: Made, tensors: Tensors, baseline: Baseline) -> dict[str, str]:
    told = {"made by": f"{made.title} ({'; '.join(made.notes)})" if made.notes else made.title}
    if extra := padding(tensors, baseline):
        told["padding"] = padding_told("embedding", extra)
    if names := unused(tensors, baseline):
        told["not used"] = listed(names)
    return told


def padding_told(what: str, extra: range) -> str:
    """That ids of a variant's own were left out."""
    return (
        f"its {what} has the ids {extra.start} to {extra.stop - 1} beyond the baseline's: left out, so that both are "
        "compared on the ids that they share"
    )


def check_answers(made: Made, session: Session) -> None:
    """Refuse a model whose logits are no numbers, or the same whatever it is asked.

    Raises:
        UsageError: it says which.
    """
    tokens = tuple((7919 * place) % session.vocab_size for place in range(1, _PROBE_TOKENS + 1))
    logits = session.logits(session.states([Request(tokens, tuple(range(_PROBE_TOKENS)))])[0]).float()
    if not torch.isfinite(logits).all():
        raise made.error("its logits are not finite.")
    if float(logits.std(dim=1).max()) == 0 or float((logits - logits[0]).abs().max()) == 0:
        raise made.error("its logits are constant: the same for every token, or at every position.")


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) < 60 else text[:57] + "..."

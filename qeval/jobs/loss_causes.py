"""Find what a recipe's loss comes from: each part's KL alone on calibration text, and statistics above thresholds.

A part is what a recipe rounds: its weights, the head, activations, keys, values. A finding needs both, a statistic that
shows why a part is hard to round and a share of the loss that makes it worth a treatment.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from qeval.backends.schemes import kv_changes, rounded_inputs
from qeval.config import Recipe
from qeval.metrics.tokens import mean_kl
from qeval.models.structure.forward import FinalStates, run_samples
from qeval.models.structure.graph import Group
from qeval.models.structure.kv_cache import KvChange, passing_cache
from qeval.models.structure.trace import text_config
from qeval.progress import Advance
from qeval.quant.grid import WeightGrid
from qeval.quant.rtn import quantize_rtn
from qeval.quant.scheme import TensorFormat, scheme_of
from qeval.quantize.ablation import Quantized, quantized_groups
from qeval.quantize.build import assign_grids, quantizable
from qeval.quantize.context import Source
from qeval.quantize.mix import effective_of
from qeval.quantize.patching import replace_values
from qeval.quantize.ranges import collect_ranges
from qeval.quantize.sensitivity import Passed, finite_kls, measured_states, sample_tokens
from qeval.quantize.smoothing import largest_inputs
from qeval.report.advice import Finding

CAUSE_SAMPLES = 4
"""Calibration sequences that parts are measured on, the first 256 tokens of each; groups alone are tried as mixes try
them, on fewer."""
LEAST_SHARE = 0.1
"""The share of the loss that a cause must bear on."""
ACTIVATION_RATIO = 10.0
"""The largest magnitude of one input channel over the median channel's; a scale that all share wastes so much of it."""
CACHE_RATIO = 4.0
"""The same of a layer's keys or values."""
SALIENT_SHARE = 0.2
"""The share of the layers' output error that 1 % of the input channels make."""
HEAD_SHARE = 1 / 3
"""The share of the loss that the head makes alone."""
GROUP_SHARE, GROUP_TIMES, GROUP_MOST = 0.25, 5.0, 0.6
"""The share of the groups' KLs that one group makes: so much, and so many times what each would make evenly, which is
asked of models with few groups up to the last."""
_SALIENT_CHANNELS = 0.01


@dataclass(frozen=True)
class LossCauses:
    """The KL in nats of each part alone, the findings with the largest share first, and the group of each."""

    parts: Mapping[str, float]
    findings: tuple[Finding, ...]
    groups: Mapping[str, Group]
    """By the kind of a finding, the group of linears that it is about."""
    positions: int


@torch.inference_mode()
def find_causes(source: Source, recipe: Recipe, advance: Advance) -> LossCauses:
    """Measure each part of a recipe alone on the first calibration samples, and look for what makes it hard to round.

    Args:
        source: The model, its calibration text, and the statistics of all layer inputs.
        recipe: What is made of it; its weights are rounded as `effective_of` does, to nearest where the method goes
            column after column.
        advance: Called with `trial_passes` in all, for the groups that are tried alone.

    Raises:
        QevalError: A KL is not finite.
    """
    view = _View(source, recipe, Passed.of(source.model, source.description, _ids(source)))
    weights = _Weights(view, advance)
    parts = {"weights": weights.joint} if weights.quantized else {}
    parts |= {"head": view.head_kl} if source.description.head in view.grids else {}
    parts |= {part: view.scheme_kl(part, how) for part, how in recipe.scheme.formats.items()}
    finite_kls(recipe.name, parts)
    total = sum(parts.values()) or 1.0
    shares = {part: max(kl, 0.0) / total for part, kl in parts.items()}
    findings = [*weights.findings(shares.get("weights", 0.0)), *_scheme_findings(view, shares)]
    if shares.get("head", 0.0) >= HEAD_SHARE:
        findings.append(_head_finding(view, shares["head"]))
    kept = sorted((each for each in findings if each.share >= LEAST_SHARE), key=lambda each: -each.share)
    groups = {"sensitive group": weights.worst} if weights.quantized else {}
    if recipe.activations:
        groups["activation outliers"] = view.loudest[0]
    return LossCauses(parts, tuple(kept), groups, len(view.passed.final))


def _ids(source: Source) -> Tensor:
    return sample_tokens(source.model, source.samples, CAUSE_SAMPLES)


@dataclass(frozen=True, eq=False)
class _View:
    """The float model over a few samples, and a recipe for it."""

    source: Source
    recipe: Recipe
    passed: Passed

    @cached_property
    def grids(self) -> Mapping[str, WeightGrid]:
        """The grid of every quantized weight; none where the recipe leaves them in float."""
        return assign_grids(self.source, self.recipe)[0]

    def kl(self, states: Tensor) -> float:
        """Return the mean KL of other final states from the float model's."""
        logits = self.source.head.logits
        return mean_kl(logits, self.passed.final, logits, states)

    @property
    def head_kl(self) -> float:
        """The KL with the head alone quantized, to nearest."""
        source, name = self.source, self.source.description.head
        states, floats = self.passed.final, source.head.logits(self.passed.final)
        weight = source.search.parameters[name]
        with replace_values({name: weight}, {name: quantize_rtn(weight.float(), self.grids[name]).dequantize()}):
            return mean_kl(lambda rows: rows, floats, source.head.logits, states)

    def scheme_kl(self, part: str, how: TensorFormat) -> float:
        """Return the KL with one part of the recipe's scheme alone: activations, keys or values."""
        source, scheme = self.source, scheme_of({part: str(how)})
        model, names = source.model, quantizable(source.description)
        ranges: Mapping[str, Tensor] = {}
        if scheme.is_static:
            ranges = collect_ranges(model, names, scheme, partial(run_samples, model, source.samples, lambda _: None))
        changes = kv_changes(model, scheme, ranges, model.device)
        cache = passing_cache(changes) if changes else None
        inputs = dict.fromkeys(names, how) if part == "activations" else {}
        with rounded_inputs(model, inputs, ranges, model.device):
            return self.kl(measured_states(FinalStates(model)(self.passed.ids, cache)))

    @cached_property
    def loudest(self) -> tuple[Group, float]:
        """The group whose input has the largest outlier: its largest channel over the median one."""
        source = self.source
        largest = largest_inputs(source.model, source.description.groups, source.samples[:CAUSE_SAMPLES])
        seen = [(group, _over_median(largest[group.names[0]])) for group in source.description.groups
                if group.names[0] in largest]  # fmt: skip
        return max(seen, key=lambda each: each[1])


class _Weights:
    """The groups of linears, each quantized alone and all together."""

    def __init__(self, view: _View, advance: Advance) -> None:
        source = view.source
        self._view, self._groups = view, {group.names[0]: group for group in source.description.groups}
        grids = {name: grid for name, grid in view.grids.items() if name != source.description.head}
        self.quantized: Quantized = {}
        self._alone: dict[Group, float] = {}
        if grids:
            effective = effective_of(source, view.recipe, grids)
            alone = finite_kls(view.recipe.name, source.trials.measure(effective, advance))
            self.quantized = quantized_groups(source.description, effective, lambda _: None)
            self._alone = {group: max(alone[group.names[0]], 0.0) for group in self.quantized}

    @cached_property
    def joint(self) -> float:
        """The KL with all groups quantized."""
        every = {name: value for values in self.quantized.values() for name, value in values.items()}
        passed = self._view.passed
        with replace_values(passed.parameters, every):
            return self._view.kl(measured_states(FinalStates(passed.model)(passed.ids)))

    @property
    def worst(self) -> Group:
        """The group that costs most alone."""
        return max(self._alone, key=self._alone.__getitem__)

    def findings(self, share: float) -> list[Finding]:
        """Return what the weights' own statistics show; `share`: of the loss that is the weights'."""
        total = sum(self._alone.values())
        if not total:
            return []
        findings, method = [], self._view.recipe.quant_method
        salient = {group: self._salient(group, values) for group, values in self.quantized.items()}
        by_loss = sum(salient[group] * kl for group, kl in self._alone.items()) / total
        if by_loss >= SALIENT_SHARE and not method.scales_inputs and method.rounding == "nearest":
            top = max(self._alone, key=lambda group: salient[group] * self._alone[group])
            what = "share of the layers' output error in 1 % of their input channels"
            findings.append(_finding("salient columns", f"most in {_place(top)}", what, by_loss, SALIENT_SHARE, share))

        worst, least = self.worst, max(GROUP_SHARE, min(GROUP_TIMES / len(self._alone), GROUP_MOST))
        part = self._alone[worst] / total
        if part >= least:
            # what a few of its columns make is the finding above
            rest = part * (1 - salient[worst]) if findings else part
            what = "share of the groups' KLs, each alone"
            findings.append(
                Finding(
                    kind="sensitive group", where=_place(worst), statistic=what, value=part, threshold=least,
                    share=share * rest,
                )
            )  # fmt: skip
        return findings

    def _salient(self, unit: Group, values: Mapping[str, Tensor]) -> float:
        """Return the share of a unit's output error that 1 % of its input channels (one at least) make."""
        search, top, total = self._view.source.search, 0.0, 0.0
        for first in (name for name in unit.names if name in self._groups and name in search.statistics):
            moments = search.statistics[first].sketch.float().square().sum(0)
            changed = [name for name in self._groups[first].names if name in values]
            lost = [(values[name].float() - search.parameters[name].float()).square().sum(0) for name in changed]
            if lost:
                errors = torch.stack(lost).sum(0) * moments
                count = max(1, int(_SALIENT_CHANNELS * len(errors)))
                top, total = top + float(errors.topk(count).values.sum()), total + float(errors.sum())
        return top / total if total else 0.0


def _scheme_findings(view: _View, shares: Mapping[str, float]) -> list[Finding]:
    """Return the outliers of what is rounded beside the weights."""
    findings, scheme = [], view.recipe.scheme
    if scheme.activations:
        group, ratio = view.loudest
        if ratio >= ACTIVATION_RATIO:
            what = "largest input channel over the median one"
            findings.append(
                Finding(
                    kind="activation outliers", where=_place(group), statistic=what, value=ratio,
                    threshold=ACTIVATION_RATIO, share=shares["activations"],
                )
            )  # fmt: skip
    ratios = _cache_ratios(view.source.model, view.passed.ids) if scheme.caches else {}
    for part, kind in (("keys", "key outliers"), ("values", "value outliers")):
        how: TensorFormat | None = getattr(scheme, part)
        if how is None or how.hadamard or how.span == "channel":
            continue  # treated already
        layer, ratio = max(enumerate(ratios[part]), key=lambda each: each[1])
        if ratio >= CACHE_RATIO:
            findings.append(
                Finding.model_validate(
                    {
                        "kind": kind, "where": f"layer {layer}", "value": ratio, "threshold": CACHE_RATIO,
                        "statistic": f"largest channel of the {part} over the median one", "share": shares[part],
                    }
                )
            )  # fmt: skip
    return findings


def _cache_ratios(model: Any, ids: Tensor) -> dict[str, list[float]]:
    """Return the largest channel of each layer's keys and values over the median one."""
    ratios: dict[str, list[float]] = {"keys": [], "values": []}

    def look(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        for part, heads in (("keys", keys), ("values", values)):
            ratios[part].append(_over_median(heads.float().abs().amax((0, 2)).flatten()))
        return keys, values

    changes: Sequence[KvChange] = [look] * int(text_config(model).num_hidden_layers)
    FinalStates(model)(ids, passing_cache(changes))
    return ratios


def _head_finding(view: _View, share: float) -> Finding:
    return Finding(
        kind="sensitive head", where=f"the head on {view.grids[view.source.description.head]}",
        statistic="share of the loss", value=share, threshold=HEAD_SHARE, share=share,
    )  # fmt: skip


def _finding(kind: Any, where: str, statistic: str, value: float, threshold: float, share: float) -> Finding:
    """Return a finding whose statistic is itself a share of the part's loss."""
    return Finding(kind=kind, where=where, statistic=statistic, value=value, threshold=threshold, share=share * value)


def _over_median(channels: Tensor) -> float:
    """Return the largest of [channels] magnitudes over the median one; of channels that are never used, 0."""
    median = float(channels.median())
    return float(channels.max()) / median if median else 0.0


def _place(group: Group) -> str:
    return f"layer {group.layer} {group.kind}"

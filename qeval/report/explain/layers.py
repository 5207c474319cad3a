"""Spread the damage over layers, from the sensitivities that a mixed variant was made by."""

from collections.abc import Sequence

from qeval.report.explain.model import LayerLoss, LayersLoss
from qeval.store.run import GroupRecord

_LOW_BITS = 4


def layers_loss(groups: Sequence[GroupRecord], mean_kl_nats: float | None) -> LayersLoss | None:
    """Return every layer's share of the summed KL of groups quantized alone, the largest first; None without any.

    Each group counts at the width that it was given. `mean_kl_nats` is the whole variant's, where measured.
    """
    alone = [(group, _at_its_width(group, groups)) for group in groups]
    total = sum(kl for _, kl in alone if kl is not None)
    if not total:
        return None
    layers = sorted({group.layer for group in groups})
    losses = [_layer(layer, [(g, kl) for g, kl in alone if g.layer == layer], total) for layer in layers]
    return LayersLoss(
        sum_kl_nats=total,
        additivity=None if not mean_kl_nats else total / mean_kl_nats,
        unmeasured=sum(kl is None for _, kl in alone),
        layers=sorted(losses, key=lambda layer: -layer.share),
    )


def _layer(layer: int, groups: Sequence[tuple[GroupRecord, float | None]], total: float) -> LayerLoss:
    layer_kl = sum(kl for _, kl in groups if kl is not None)
    kinds = {group.kind: None if kl is None else kl / total for group, kl in groups}
    return LayerLoss(layer=layer, share=layer_kl / total, kl_nats=layer_kl, kinds=kinds)


def _at_its_width(group: GroupRecord, groups: Sequence[GroupRecord]) -> float | None:
    """Return the KL of the group alone at its width; of one width for all, more than four bits is the high one.

    In a mix of formats it is that of its format; what is left in float loses nothing.
    """
    if group.format is not None:
        return group.kls.get(group.format, 0.0) if group.kls else None
    widths = {each.bits for each in groups}
    high = group.bits == max(widths) if len(widths) > 1 else group.bits > _LOW_BITS
    return group.kl_high if high else group.kl_low

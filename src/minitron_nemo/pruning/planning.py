"""From scores and a target shape to a plan: the highest scores of each axis stay.

Width is ranked as `ranking` says. Depth goes by the kept layers a person names, or by scores of layers: the lowest ones
are dropped one by one (arXiv:2407.14679), or the contiguous block whose removal hurts least (arXiv:2408.11796), or
the first of an order made by dropping one after another (arXiv:2508.14444).
Nothing here communicates.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from minitron_nemo.checks import require
from minitron_nemo.config.pruning import DepthChoice, SurgeryConfig
from minitron_nemo.plan import PruningPlan, axes_of, require_prunable
from minitron_nemo.pruning.basis import norm_scales, principal_basis, stream_moments
from minitron_nemo.pruning.ranking import head_partners, top_heads, top_k
from minitron_nemo.scores import GREEDY, Importance, expected_sizes
from minitron_nemo.shape import DIM_OF_AXIS, ModelShape

logger = logging.getLogger(__name__)

_RANKED = {"ffn", "expert", "expert_ffn", "shared_expert_ffn"}
"""Axes ranked row by row, each for itself."""


def plan_from_importance(
    importance: Importance,
    source: ModelShape,
    target: ModelShape,
    *,
    batch_aggregation: str = "l2",
    sequence_aggregation: str = "mean",
    layers: Sequence[int] | None = None,
    depth: DepthChoice | None = None,
    merge_heads: bool = False,
    surgery: SurgeryConfig | None = None,
    basis: Callable[..., Tensor] = principal_basis,
) -> PruningPlan:
    """The plan that keeps the highest scores; the default aggregations are the paper's.

    Args:
        importance: scores of a model of shape `source`.
        layers, depth: see `kept_layers`.
        merge_heads: merge dropped heads into kept ones of their group, see `ranking.head_partners`.
        surgery, basis: how the residual stream is cut; None: the paper's way; and who makes its principal axes.
    Raises: ValueError: scores of another model, a target that does not fit, or depth without a way to choose it.
    """
    require_same_model(importance, source)
    require_prunable(source, target)

    def scores(axis: str) -> Tensor:
        """An axis that stays whole needs no scores."""
        if getattr(source, DIM_OF_AXIS[axis]) == getattr(target, DIM_OF_AXIS[axis]):
            return torch.zeros(expected_sizes(source)[axis])
        return importance.scores(axis, batch_aggregation, sequence_aggregation)

    surgery = surgery or SurgeryConfig()
    if surgery.turns and target.hidden_size < source.hidden_size:
        stream, _ = stream_moments(importance)
        keeps_mean = source.normalization != "RMSNorm"
        hidden = basis(stream, target.hidden_size, keeps_mean=keeps_mean)
    else:
        hidden = top_k(scores("hidden"), target.hidden_size)
    group = top_k(scores("group"), target.num_query_groups)
    heads = {"heads_per_group": source.heads_per_group, "keep_per_group": target.heads_per_group}
    merges = merge_heads and target.heads_per_group < source.heads_per_group
    return PruningPlan(
        source=source,
        target=target,
        hidden=hidden,
        head=top_heads(scores("head"), group, **heads),
        group=group,
        layer=torch.tensor(kept_layers(importance, source, target.num_layers, layers=layers, depth=depth)),
        head_partner=head_partners(scores("head"), group, **heads) if merges else None,
        norm_scale=norm_scales(surgery.scales_norms_by, hidden, importance, source),
        origin={
            **importance.origin,
            "num_samples": importance.num_samples,
            "batch_aggregation": batch_aggregation,
            "sequence_aggregation": sequence_aggregation,
            "depth": "explicit" if layers is not None else depth.metric if depth else None,
            "surgery": surgery.describe(),
        },
        **_rows(scores, importance, source, target),
    )


def _rows(
    scores: Callable[[str], Tensor], importance: Importance, source: ModelShape, target: ModelShape
) -> dict[str, Tensor]:
    """What stays of the axes that are ranked row by row."""
    axes = _RANKED & set(axes_of(source))
    kept = {axis: top_k(scores(axis), getattr(target, DIM_OF_AXIS[axis])) for axis in axes}
    _say_what_was_never_reached(importance, kept, source, target)
    return kept


def _say_what_was_never_reached(
    importance: Importance, kept: dict[str, Tensor], source: ModelShape, target: ModelShape
) -> None:
    """Experts that stay, or whose neurons do, by their numbers alone: no calibration token was routed to them."""
    reached = importance.tokens_of_experts()
    dims = ("num_moe_experts", "moe_ffn_hidden_size")
    if reached is None or all(getattr(source, dim) == getattr(target, dim) for dim in dims):
        return
    layers = [layer for layer in range(source.num_layers) if source.has_experts(layer)]
    unreached = {layer: [e for e in kept["expert"][layer].tolist() if reached[layer, e] == 0] for layer in layers}
    unreached = {layer: experts for layer, experts in unreached.items() if experts}
    if unreached:
        seen = reached[layers][reached[layers] > 0]
        logger.warning(
            "%s experts that stay were reached by none of the tokens of %s calibration samples, and are ranked by "
            "their number alone (layers %s). The rarest of the others saw %s tokens, the median %s. Estimate "
            "importance with several times as many samples (estimate_importance.importance.num_samples).",
            sum(map(len, unreached.values())),
            importance.num_samples,
            ", ".join(f"{layer}: {', '.join(map(str, experts))}" for layer, experts in list(unreached.items())[:4])
            + (", ..." if len(unreached) > 4 else ""),
            f"{int(seen.min()):,}" if len(seen) else 0,
            f"{int(seen.median()):,}" if len(seen) else 0,
        )


def kept_layers(
    importance: Importance | None,
    source: ModelShape,
    keep: int,
    *,
    layers: Sequence[int] | None = None,
    depth: DepthChoice | None = None,
) -> list[int]:
    """Source layers that stay, from 0, ascending.

    Args:
        importance: needed where `depth` decides.
        keep: how many stay.
        layers: the kept layers, in any order; decides where given.
        depth: how to choose them otherwise.
    Raises: ValueError: a number that does not fit, or nothing says which layers go.
    """
    have = source.num_layers
    if layers is not None:
        require(
            len(layers) == keep,
            f"layers={list(layers)} keeps {len(layers)} layers, but target.num_layers={keep}. "
            f"Set target.num_layers={len(layers)} or name {keep} layers.",
        )
        return sorted(layers)
    if keep == have:
        return list(range(have))
    require(
        depth is not None and depth.metric is not None and importance is not None,
        f"target.num_layers={keep} of {have} drops layers, but nothing says which. Give the kept layers (`layers`, "
        f"from 0 to {have - 1}) or the metric of layer scores to go by (`depth.metric`), or set "
        f"target.num_layers={have}.",
    )
    assert depth is not None and depth.metric is not None and importance is not None
    drop, first, end = have - keep, depth.keep_first, have - depth.keep_last
    require(
        drop <= end - first,
        f"target.num_layers={keep} drops {drop} of {have} layers, but depth.keep_first={depth.keep_first} and "
        f"depth.keep_last={depth.keep_last} leave only {max(0, end - first)} to drop. Lower one of them, or keep more "
        "layers.",
    )
    if depth.metric == GREEDY:
        dropped = _first_dropped(importance.layer_scores(GREEDY), drop, depth)
    elif depth.contiguous:
        scores = importance.block_scores(depth.metric, drop)[first : end - drop + 1]
        start = first + int(top_k(-scores, 1))
        dropped = set(range(start, start + drop))
    else:
        scores = importance.layer_scores(depth.metric)[first:end]
        dropped = {first + index for index in top_k(-scores, drop).tolist()}
    return [layer for layer in range(have) if layer not in dropped]


def _first_dropped(places: Tensor, drop: int, depth: DepthChoice) -> set[int]:
    """The first `drop` layers of an order of dropping, given by each layer's place in it.

    Raises: ValueError: fewer were ordered, or the order holds layers that `depth` protects.
    """
    have, ordered = len(places), int((places < places.max()).sum())
    require(
        not depth.contiguous,
        "depth.contiguous=true drops a block of neighbouring layers, and depth.metric=greedy orders single ones. Set "
        "depth.contiguous=false, or go by a metric of blocks, such as depth.metric=loss.",
    )
    require(
        drop <= ordered,
        f"target.num_layers={have - drop} drops {drop} of {have} layers, but the greedy order holds only {ordered}. "
        f"Keep at least {have - ordered} layers, or estimate importance with depth.greedy.drop={drop}.",
    )
    dropped = {int(layer) for layer in places.argsort()[:drop]}
    protected = sorted(layer for layer in dropped if not depth.keep_first <= layer < have - depth.keep_last)
    require(
        not protected,
        f"The greedy order drops layers {protected}, which depth.keep_first={depth.keep_first} and depth.keep_last="
        f"{depth.keep_last} protect. Estimate importance with depth.greedy.keep_first={depth.keep_first} and "
        f"depth.greedy.keep_last={depth.keep_last}, or lower them.",
    )
    return dropped


def require_same_model(importance: Importance, source: ModelShape) -> None:
    """ValueError unless the scores are of a model of this shape."""
    measured, have = importance.shape.to_dict(), source.to_dict()
    different = [key for key in have if measured[key] != have[key]]
    require(
        not different,
        "The importance is of another model: "
        + ", ".join(f"{key}={measured[key]} there, {have[key]} in the model to prune" for key in different)
        + ". Estimate importance on this model, or name the model it was estimated on.",
    )

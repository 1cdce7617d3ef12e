"""Scores and plans for tests, without a model."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from minitron_nemo.plan import PruningPlan
from minitron_nemo.pruning import plan_from_importance
from minitron_nemo.pruning.basis import principal_basis
from minitron_nemo.scores import Importance, moment_sizes
from minitron_nemo.shape import ModelShape

from .megatron import TINY

SMALLER = {"hidden_size": 14, "ffn_hidden_size": 18, "num_attention_heads": 4}


def random_scores(shape: ModelShape = TINY, seed: int = 3) -> Importance:
    """Positive scores, other ones for every axis and aggregation, and two depth metrics."""
    generator = torch.Generator().manual_seed(seed)
    moments = {}
    for axis, sizes in moment_sizes(shape).items():
        mean, spread = torch.rand(sizes[0], generator=generator, dtype=torch.float64).unbind(-3)
        moments[axis] = torch.stack([mean, mean.square() + spread], dim=-3)
    depth = {metric: {1: torch.rand(shape.num_layers, generator=generator)} for metric in ("block_influence", "loss")}
    return Importance(shape, moments, num_samples=8, depth=depth, origin={"metric": "activations", "data": "text"})


def random_plan(source: ModelShape = TINY, seed: int = 3, **target: Any) -> PruningPlan:
    """Kept layers of a smaller depth are the first and the last ones."""
    target_shape = source.pruned_to(**(target or SMALLER))
    keep, have = target_shape.num_layers, source.num_layers
    layers = [*range(keep - 1), have - 1]
    return plan_from_importance(random_scores(source, seed), source, target_shape, layers=layers)


def any_plan(source: ModelShape, **target: int) -> PruningPlan:
    """Random kept indices, other ones in every layer; an axis that stays whole keeps all."""
    generator = torch.Generator().manual_seed(5)

    def some(have: int, keep: int) -> Tensor:
        return torch.randperm(have, generator=generator)[:keep].sort().values

    layer = some(source.num_layers, target.get("num_layers", source.num_layers))
    shape = source.keeping_layers(layer.tolist()).pruned_to(**target)
    layers, per_group = range(source.num_layers), source.heads_per_group
    group = torch.stack([some(source.num_query_groups, shape.num_query_groups) for _ in layers])
    axes: dict[str, Tensor] = {}
    if source.has_dense_layers:
        axes["ffn"] = torch.stack([some(source.ffn_hidden_size, shape.ffn_hidden_size) for _ in layers])
    if source.num_moe_experts is not None:
        experts, neurons = range(source.num_moe_experts), (source.moe_ffn_hidden_size, shape.moe_ffn_hidden_size)
        axes["expert"] = torch.stack([some(source.num_moe_experts, shape.num_moe_experts) for _ in layers])
        axes["expert_ffn"] = torch.stack([torch.stack([some(*neurons) for _ in experts]) for _ in layers])
    return PruningPlan(
        source=source,
        target=shape,
        hidden=some(source.hidden_size, shape.hidden_size),
        head=torch.stack(
            [torch.cat([g * per_group + some(per_group, shape.heads_per_group) for g in row]) for row in group]
        ),
        group=group,
        layer=layer,
        **axes,
    )


def turned(plan: PruningPlan) -> PruningPlan:
    """The same with a random basis of the stream, its norms scaled and its embeddings parted."""
    source, keep = plan.source, plan.target.hidden_size
    rows = torch.randn(2 * source.hidden_size, source.hidden_size, generator=torch.Generator().manual_seed(6))
    return dataclasses.replace(
        plan,
        hidden=principal_basis(rows.t() @ rows, keep, keeps_mean=source.normalization != "RMSNorm"),
        norm_scale=torch.linspace(0.5, 1.5, 2 * source.num_layers + 1),
        target=dataclasses.replace(plan.target, share_embeddings_and_output_weights=False),
    )

"""Scores and plans for tests, without a model."""

from __future__ import annotations

from typing import Any

import torch

from minitron_nemo.plan import PruningPlan
from minitron_nemo.pruning import plan_from_importance
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

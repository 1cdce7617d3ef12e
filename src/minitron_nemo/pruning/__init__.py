"""Pruning: scores to plan, plan to weights."""

from minitron_nemo.pruning.planning import kept_layers, plan_from_importance
from minitron_nemo.pruning.surgery import prune_into, pruned_parameters

__all__ = ["kept_layers", "plan_from_importance", "prune_into", "pruned_parameters"]

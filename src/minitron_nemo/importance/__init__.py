"""Importance: activations in, one score per named axis out."""

from minitron_nemo.importance.estimate import ImportanceEstimator

__all__ = ["ImportanceEstimator"]

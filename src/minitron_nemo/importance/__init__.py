"""Importance: activations in, one score per named axis out."""

from minitron_nemo.config.importance import ImportanceConfig
from minitron_nemo.importance.estimate import ImportanceEstimator
from minitron_nemo.importance.scores import WIDTH_AXES, Importance
from minitron_nemo.importance.statistics import Aggregation

__all__ = ["WIDTH_AXES", "Aggregation", "Importance", "ImportanceConfig", "ImportanceEstimator"]

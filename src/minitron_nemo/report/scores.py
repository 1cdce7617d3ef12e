"""Importance and plan as the pictures need them: NumPy arrays per axis, and how well the plan follows the scores.

    scores["ffn"]   [l, f]    scores["head"]  [l, n]    scores["hidden"]  [h]    of experts [l, e], [l, e, f]   float64
    kept["ffn"]     [l, k]    kept["head"]    [l, k]    kept["hidden"]    [k]    kept["layer"] [k]    int64, global
    depth["kl"][n]  [l-n+1]   by metric and block size n                                                      float64

Rows of dropped layers stay, in scores and in plan.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from minitron_nemo.plan import DESCRIPTION as PLAN
from minitron_nemo.plan import PruningPlan, axes_of
from minitron_nemo.report.run import IMPORTANCE, Run
from minitron_nemo.scores import Importance
from minitron_nemo.shape import DIM_OF_AXIS, ModelShape

BASELINES = ("weight_magnitude", "random")

Scores = Mapping[str, npt.NDArray[np.float64]]
Kept = Mapping[str, npt.NDArray[np.int64]]


def kept_mask(kept: npt.NDArray[np.int64], size: int) -> npt.NDArray[np.bool_]:
    """True where kept: [size] for one axis of the whole model, [l, size] for an axis of every layer."""
    rows = np.atleast_2d(kept)
    mask = np.zeros((rows.shape[0], size), dtype=bool)
    np.put_along_axis(mask, rows, True, axis=1)
    return mask if kept.ndim == 2 else mask[0]


def share_kept_from_top(scores: npt.NDArray[np.float64], kept: npt.NDArray[np.int64]) -> float:
    """Of the kept indices, the share whose score is among the k highest of their row; 1 where the plan is top-k."""
    k = kept.shape[-1]
    score_rows, kept_rows = scores.reshape(-1, scores.shape[-1]), kept.reshape(-1, k)
    if k == 0:
        return 1.0
    lowest_top = -np.sort(-score_rows, axis=1)[:, k - 1 : k]  # [l, 1]; ties with it count as top
    return float(np.mean(np.take_along_axis(score_rows, kept_rows, axis=1) >= lowest_top))


def counts(kept: Kept, sizes: Mapping[str, int]) -> list[dict[str, Any]]:
    """Per axis of the plan: how many there were, are kept and dropped; `each` says of what (empty: of the model)."""
    rows = []
    for axis in DIM_OF_AXIS:
        if axis in kept and axis in sizes:
            of, k = sizes[axis], int(kept[axis].shape[-1])
            each = ("", "layer", "expert")[kept[axis].ndim - 1]
            rows.append({"axis": axis, "each": each, "of": of, "kept": k, "dropped": of - k})
    return rows


@dataclass(frozen=True)
class Pruning:
    """Scores and plan of a run; empty where the run has none."""

    scores: Scores
    kept: Kept
    depth: Mapping[str, Mapping[int, npt.NDArray[np.float64]]] = field(default_factory=dict)
    aggregations: tuple[str, str] = ("l2", "mean")
    """Over samples and along the sequence, of `scores`; those the plan used."""
    origin: str = ""
    """Where the scores came from, in words."""
    source: ModelShape | None = None
    target: ModelShape | None = None

    @property
    def sizes(self) -> dict[str, int]:
        """Size of each axis before pruning, as far as known."""
        if self.source is not None:
            return {axis: getattr(self.source, DIM_OF_AXIS[axis]) for axis in axes_of(self.source)}
        return {axis: array.shape[-1] for axis, array in self.scores.items()}

    @classmethod
    def read(cls, run: Run) -> Pruning:
        """Plan and importance of the run as it chooses them, the scores aggregated as the plan did."""
        plan = None
        if run.pruned is not None and (run.artifacts[run.pruned].path / PLAN).is_file():
            plan = PruningPlan.load(run.artifacts[run.pruned].path)
        importance = Importance.load(run.artifacts[run.importance].path) if run.importance is not None else None
        how = plan.origin if plan is not None else {}
        batch, sequence = str(how.get("batch_aggregation", "l2")), str(how.get("sequence_aggregation", "mean"))
        scores: dict[str, npt.NDArray[np.float64]] = {}
        depth: dict[str, dict[int, npt.NDArray[np.float64]]] = {}
        origin = ""
        if importance is not None:
            scores = {axis: importance.scores(axis, batch, sequence).double().numpy() for axis in importance.axes}
            depth = {
                metric: {size: values.double().numpy() for size, values in blocks.items()}
                for metric, blocks in importance.depth.items()
            }
            metric = importance.origin.get("metric", "activations")
            samples = f"{importance.num_samples:,} calibration samples"
            origin = f"{metric}, {batch} over {samples} of the {sequence} over a sample's tokens"
            if metric in BASELINES:
                origin = f"{metric}, a baseline that reads no samples"
        return cls(
            scores=scores,
            kept=_kept(plan) if plan is not None else {},
            depth=depth,
            aggregations=(batch, sequence),
            origin=origin,
            source=plan.source if plan is not None else importance.shape if importance is not None else None,
            target=plan.target if plan is not None else None,
        )


def importances(run: Run) -> dict[str, Importance]:
    """Importance artifacts of the run, by name."""
    return {name: Importance.load(run.artifacts[name].path) for name in run.lineage.made_by(IMPORTANCE)}


def _kept(plan: PruningPlan) -> Kept:
    """Kept indices of the axes the model has; a basis keeps none."""
    axes = [axis for axis in axes_of(plan.source) if not (axis == "hidden" and plan.has_basis)]
    return {axis: getattr(plan, axis).numpy() for axis in axes}

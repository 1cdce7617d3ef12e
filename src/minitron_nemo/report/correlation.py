"""Do two metrics rank alike? Spearman's correlation of their scores, inside each row that pruning ranks by itself.

    scores   of m metrics       [m, ..., c]    one ranking of c units per row (a layer, an expert; hidden has one row)
    ranks    ties share a rank  [m, ..., c]    float64, from 0
    table    mean over rows     [m, m]         1 same order, 0 unrelated, -1 opposite order; NaN where one says nothing

A row in which a metric gives every unit the same score has no order, and is left out of that metric's means.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minitron_nemo.aggregation import Aggregation
from minitron_nemo.scores import Importance

AGGREGATIONS = [(batch.value, sequence.value) for batch in Aggregation for sequence in Aggregation]


@dataclass(frozen=True)
class Agreement:
    """Correlations of what is compared: aggregations, depth metrics or importance artifacts."""

    title: str
    labels: list[str]
    table: Tensor
    """[m, m] float64"""


def ranks(scores: Tensor) -> Tensor:
    """Place of each value among its row's, from 0 upwards; equal values share the mean of their places.

    Args:
        scores: [..., c].
    Returns: [..., c] float64.
    """
    ordered = scores.sort(dim=-1).values
    below = torch.searchsorted(ordered, scores.contiguous(), right=False)
    not_above = torch.searchsorted(ordered, scores.contiguous(), right=True)
    return (below + not_above - 1).double() / 2


def spearman(scores: Tensor) -> Tensor:
    """Rank correlation of every pair of metrics, mean over the rows in which both have an order.

    Args:
        scores: [m, ..., c].
    Returns: [m, m] float64, NaN where there is no such row.
    """
    layers = scores.unbind(1) if scores.dim() > 2 else [scores]  # one at a time: experts have many neurons
    tables = []
    for layer in layers:
        places = ranks(layer)
        centred = places - places.mean(-1, keepdim=True)
        directions = centred / centred.norm(dim=-1, keepdim=True)  # NaN where all are equal
        of_rows = torch.einsum("a...c,b...c->...ab", directions, directions)
        tables.append(of_rows.reshape(-1, len(scores), len(scores)))
    return torch.cat(tables).nanmean(0).clamp(-1, 1)


def between_aggregations(importance: Importance) -> list[Agreement]:
    """Of each width axis, the nine ways to make scores of its activations (fewer where some order nothing)."""
    found = []
    for axis in importance.axes:
        scores = torch.stack([importance.scores(axis, *pair) for pair in AGGREGATIONS])
        labels = [f"{batch} / {sequence}" for batch, sequence in AGGREGATIONS]
        found += _agreement(axis, labels, scores)
    return found


def between_depth_metrics(importance: Importance) -> list[Agreement]:
    """The metrics that scored single layers."""
    single = [metric for metric, blocks in importance.depth.items() if 1 in blocks]
    if not single:
        return []
    return _agreement("layer", single, torch.stack([importance.layer_scores(metric) for metric in single]))


def between_artifacts(artifacts: Mapping[str, Importance], batch: str, sequence: str) -> list[Agreement]:
    """Of each axis, and each depth metric of single layers, several artifacts of models of one shape.

    Args:
        artifacts: by name.
        batch, sequence: the aggregation of the width scores that are compared.
    """
    names, found = list(artifacts), []
    runs = list(artifacts.values())
    for axis in runs[0].axes:
        if all(axis in run.axes for run in runs):
            found += _agreement(axis, names, torch.stack([run.scores(axis, batch, sequence) for run in runs]))
    for metric in dict.fromkeys(metric for run in runs for metric in run.depth):
        having = [name for name in names if 1 in artifacts[name].depth.get(metric, {})]
        if len(having) > 1:
            scores = torch.stack([artifacts[name].layer_scores(metric) for name in having])
            found += _agreement(f"layer, {metric}", having, scores)
    return found


def _agreement(title: str, labels: Sequence[str], scores: Tensor) -> list[Agreement]:
    """One table without the metrics that order nothing; none where fewer than two are left."""
    table = spearman(scores)
    having = (~table.diagonal().isnan()).nonzero().flatten()
    if len(having) < 2:
        return []
    return [Agreement(title, [labels[index] for index in having.tolist()], table[having][:, having])]

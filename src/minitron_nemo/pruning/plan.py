"""The pruning plan: which indices of each named axis the student keeps.

    hidden  [k]       channels of the residual stream, the same everywhere
    ffn     [l, k]    neurons,     one row per source layer
    head    [l, k]    query heads, one row per source layer
    group   [l, k]    key-value groups, one row per source layer
    layer   [k]       layers

int64, global, ascending. Rows of dropped layers stay, so that width and depth can be edited apart. The plan is the
whole truth about a pruning: the teacher is never permuted, and the same plan prunes any layout of it.

On disk: `plan.json` (shapes, kept layers, where scores came from) beside `plan.safetensors` (the other indices).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from minitron_nemo.checks import require
from minitron_nemo.importance import Importance
from minitron_nemo.pruning.ranking import top_heads, top_k
from minitron_nemo.shape import PRUNABLE_DIMS, ModelShape

DIM_OF_AXIS = {
    "hidden": "hidden_size",
    "ffn": "ffn_hidden_size",
    "head": "num_attention_heads",
    "group": "num_query_groups",
    "layer": "num_layers",
}
PER_LAYER = ("ffn", "head", "group")
INDICES, DESCRIPTION = "plan.safetensors", "plan.json"


@dataclass(frozen=True)
class PruningPlan:
    """Kept indices per named axis, from `source` to `target`."""

    source: ModelShape
    target: ModelShape
    hidden: Tensor
    ffn: Tensor
    head: Tensor
    group: Tensor
    layer: Tensor
    origin: Mapping[str, Any] = field(default_factory=dict)
    """Where the scores came from; plain JSON values."""

    def __post_init__(self) -> None:
        require_prunable(self.source, self.target)
        for axis in DIM_OF_AXIS:
            self._check_axis(axis)
        per_group = self.source.heads_per_group
        for layer in range(self.source.num_layers):
            expected = self.group[layer].repeat_interleave(self.target.heads_per_group)
            require(
                torch.equal(self.head[layer] // per_group, expected),
                f"plan.head of layer {layer} keeps heads {self.head[layer].tolist()}, but its kept groups "
                f"{self.group[layer].tolist()} need {self.target.heads_per_group} heads each (source groups have "
                f"{per_group}). Keep equally many heads of every kept group.",
            )

    def _check_axis(self, axis: str) -> None:
        indices, dim = getattr(self, axis), DIM_OF_AXIS[axis]
        have, keep = getattr(self.source, dim), getattr(self.target, dim)
        size = (self.source.num_layers, keep) if axis in PER_LAYER else (keep,)
        require(
            indices.dtype == torch.int64 and tuple(indices.shape) == size,
            f"plan.{axis} has shape {list(indices.shape)} ({indices.dtype}), but {dim}={keep} needs {list(size)} "
            "(int64). Make the plan again for this target.",
        )
        outside = indices[(indices < 0) | (indices >= have)]
        require(
            outside.numel() == 0,
            f"plan.{axis} keeps index {_some(outside)}, outside 0 to {have - 1} ({dim}={have} in the "
            f"source). Correct plan.{axis}.",
        )
        misplaced = indices[..., 1:][indices.diff(dim=-1) <= 0]
        require(
            misplaced.numel() == 0,
            f"plan.{axis} must name each kept index once, in ascending order; {_some(misplaced)} stands after itself "
            "or a higher one. Sort it and remove repetitions.",
        )

    def kept_in_layer(self, source_layer: int | None) -> dict[str, Tensor]:
        """Kept indices by axis for the parameters of a source layer (None: those outside the layers).

        Axes that stay whole are absent, so that nothing is copied for them.
        """
        kept = {"hidden": self.hidden}
        if source_layer is not None:
            kept |= {axis: getattr(self, axis)[source_layer] for axis in PER_LAYER}
        whole = {axis for axis in kept if self._stays_whole(axis)}
        return {axis: indices for axis, indices in kept.items() if axis not in whole}

    def _stays_whole(self, axis: str) -> bool:
        return getattr(self.source, DIM_OF_AXIS[axis]) == getattr(self.target, DIM_OF_AXIS[axis])

    @property
    def is_identity(self) -> bool:
        """Whether the student is the teacher."""
        return all(self._stays_whole(axis) for axis in DIM_OF_AXIS)

    def describe(self) -> str:
        """A few lines a person reads before paying for the run."""
        lines = [f"{'':22}{'source':>14}{'target':>14}{'kept':>8}"]
        for dim in PRUNABLE_DIMS:
            lines.append(_row(dim, getattr(self.source, dim), getattr(self.target, dim)))
        for count in ("num_parameters", "num_non_embedding_parameters"):
            lines.append(_row(count.removeprefix("num_"), getattr(self.source, count), getattr(self.target, count)))
        dropped = sorted(set(range(self.source.num_layers)) - set(self.layer.tolist()))
        lines.append(f"layers dropped: {', '.join(map(str, dropped)) if dropped else 'none'}")
        if self.origin:
            lines.append("scores: " + ", ".join(f"{key}={value}" for key, value in self.origin.items()))
        return "\n".join(lines)

    # ---- files -----------------------------------------------------------------------------------------------------

    def save(self, folder: Path | str) -> None:
        """Write the two files into `folder`; call it on one rank."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(
            {axis: getattr(self, axis).contiguous().cpu() for axis in DIM_OF_AXIS if axis != "layer"}, folder / INDICES
        )
        description = {
            "source": self.source.to_dict(),
            "target": self.target.to_dict(),
            "layer": self.layer.tolist(),
            "origin": dict(self.origin),
        }
        (folder / DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path | str) -> PruningPlan:
        """Read and check what `save` wrote. Raises: FileNotFoundError: a file is missing. ValueError: not a plan."""
        folder = Path(folder)
        for file in (INDICES, DESCRIPTION):
            require(
                (folder / file).is_file(),
                f"{folder} holds no pruning plan: {file} is missing. Run the prune stage to its end, or save a plan "
                "there.",
                FileNotFoundError,
            )
        description = json.loads((folder / DESCRIPTION).read_text())
        return cls(
            source=ModelShape.from_dict(description["source"]),
            target=ModelShape.from_dict(description["target"]),
            layer=torch.tensor(description["layer"], dtype=torch.int64),
            origin=description["origin"],
            **load_file(folder / INDICES),
        )


def plan_from_importance(
    importance: Importance,
    source: ModelShape,
    target: ModelShape,
    *,
    batch_aggregation: str = "l2",
    sequence_aggregation: str = "mean",
    layers: Sequence[int] | None = None,
    layer_metric: str | None = None,
) -> PruningPlan:
    """The plan that keeps the highest scores; the default aggregations are the paper's.

    Args:
        importance: scores of a model of shape `source`.
        layers: kept layers, from 0, in any order; decides depth where given.
        layer_metric: the layer scores that decide depth otherwise; the lowest are dropped.
    Raises: ValueError: scores of another model, a target that does not fit, or depth without a way to choose it.
    """
    require_same_model(importance, source)
    require_prunable(source, target)

    def scores(axis: str) -> Tensor:
        return importance.scores(axis, batch_aggregation, sequence_aggregation)

    group = top_k(scores("group"), target.num_query_groups)
    head = top_heads(
        scores("head"), group, heads_per_group=source.heads_per_group, keep_per_group=target.heads_per_group
    )
    return PruningPlan(
        source=source,
        target=target,
        hidden=top_k(scores("hidden"), target.hidden_size),
        ffn=top_k(scores("ffn"), target.ffn_hidden_size),
        head=head,
        group=group,
        layer=_kept_layers(importance, source, target, layers, layer_metric),
        origin={
            **importance.origin,
            "num_samples": importance.num_samples,
            "batch_aggregation": batch_aggregation,
            "sequence_aggregation": sequence_aggregation,
            "depth": "explicit" if layers is not None else layer_metric,
        },
    )


def require_prunable(source: ModelShape, target: ModelShape) -> None:
    """ValueError unless `target` is `source` with prunable dims made smaller and heads that fit their groups."""
    for dim in PRUNABLE_DIMS:
        have, want = getattr(source, dim), getattr(target, dim)
        require(
            want <= have,
            f"target.{dim}={want} is larger than the source's {dim}={have}; pruning only makes models smaller. "
            f"Set target.{dim} to at most {have}.",
        )
    have_other, want_other = source.to_dict(), target.to_dict()
    for key in have_other:
        require(
            key in PRUNABLE_DIMS or have_other[key] == want_other[key],
            f"target.{key}={want_other[key]} differs from the source's {key}={have_other[key]}, which pruning cannot "
            f"change. Leave target.{key} out.",
        )
    require(
        target.heads_per_group <= source.heads_per_group,
        f"target.num_attention_heads={target.num_attention_heads} with target.num_query_groups="
        f"{target.num_query_groups} makes {target.heads_per_group} heads per group, but the source's groups have "
        f"{source.heads_per_group}. Set target.num_attention_heads to a multiple of {target.num_query_groups} up to "
        f"{target.num_query_groups * source.heads_per_group}, or keep more query groups.",
    )


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


def _kept_layers(
    importance: Importance, source: ModelShape, target: ModelShape, layers: Sequence[int] | None, metric: str | None
) -> Tensor:
    keep, have = target.num_layers, source.num_layers
    if layers is not None:
        require(
            len(layers) == keep,
            f"layers={list(layers)} keeps {len(layers)} layers, but target.num_layers={keep}. "
            f"Set target.num_layers={len(layers)} or name {keep} layers.",
        )
        return torch.tensor(sorted(layers), dtype=torch.int64)
    if keep == have:
        return torch.arange(have)
    require(
        metric is not None,
        f"target.num_layers={keep} of {have} drops layers, but nothing says which. Give the kept layers (`layers`, "
        f"from 0 to {have - 1}) or the metric of layer scores to go by, or set target.num_layers={have}.",
    )
    assert metric is not None
    return top_k(importance.layer_scores(metric), keep)


def _some(values: Tensor) -> str:
    """The first few distinct values."""
    distinct = values.unique().tolist()
    return ", ".join(map(str, distinct[:5])) + (", ..." if len(distinct) > 5 else "")


def _row(name: str, have: int, keep: int) -> str:
    return f"{name:22}{have:>14,}{keep:>14,}{keep / have:>8.1%}"

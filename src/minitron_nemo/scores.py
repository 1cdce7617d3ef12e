"""The result of an importance pass: moments of every named axis, and the scores they make.

    hidden  [h]      ffn  [l, f]      head  [l, n]      group  [l, g]      all nine aggregations of each
    blocks  [l-n+1]  by the name of the depth metric and the block's size n; a single layer is a block of one

Everything is global and the same whatever layout it came from. Kept are moments, not scores, so that runs over
different samples merge exactly and every aggregation can be chosen later:

    moments[axis]    [rows, 2, 3, c] float64: mean and mean square over the samples of a sample's mean of |a|, L2 and
                     variance along the sequence (the order of `Aggregation`). A row is a layer, for hidden a norm (two
                     a layer: input norm, pre-MLP norm). head counts c = n where a token's L2 norm over kv_channels was
                     taken first, n*d where it is taken of the aggregates.
    stream, norm     [h, h] and [2l+1, h] float64: sum over all norms and tokens that count of x x^T, x [h] the stream
                     entering a norm, and norm by norm of x^2: of a layer its input norm, then its pre-MLP norm; the
                     final norm last. Where measured
    of experts       [rows, 4, c] float64: number of tokens, sum |a|, sum a and sum a^2 over the tokens routed to an
                     expert. They make one sequence, whatever samples they come from, so it is sums that merge.

On disk: `importance.safetensors` (keys `ffn`, ..., `depth.<metric>.<block size>`) beside `importance.json` (the model's
shape, the number of samples, how the scores were obtained).
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

from minitron_nemo.aggregation import Aggregation, aggregate_samples, aggregate_sequence
from minitron_nemo.checks import did_you_mean, reading, require, require_files
from minitron_nemo.shape import ModelShape

STREAM, NORM = "stream", "norm"
"""Names of the second moments of the residual stream among the moments."""
TENSORS, DESCRIPTION = "importance.safetensors", "importance.json"
GREEDY = "greedy"
"""Depth scores of single layers: a layer's place in the order that layers were dropped in, one after another, from 0;
the number of dropped layers for those that were not."""
OPTIONS = ("metric", "head_norm", "neurons", "stream")
"""Keys of `origin` that say what was measured; runs that differ in one of them do not merge."""


@dataclass(frozen=True)
class Importance:
    """Moments per measured axis; scores on demand, float32, larger means more important."""

    shape: ModelShape
    """The model that was measured."""
    moments: Mapping[str, Tensor]
    """[..., 2, 3, c] or [..., 4, c] float64 by measured axis; see the module's text."""
    num_samples: int
    """Calibration samples that took part, over all data-parallel ranks."""
    depth: Mapping[str, Mapping[int, Tensor]] = field(default_factory=dict)
    """metric -> block size n -> [l-n+1] float32; entry i is the block of layers i to i+n-1. Empty where no depth was
    estimated."""
    depth_samples: Mapping[str, int] = field(default_factory=dict)
    """metric -> samples (of the accuracy: questions) its depth scores are a mean over. A metric that is not here does
    not merge: the number is not known, or its scores are no mean (an order of dropping)."""
    tokenizer_digest: str | None = None
    """Of the tokenizer that made the samples; None where unknown."""
    origin: Mapping[str, Any] = field(default_factory=dict)
    """How the scores were obtained: metric, options, calibration data; plain JSON values."""

    def __post_init__(self) -> None:
        sizes = moment_sizes(self.shape) | {name: [size] for name, size in stream_sizes(self.shape).items()}
        for axis, tensor in self.moments.items():
            require(axis in sizes, f"moments of axis {axis} have no place in a model; {did_you_mean(axis, sizes)}")
            require(
                tuple(tensor.shape) in sizes[axis],
                f"moments of axis {axis} have shape {list(tensor.shape)}, but a model of this shape has "
                f"{' or '.join(str(list(size)) for size in sizes[axis])}. Estimate the importance of this model again.",
            )
        for metric, blocks in self.depth.items():
            for size, tensor in blocks.items():
                expected = self.shape.num_layers - size + 1
                require(
                    tuple(tensor.shape) == (expected,),
                    f"depth scores {metric} of blocks of {size} layers have shape {list(tensor.shape)}, but "
                    f"{self.shape.num_layers} layers have {expected} such blocks. Estimate the importance of this "
                    "model again.",
                )

    @property
    def axes(self) -> tuple[str, ...]:
        """Width axes that have scores."""
        return tuple(axis for axis in expected_sizes(self.shape) if _measured_axis(axis) in self.moments)

    def scores(self, axis: str, batch: str | Aggregation = "l2", sequence: str | Aggregation = "mean") -> Tensor:
        """Scores of a width axis; the defaults are the paper's choice (L2 over samples of the sequence mean of |a|).

        hidden sums over all norms; a group sums its heads.
        Returns: hidden [h], ffn [l, f], head [l, n], group [l, g], expert [l, e], expert_ffn [l, e, f],
            shared_expert_ffn [l, f]; float32. Rows of layers without the axis are 0.
        """
        require(axis in self.axes, f"axis={axis} was not estimated; {did_you_mean(axis, self.axes)}")
        pair = Aggregation.parse(batch, "batch_aggregation"), Aggregation.parse(sequence, "sequence_aggregation")
        moments = self.moments[_measured_axis(axis)]
        scores = aggregate_samples(moments_of_sequence(moments) if _is_sums(moments) else moments, *pair)
        if axis == "hidden":
            scores = scores.sum(0)
        elif axis in ("head", "group"):
            if scores.size(-1) != self.shape.num_attention_heads:
                channels = scores.unflatten(-1, (self.shape.num_attention_heads, self.shape.kv_channels))
                scores = torch.linalg.vector_norm(channels, dim=-1)
            if axis == "group":
                scores = scores.unflatten(-1, (self.shape.num_query_groups, self.shape.heads_per_group)).sum(-1)
        return scores.float()

    def tokens_of_experts(self) -> Tensor | None:
        """Calibration tokens [l, e] that were routed to each expert, 0 in dense layers; None where nobody counted them,
        or where there are no experts."""
        moments = self.moments.get("expert")
        return None if moments is None or not _is_sums(moments) else moments[:, 0]

    def layer_scores(self, metric: str) -> Tensor:
        """Depth scores [l] float32 of single layers by one metric."""
        return self.block_scores(metric, 1)

    def block_scores(self, metric: str, size: int) -> Tensor:
        """Depth scores [l-size+1] float32 of every contiguous block of `size` layers by one metric."""
        require(
            bool(self.depth),
            f"layer scores ({metric}) were not estimated: this importance holds width scores only. "
            "Give the kept layers explicitly or estimate depth importance.",
        )
        require(metric in self.depth, f"layer metric {metric} was not estimated; {did_you_mean(metric, self.depth)}")
        known = self.depth[metric]
        require(
            size in known,
            f"layer metric {metric} was estimated for blocks of {', '.join(map(str, sorted(known)))} layers, not of "
            f"{size}. Estimate it for blocks of {size} too, or drop single layers.",
        )
        return known[size]

    @classmethod
    def merge(cls, parts: Sequence[Importance], *, depth: bool = True) -> Importance:
        """One importance of all the samples, as one pass over all of them would have given.

        Width scores exactly. Depth scores are averaged by their own numbers of samples: exact where samples have
        equally many tokens that count, and for the squared error equally large logits.

        Args:
            depth: False leaves depth scores out.
        Raises: ValueError: no parts, or parts of another model, tokenizer, measurement, or with other depth scores, or
            with depth scores that have no number of samples.
        """
        require(len(parts) > 0, "Nothing to merge. Name at least one importance artifact.")
        first = parts[0]
        for other in parts[1:]:
            first._require_mergeable(other, depth=depth)
        metrics = tuple(first.depth) if depth else ()
        for part in parts:
            unknown = [metric for metric in metrics if metric not in part.depth_samples]
            require(
                not unknown,
                f"Depth scores {', '.join(unknown)} are no mean over a known number of samples, so those of several "
                "runs cannot be averaged. Merge without depth scores (depth=False), and estimate them over all samples "
                "in one run.",
            )

        def width(axis: str) -> Tensor:
            tensors = [part.moments[axis] for part in parts]
            if axis in stream_sizes(first.shape) or _is_sums(tensors[0]):
                return torch.stack(tensors).sum(0)
            return _mean(tensors, [part.num_samples for part in parts])

        def agreed(key: str) -> bool:
            return all(key in part.origin and part.origin[key] == first.origin[key] for part in parts)

        weights = {metric: [part.depth_samples[metric] for part in parts] for metric in metrics}
        return cls(
            shape=first.shape,
            moments={axis: width(axis) for axis in first.moments},
            num_samples=sum(part.num_samples for part in parts),
            depth={
                metric: {
                    size: _mean([part.depth[metric][size] for part in parts], weights[metric])
                    for size in first.depth[metric]
                }
                for metric in metrics
            },
            depth_samples={metric: sum(weights[metric]) for metric in metrics},
            tokenizer_digest=first.tokenizer_digest,
            origin={
                **{key: value for key, value in first.origin.items() if agreed(key)},
                "merged": [{"num_samples": part.num_samples, **part.origin} for part in parts],
            },
        )

    def _require_mergeable(self, other: Importance, *, depth: bool) -> None:
        mine, theirs = self.shape.to_dict(), other.shape.to_dict()
        for key in mine:
            _require_equal(f"the model's {key}", mine[key], theirs[key])
        _require_equal("the tokenizer's digest", self.tokenizer_digest, other.tokenizer_digest)
        for option in OPTIONS:
            _require_equal(f"importance.{option}", self.origin.get(option), other.origin.get(option))
        sizes = [{axis: list(part.moments[axis].shape) for axis in sorted(part.moments)} for part in (self, other)]
        _require_equal("the size of the axes' moments", *sizes)
        if depth:
            blocks = [{metric: sorted(sizes) for metric, sizes in sorted(part.depth.items())} for part in (self, other)]
            _require_equal("the depth metrics and their block sizes", *blocks)

    def save(self, folder: Path | str) -> None:
        """Write the two files into `folder`; call it on one rank."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = dict(self.moments)
        for metric, blocks in self.depth.items():
            tensors |= {f"depth.{metric}.{size}": tensor for size, tensor in blocks.items()}
        save_file({key: tensor.contiguous().cpu() for key, tensor in tensors.items()}, folder / TENSORS)
        sizes = expected_sizes(self.shape)
        description = {
            "shape": self.shape.to_dict(),
            "num_samples": self.num_samples,
            "tokenizer_digest": self.tokenizer_digest,
            "origin": dict(self.origin),
            "axes": {axis: list(sizes[axis]) for axis in self.axes},
            "depth": {metric: sorted(blocks) for metric, blocks in self.depth.items()},
            "depth_samples": dict(self.depth_samples),
        }
        (folder / DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path | str) -> Importance:
        """Read what `save` wrote. Raises: FileNotFoundError: a file is missing."""
        folder = Path(folder)
        mend = "Run the estimate-importance stage to its end."
        require_files(folder, (TENSORS, DESCRIPTION), "importance scores", mend)
        again = "Make the scores again, or copy them again."
        with reading(folder / DESCRIPTION, again):
            description = json.loads((folder / DESCRIPTION).read_text())
        with reading(folder / TENSORS, again):
            tensors = load_file(folder / TENSORS)
        moments: dict[str, Tensor] = {}
        depth: dict[str, dict[int, Tensor]] = {}
        for key, tensor in tensors.items():
            if key.startswith("depth."):
                _, metric, size = key.split(".")
                depth.setdefault(metric, {})[int(size)] = tensor
            else:
                moments[key] = tensor
        return cls(
            shape=ModelShape.from_dict(description["shape"]),
            moments=moments,
            num_samples=description["num_samples"],
            depth=depth,
            depth_samples=description.get("depth_samples", {}),
            tokenizer_digest=description["tokenizer_digest"],
            origin=description["origin"],
        )


def expected_sizes(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Size of the scores of each width axis that a model of this shape has."""
    layers, experts = shape.num_layers, shape.num_moe_experts or 0
    sizes = {
        "hidden": (shape.hidden_size,),
        "head": (layers, shape.num_attention_heads),
        "group": (layers, shape.num_query_groups),
    }
    if shape.has_dense_layers:
        sizes["ffn"] = (layers, shape.ffn_hidden_size)
    if experts:
        sizes |= {"expert": (layers, experts), "expert_ffn": (layers, experts, shape.moe_ffn_hidden_size or 0)}
    if shape.moe_shared_expert_intermediate_size is not None:
        sizes["shared_expert_ffn"] = (layers, shape.moe_shared_expert_intermediate_size)
    return sizes


def moment_sizes(shape: ModelShape) -> dict[str, list[tuple[int, ...]]]:
    """Sizes that the moments of each measured axis may have."""
    measured = {axis: [size] for axis, size in expected_sizes(shape).items() if _measured_axis(axis) == axis}
    measured["hidden"] = [(2 * shape.num_layers, shape.hidden_size)]
    measured["head"].append((shape.num_layers, shape.query_projection_size))
    moments = {axis: [(*size[:-1], 2, 3, size[-1]) for size in sizes] for axis, sizes in measured.items()}
    for axis in ("expert", "expert_ffn"):
        if axis in moments:
            *rows, channels = measured[axis][0]
            moments[axis].append((*rows, 4, channels))
    return moments


def stream_sizes(shape: ModelShape) -> dict[str, tuple[int, int]]:
    """Sizes of the second moments of the residual stream."""
    return {STREAM: (shape.hidden_size, shape.hidden_size), NORM: (2 * shape.num_layers + 1, shape.hidden_size)}


def moments_of_sequence(sums: Tensor) -> Tensor:
    """Moments of one sequence, whose second is the first one's square.

    Args:
        sums: [..., 4, c] float64, number of tokens, sum |a|, sum a and sum a^2 over them.
    Returns:
        [..., 2, 3, c] float64; 0 where there are no tokens.
    """
    tokens, *of_tokens = (part.flatten() for part in sums.unbind(-2))
    aggregates = aggregate_sequence(torch.stack(of_tokens).unsqueeze(-1), tokens).squeeze(-1)  # [3, ... * c]
    aggregates = aggregates.unflatten(1, (*sums.shape[:-2], sums.size(-1))).movedim(0, -2)
    return torch.stack([aggregates, aggregates.square()], dim=-3)


def _is_sums(moments: Tensor) -> bool:
    return moments.size(-2) == 4


def _mean(tensors: Sequence[Tensor], weights: Sequence[int]) -> Tensor:
    weighted = [tensor.double() * weight for tensor, weight in zip(tensors, weights, strict=True)]
    return (torch.stack(weighted).sum(0) / sum(weights)).to(tensors[0].dtype)


def _measured_axis(axis: str) -> str:
    """The axis whose moments make an axis' scores."""
    return "head" if axis == "group" else axis


def _require_equal(what: str, mine: Any, theirs: Any) -> None:
    require(
        mine == theirs,
        f"Importance of different measurements cannot be merged: {what} is {mine} in the first and {theirs} in "
        "another. Merge runs of one model and one config over different samples.",
    )

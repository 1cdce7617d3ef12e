"""The result of an importance pass: one score per named axis, global, the same whatever layout it came from.

    hidden  [h]      ffn  [l, f]      head  [l, n]      group  [l, g]      all nine aggregations of each
    layer   [l]      by the name of the metric that made it

On disk: `importance.safetensors` (keys `ffn.l2.mean`: axis, batch aggregation, sequence aggregation; `layer.<metric>`)
beside `importance.json` (the model's shape, the number of samples, how the scores were obtained).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from minitron_nemo.checks import did_you_mean, require
from minitron_nemo.importance.statistics import Aggregation
from minitron_nemo.shape import ModelShape

WIDTH_AXES = ("hidden", "ffn", "head", "group")
TENSORS, DESCRIPTION = "importance.safetensors", "importance.json"

NineScores = Mapping[tuple[Aggregation, Aggregation], Tensor]
"""Scores by (batch aggregation, sequence aggregation)."""


@dataclass(frozen=True)
class Importance:
    """Scores per named axis, float32, larger means more important."""

    shape: ModelShape
    """The model that was measured."""
    width: Mapping[str, NineScores]
    num_samples: int
    """Calibration samples that took part, over all data-parallel ranks."""
    layer: Mapping[str, Tensor] = field(default_factory=dict)
    """Depth scores [l] by metric; empty where none was estimated."""
    origin: Mapping[str, Any] = field(default_factory=dict)
    """How the scores were obtained: metric, options, calibration data; plain JSON values."""

    def __post_init__(self) -> None:
        sizes = expected_sizes(self.shape)
        for axis, scores in self.width.items():
            for pair, tensor in scores.items():
                require(
                    tuple(tensor.shape) == sizes[axis],
                    f"scores of axis {axis} ({pair[0].value}, {pair[1].value}) have shape {list(tensor.shape)}, but a "
                    f"model of this shape has {list(sizes[axis])}. Estimate the importance of this model again.",
                )

    def scores(self, axis: str, batch: str | Aggregation = "l2", sequence: str | Aggregation = "mean") -> Tensor:
        """Scores of a width axis; the defaults are the paper's choice (L2 over samples of the sequence mean of |a|).

        Returns: hidden [h], ffn [l, f], head [l, n], group [l, g]; float32.
        """
        require(axis in self.width, f"axis={axis} was not estimated; {did_you_mean(axis, self.width)}")
        pair = (
            Aggregation.parse(batch, "batch_aggregation"),
            Aggregation.parse(sequence, "sequence_aggregation"),
        )
        return self.width[axis][pair]

    def layer_scores(self, metric: str) -> Tensor:
        """Depth scores [l] float32 of one metric."""
        require(
            bool(self.layer),
            f"layer scores ({metric}) were not estimated: this importance holds width scores only. "
            "Give the kept layers explicitly or estimate depth importance.",
        )
        require(metric in self.layer, f"layer metric {metric} was not estimated; {did_you_mean(metric, self.layer)}")
        return self.layer[metric]

    def save(self, folder: Path | str) -> None:
        """Write the two files into `folder`; call it on one rank."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {
            f"{axis}.{batch.value}.{sequence.value}": tensor.contiguous().cpu()
            for axis, scores in self.width.items()
            for (batch, sequence), tensor in scores.items()
        }
        tensors |= {f"layer.{metric}": tensor.contiguous().cpu() for metric, tensor in self.layer.items()}
        save_file(tensors, folder / TENSORS)
        description = {
            "shape": self.shape.to_dict(),
            "num_samples": self.num_samples,
            "origin": dict(self.origin),
            "axes": {axis: list(expected_sizes(self.shape)[axis]) for axis in self.width},
            "layer_metrics": list(self.layer),
        }
        (folder / DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path | str) -> Importance:
        """Read what `save` wrote. Raises: FileNotFoundError: a file is missing."""
        folder = Path(folder)
        for file in (TENSORS, DESCRIPTION):
            require(
                (folder / file).is_file(),
                f"{folder} holds no importance scores: {file} is missing. Run the estimate-importance stage to its "
                "end.",
                FileNotFoundError,
            )
        description = json.loads((folder / DESCRIPTION).read_text())
        width: dict[str, dict[tuple[Aggregation, Aggregation], Tensor]] = {}
        layer: dict[str, Tensor] = {}
        for key, tensor in load_file(folder / TENSORS).items():
            axis, rest = key.split(".", 1)
            if axis == "layer":
                layer[rest] = tensor
            else:
                batch, sequence = rest.split(".")
                width.setdefault(axis, {})[Aggregation(batch), Aggregation(sequence)] = tensor
        return cls(
            shape=ModelShape.from_dict(description["shape"]),
            width=width,
            num_samples=description["num_samples"],
            layer=layer,
            origin=description["origin"],
        )


def expected_sizes(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Size of the scores of each width axis."""
    return {
        "hidden": (shape.hidden_size,),
        "ffn": (shape.num_layers, shape.ffn_hidden_size),
        "head": (shape.num_layers, shape.num_attention_heads),
        "group": (shape.num_layers, shape.num_query_groups),
    }

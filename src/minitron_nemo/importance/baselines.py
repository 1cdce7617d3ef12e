"""Scores that read no activation, to measure importance against: weight magnitude and chance.

They take the place of moments as a single sample would (mean = score, mean square = score squared), so that the mean
and the L2 over samples both give the score back; the variance over samples of one number is 0 and ranks nothing.

Communication: `weight_magnitude` that of `weights.stream_full_parameters`; `random_scores` none, as every rank draws
the same numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from minitron_nemo.axes import parameter_axes, part_axes
from minitron_nemo.axis_expressions import HeadColumns, Named
from minitron_nemo.parallel import Groups
from minitron_nemo.places import expert_of, layer_of
from minitron_nemo.scores import Importance, moment_sizes
from minitron_nemo.shape import ModelShape
from minitron_nemo.weights import stream_full_parameters


def random_scores(shape: ModelShape, *, seed: int) -> Importance:
    """Uniform scores of every axis; the same seed gives the same scores on every machine."""
    generator = torch.Generator().manual_seed(seed)
    scores = {}
    for axis, (*rows, _, _, channels) in ((axis, sizes[0]) for axis, sizes in moment_sizes(shape).items()):
        scores[axis] = torch.rand(*rows, channels, generator=generator, dtype=torch.float64)
    return _of_scores(shape, scores, {"metric": "random", "seed": seed})


def weight_magnitude(model: nn.Module, shape: ModelShape, groups: Groups) -> Importance:
    """L2 norm of all the weights that go with a structure: a neuron's rows of linear_fc1 and column of linear_fc2, a
    head's rows of the query and columns of the output projection, a channel's row or column of every matrix.

    Args:
        model: bare or wrapped GPTModel of this rank.
    Communicates: tp, pp and ep, for each parameter; every rank takes part.
    """
    squares = {
        axis: torch.zeros(*rows, channels, dtype=torch.float64)
        for axis, (*rows, _, _, channels) in ((axis, sizes[0]) for axis, sizes in moment_sizes(shape).items())
    }
    for name, full in stream_full_parameters(model, shape, groups):
        layer, expert = layer_of(name), expert_of(name)
        matrices = parameter_axes(name).axes[0].unfuse(full.detach().cpu().double().square(), shape)
        for matrix, axes in zip(matrices, part_axes(name, shape), strict=True):
            if matrix.dim() < 2:
                continue  # norms and biases
            for dim, axis in enumerate(axes):
                along = matrix.movedim(dim, 0).flatten(1).sum(1)
                if isinstance(axis, HeadColumns) and layer is not None:
                    squares["head"][layer] += along.unflatten(0, (shape.num_attention_heads, -1)).sum(1)
                elif isinstance(axis, Named) and axis.axis == "hidden":
                    squares["hidden"][0] += along  # the rows of other norms stay 0: a channel has one score
                elif isinstance(axis, Named) and axis.axis in squares and layer is not None:
                    row = squares[axis.axis][layer]
                    (row if expert is None else row[expert]).add_(along)
                if isinstance(axis, Named) and expert is not None and dim == 0 and layer is not None:
                    squares["expert"][layer, expert] += along.sum()
    return _of_scores(shape, {axis: total.sqrt() for axis, total in squares.items()}, {"metric": "weight_magnitude"})


def _of_scores(shape: ModelShape, scores: dict[str, Tensor], origin: dict[str, object]) -> Importance:
    moments = {}
    for axis, score in scores.items():
        of_one_sample = torch.stack([score, score.square()], dim=-2)  # [..., 2, c]
        moments[axis] = of_one_sample.unsqueeze(-2).expand(*of_one_sample.shape[:-1], 3, score.size(-1)).contiguous()
    return Importance(shape, moments, num_samples=1, origin=origin)

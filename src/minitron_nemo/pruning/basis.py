"""Another basis of the residual stream: its principal axes, of which the first k stay.

    second moment of the stream [h, h]  ->  axes by falling eigenvalue  ->  plan.hidden [h, k], orthonormal columns
                                        ->  plan.norm_scale [2l+1]

Every layer reads the stream x through a norm and writes onto it, so with each gamma folded into what reads the norm
(surgery.py) an orthogonal Q changes nothing: RMSNorm(Q^T x) = Q^T RMSNorm(x). Of k < h axes what is lost is the stream
outside them, by norms that divide by the root mean square of k coordinates instead of h: `norm_scales` mends that.

A LayerNorm takes off the mean over the channels, x . 1 / h, so its basis has to hold the direction 1, and as one in
which every coordinate is equal, as the student takes the mean over k: Q 1_k = sqrt(k / h) 1_h. One axis of k is spent
on it. The idea of turning the stream is SliceGPT's (arXiv:2401.15024), which turns every layer by itself and pays with
matrices in the residual path; here one basis serves all layers and the student is a model as any other.

A sequential refit gives what reads the stream a map of its own, so there other axes are better than the principal ones:
those that say most of what is read (`read_basis`).

Nothing here communicates, but `reading_moment`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from minitron_nemo.axes import norm_number, norm_of
from minitron_nemo.axis_expressions import norm_gamma
from minitron_nemo.checks import require
from minitron_nemo.parallel import Groups
from minitron_nemo.places import EMBEDDING, FINAL_NORM
from minitron_nemo.plan import PruningPlan
from minitron_nemo.scores import NORM, STREAM, Importance
from minitron_nemo.shape import ModelShape
from minitron_nemo.weights import stream_full_parameters


def stream_moments(importance: Importance) -> tuple[Tensor, Tensor]:
    """`stream` [h, h] and `norm` [2l+1, h], see scores.py. Raises: ValueError: they were not measured."""
    require(
        STREAM in importance.moments and NORM in importance.moments,
        "prune.surgery turns or rescales the residual stream by its second moments, which this importance does not "
        "hold. Estimate importance with importance.stream=normalised, or set prune.surgery.basis=channels and "
        "prune.surgery.norm_scale=size.",
    )
    return importance.moments[STREAM], importance.moments[NORM]


def principal_basis(second_moment: Tensor, keep: int, *, keeps_mean: bool = False) -> Tensor:
    """The `keep` axes of largest second moment.

    Args:
        second_moment: [h, h], symmetric.
        keeps_mean: of a LayerNorm model, see the module's text.
    Returns: [h, keep] float64, orthonormal columns; without keeps_mean by falling second moment, each axis' largest
        entry positive.
    """
    matrix = second_moment.double()
    if not keeps_mean:
        return _first_axes(matrix, keep)
    size = len(matrix)
    around_mean = _mean_first(size)
    axes = torch.zeros(size, keep, dtype=torch.float64)
    axes[0, 0] = 1
    axes[1:, 1:] = _first_axes((around_mean @ matrix @ around_mean)[1:, 1:], keep - 1)
    return around_mean @ axes @ _mean_first(keep)


def read_basis(second_moment: Tensor, reading: Tensor, keep: int) -> Tensor:
    """The `keep` axes that say most of what the stream is read for, where readers are refitted to them.

    With C the second moment and M the reading, what a linear map of k numbers of the stream x gives back misses least
    of |M^1/2 x|^2 if the numbers are the first principal components of M^1/2 x: so x along the columns of M^1/2 U, with
    U the first axes of M^1/2 C M^1/2. A basis of one stream has to be orthonormal; any of the same span says the same.

    Args:
        second_moment: [h, h], symmetric.
        reading: [h, h], symmetric: the mean of W^T W over the matrices W that read the stream.
    Returns: [h, keep] float64, orthonormal columns.
    """
    values, axes = torch.linalg.eigh(reading.double())
    root = (axes * values.clamp(min=0).sqrt()) @ axes.t()
    return torch.linalg.qr(root @ _first_axes(root @ second_moment.double() @ root, keep)).Q


@torch.no_grad()
def reading_moment(model: nn.Module, plan: PruningPlan, second_moment: Tensor, groups: Groups) -> Tensor:
    """What each norm's readers read of the stream, all norms alike: [h, h] float64.

    Of a norm with weights gamma and readers W it is the mean over W's rows of (W gamma)^T (W gamma), summed over W, as
    a share of what they read in all, so that it says nothing of how large a layer's numbers are.

    Args:
        model: GPTModel of shape plan.source on this rank.
        second_moment: [h, h].
    Communicates: tp and pp, for each parameter; every rank takes part.
    """
    shape = plan.source
    second_moment = second_moment.double().to(next(model.parameters()).device)
    total, of_norm = torch.zeros_like(second_moment), torch.zeros_like(second_moment)
    gammas: dict[str, Tensor] = {}
    current, embedding = "", None

    def close() -> None:
        read = (of_norm * second_moment).sum()
        if read > 0:
            total.add_(of_norm / read)
        of_norm.zero_()

    def see(norm: str, weight: Tensor) -> None:
        nonlocal current
        if norm != current:
            close()
            current = norm
        folded = weight.float() * norm_gamma(gammas[norm], shape).float()
        of_norm.add_((folded.t() @ folded).double() / len(folded))

    for name, full in stream_full_parameters(model, shape, groups):
        norm = norm_of(name)
        if norm_number(name, shape) is not None:
            gammas[name] = full
        elif norm is not None and norm_number(norm, shape) is not None and full.dim() == 2:
            see(norm, full)
        if name == EMBEDDING and plan.unties:
            embedding = full
    if embedding is not None:
        see(f"{FINAL_NORM}.weight", embedding)
    close()
    return total.cpu()


def missed_by_axes(second_moment: Tensor, keep: int) -> float:
    """The share of the stream's energy outside its first `keep` principal axes."""
    spectrum = torch.linalg.eigvalsh(second_moment.double())
    return float(spectrum[: len(spectrum) - keep].sum() / spectrum.sum())


def missed_by_channels(second_moment: Tensor, channels: Tensor, *, refitted: bool) -> float:
    """The share of the stream's energy outside some channels, ascending.

    Args:
        refitted: what reads the stream is; then it misses only what no linear map of the kept channels says.
    """
    matrix = second_moment.double()
    kept = matrix[channels][:, channels]
    said = kept.trace()
    if refitted:
        ridge = 1e-3 * kept.diagonal().mean()  # silent channels have none of their own
        of_all = matrix[channels]
        said = (torch.linalg.solve(kept + ridge * torch.eye(len(kept)), of_all) * of_all).sum()
    return float(1 - said / matrix.trace())


def _mean_first(size: int) -> Tensor:
    """The reflection [n, n] that takes the first direction to 1_n / sqrt(n), and that back."""
    normal = torch.full((size,), -(size**-0.5), dtype=torch.float64)
    normal[0] += 1
    square = normal.dot(normal)
    identity = torch.eye(size, dtype=torch.float64)
    return identity if square == 0 else identity - (2 / square) * normal.outer(normal)


def _first_axes(matrix: Tensor, keep: int) -> Tensor:
    axes = torch.linalg.eigh(matrix).eigenvectors.flip(1)[:, :keep]
    largest = axes.gather(0, axes.abs().argmax(0, keepdim=True))
    return axes * torch.sign(largest)


def norm_scales(kind: str, hidden: Tensor, importance: Importance, source: ModelShape) -> Tensor | None:
    """What each norm's gammas are multiplied by, [2l+1] float64; None: nothing.

    A norm of the student divides by the root mean square of k kept coordinates, the teacher's by that of all h. With
    a share e of the stream's energy kept, the student's divisor is sqrt(e h / k) times the teacher's.

    Args:
        kind: none, size (e = 1), or energy: e measured; of channels norm by norm, of a basis one e for all.
        hidden: plan.hidden.
    """
    h = source.hidden_size
    keep = hidden.size(1) if hidden.is_floating_point() else len(hidden)
    if kind == "none" or keep == h:
        return None
    norms = 2 * source.num_layers + 1
    share = torch.ones(norms, dtype=torch.float64)
    if kind == "energy":
        stream, norm = stream_moments(importance)
        if hidden.is_floating_point():
            share = share * (((stream @ hidden) * hidden).sum() / stream.trace())
        elif source.normalization == "RMSNorm":
            share = norm[:, hidden].sum(1) / norm.sum(1)
        else:  # the student takes off the mean over the kept channels
            kept = stream[hidden][:, hidden]
            share = share * ((kept.trace() - kept.sum() / keep) / stream.trace())
    return (share * h / keep).sqrt()

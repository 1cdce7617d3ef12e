"""Surgery: the teacher's weights, cut along their named axes, into the student.

    teacher on TP x PP  ->  one full parameter at a time  ->  indexed along its axes  ->  the student's part of it

A kept layer's parameters move to its place among the kept ones (source layer plan.layer[i] becomes layer i), and so do
a kept expert's among its layer's. The teacher is read only. Student and teacher live on the same ranks and may be split
differently over the pipeline, as the student's own layers say which parameters a rank needs.

Communication: that of `weights.stream_full_parameters` (tp and pp, once per parameter). Peak extra memory: one full
parameter and its pruned copy; with tied embeddings, also the pruned embedding table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor, nn

from minitron_nemo.axes import full_shape, norm_number, norm_of, take
from minitron_nemo.axis_expressions import KeptOfAxes, norm_gamma
from minitron_nemo.checks import require
from minitron_nemo.parallel import Groups, group_size
from minitron_nemo.places import EMBEDDING, OUTPUT, expert_of, layer_of, with_expert, with_layer
from minitron_nemo.plan import PruningPlan
from minitron_nemo.weights import load_full_parameters, stream_full_parameters


def prune_into(teacher: nn.Module, student: nn.Module, plan: PruningPlan, groups: Groups) -> None:
    """Fill `student` with what `plan` keeps of `teacher`.

    Args:
        teacher: GPTModel of shape plan.source on this rank, bare or wrapped; not changed.
        student: GPTModel of shape plan.target on this rank; every parameter is overwritten, its dtype stays.
    Communicates: tp and pp, for each parameter of the teacher; every rank takes part.
    Raises: ValueError: a model's parameters do not have the plan's shapes, or the target does not split over tp.
    """
    plan.target.require_splits_over(group_size(groups.tp), 1, group_size(groups.ep))
    stream = pruned_parameters(teacher, plan, groups)
    tied_embedding: dict[str, Tensor] = {}

    def read(wanted: str) -> Tensor:
        """The student asks in the stream's order, except that a tied last stage asks for the embedding at its end."""
        if wanted in tied_embedding:
            return tied_embedding[wanted]
        for name, pruned in stream:
            if name == EMBEDDING and plan.target.share_embeddings_and_output_weights:
                tied_embedding[name] = pruned
            if name == wanted:
                return pruned
        raise ValueError(
            f"The teacher has no {wanted}, which the student needs. Build both models from the plan's shapes."
        )

    load_full_parameters(student, plan.target, groups, read)
    for _ in stream:  # what only other stages keep: each parameter is a collective, so every rank takes every one
        pass


def pruned_parameters(teacher: nn.Module, plan: PruningPlan, groups: Groups) -> Iterator[tuple[str, Tensor]]:
    """The student's full parameters under its own layer numbers, in the order of `axes.parameter_names`.

    Yields: (name, tensor) in the teacher's dtype; may share the teacher's memory where nothing is cut, so read only.
    Communicates: tp and pp, for each parameter of the teacher; every rank must take every item.
    """
    norms: dict[str, Tensor] = {}  # a norm comes before what reads it
    embedding = None

    def cut(full: Tensor, target_name: str) -> tuple[str, Tensor]:
        source_name, kept = source_of(target_name, plan, norms.__getitem__)
        pruned = take(full, source_name, plan.source, kept)
        assert tuple(pruned.shape) == full_shape(target_name, plan.target), (target_name, pruned.shape)
        return target_name, pruned

    for name, full in stream_full_parameters(teacher, plan.source, groups):
        if norm_number(name, plan.source) is not None:
            norms[name] = full
        if name == EMBEDDING and plan.unties:
            embedding = full
        target_name = target_name_of(name, plan)
        if target_name is not None:
            yield cut(full, target_name)
    if embedding is not None:
        yield cut(embedding, OUTPUT)


def target_name_of(name: str, plan: PruningPlan) -> str | None:
    """The student's name for the teacher's parameter `name`; None: its layer or its expert is dropped."""
    layer, expert = layer_of(name), expert_of(name)
    if layer is None:
        return name
    if expert is not None:
        assert plan.expert is not None
        kept = plan.expert[layer].tolist()
        if expert not in kept:
            return None
        name = with_expert(name, kept.index(expert))
    layers = plan.layer.tolist()
    return with_layer(name, layers.index(layer)) if layer in layers else None


def source_of(name: str, plan: PruningPlan, norm_weight: Callable[[str], Tensor]) -> tuple[str, KeptOfAxes]:
    """The teacher's parameter that the student's `name` is cut from, and what is kept along its axes.

    In a turned stream a norm's gamma goes into what reads the norm, and what is left of its bias is divided by it:
    W (gamma * n + b) = W diag(gamma) (n + b / gamma), which holds for the basis' coordinates of n too.

    Args:
        norm_weight: from a norm weight's name to the teacher's full parameter [h], as it is stored.
    Raises: ValueError: a norm has a bias and a gamma of 0, through which nothing divides.
    """
    layer, expert, source = layer_of(name), expert_of(name), name
    source_layer = source_expert = None
    if layer is not None:
        source_layer = int(plan.layer[layer])
        source = with_layer(name, source_layer)
    if expert is not None:
        assert plan.expert is not None and source_layer is not None
        source_expert = int(plan.expert[source_layer, expert])
        source = with_expert(source, source_expert)
    kept = plan.kept_in_layer(source_layer, source_expert)
    number, norm = norm_number(source, plan.source), norm_of(source)
    if number is not None and plan.norm_scale is not None:
        kept["norm_scale"] = plan.norm_scale[number]
    if norm is not None and plan.has_basis:
        gamma = norm_gamma(norm_weight(norm), plan.source)
        kept["folded"] = gamma
        if source.endswith(".bias"):
            zeros = (gamma == 0).nonzero().flatten().tolist()
            require(
                not zeros,
                f"{norm} has a gamma of 0 in channels {zeros[:5]}, through which the norm's bias cannot be divided to "
                "turn the residual stream. Keep channels by their indices (prune.surgery.basis=channels).",
            )
            kept["folded"] = 1 / gamma
    return (EMBEDDING if source == OUTPUT and plan.unties else source), kept

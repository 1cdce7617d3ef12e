"""The learned linear maps from student channels to teacher channels, by which states of unequal width are compared.

    weight   [h_teacher, h_student]   the model's dtype, whole on every tp rank

Trained and saved with the student, and dropped with the teacher: a student's artifact is made from the student alone.

Communication: none here. Megatron sums a weight's gradient over dp and cp as any other's; over tp under sequence
parallelism, where every rank sees other tokens (`sequence_parallel`); and over pp if it is shared, as every stage then
holds a copy that only its own pairs give a gradient (`pipeline_parallel` with the config's `has_cond_embedder`). The
equal start and the equal gradient keep the copies equal.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from minitron_nemo.checks import require
from minitron_nemo.config.distillation import HiddenStateConfig
from minitron_nemo.distillation.pairs import Pair, require_plan
from minitron_nemo.plan import PruningPlan

SHARED = "shared"
_SEED = 1234  # of the random start, the same on every rank and layout


def build_projections(
    config: HiddenStateConfig,
    pairs: Sequence[Pair],
    here: Sequence[Pair],
    student: TransformerConfig,
    teacher: TransformerConfig,
    plan: PruningPlan | None,
    gammas: tuple[Tensor, Tensor],
    *,
    stage: int,
    like: Tensor,
) -> nn.ParameterDict:
    """Projections this pipeline stage holds: the shared one on every stage, one per pair where the pair is compared.

    Args:
        pairs: all; `here`: those compared on this `stage`.
        gammas: [pairs, h_student] and [pairs, h_teacher], what the models' norms multiply each pair's states by, 1 in
            the stream itself.
        like: has the dtype and device the projections get.
    Raises: ValueError: projection=none for unequal sizes, or a start from a plan that is not of these two models.
    """
    kind, sizes = config.projection, (teacher.hidden_size, student.hidden_size)
    if kind == "auto":
        kind = "shared" if sizes[0] != sizes[1] else "none"
    require(
        kind != "none" or sizes[0] == sizes[1],
        f"distillation.hidden_states.projection=none compares states channel by channel, but the student has "
        f"hidden_size {sizes[1]} and the teacher {sizes[0]}. Set it to shared or per_pair.",
    )
    projected = [pair for pair in pairs if pair.place != "relation"]
    projections = nn.ParameterDict()
    if kind == "none" or not projected:
        return projections
    names = [SHARED] if kind == "shared" else [pair.name for pair in projected]
    for number, name in enumerate(names):
        if kind == "shared" or any(pair.name == name for pair in here):
            if config.projection_init == "plan":
                starts = [
                    _plan_weight(sizes, plan, pair, *of_pair)
                    for pair, *of_pair in zip(pairs, *gammas, strict=True)
                    if pair in projected and name in (SHARED, pair.name)
                ]
                weight = torch.stack(starts).mean(0)
            else:
                weight = _random_weight(sizes, number)
            parameter = nn.Parameter(weight.to(like))
            parameter.sequence_parallel = student.sequence_parallel  # type: ignore[attr-defined]
            projections[name] = parameter
    if kind == "shared" and student.pipeline_model_parallel_size > 1:
        parameter = projections[SHARED]
        student.has_cond_embedder = True
        parameter.pipeline_parallel = True
        parameter.shared_embedding = True  # a bucket of its own, split alike on all stages
        parameter.shared = stage > 0  # the gradient's norm counts it once
    return projections


def _random_weight(sizes: tuple[int, int], number: int) -> Tensor:
    """Keeps a state's norm in expectation."""
    generator = torch.Generator().manual_seed(_SEED + number)
    return torch.randn(sizes, generator=generator) * sizes[0] ** -0.5


def _plan_weight(
    sizes: tuple[int, int], plan: PruningPlan | None, pair: Pair, of_student: Tensor, of_teacher: Tensor
) -> Tensor:
    """The exact embedding: each student channel where the teacher has it, or along its direction in the basis.

    Behind norms that is diag(gamma_T) P diag(s / gamma_S), s what the cut scales the student's norm by. So whatever
    gammas the student has: those of the norm it was cut from, 1 in a turned stream, other sizes after a refit. For
    several pairs it is their mean, and the start is not exact.

    Args: of_student, of_teacher: the pair's gammas, [h_student] and [h_teacher].
    """
    plan = require_plan(plan, "projection_init")
    planned = (plan.source.hidden_size, plan.target.hidden_size)
    require(
        planned == sizes,
        f"distillation.hidden_states.projection_init=plan: the plan cuts hidden_size {planned[0]} to {planned[1]}, "
        f"but the teacher has {sizes[0]} and the student {sizes[1]}. Distil from the model that was pruned, or set "
        "projection_init=random.",
    )
    where = plan.hidden if plan.has_basis else torch.eye(sizes[0])[:, plan.hidden]
    number = pair.student.norm_cut_from(plan)
    scale = 1.0 if number is None or plan.norm_scale is None else float(plan.norm_scale[number])
    silent = of_student == 0
    return of_teacher.unsqueeze(1) * where * (scale / of_student.masked_fill(silent, scale))

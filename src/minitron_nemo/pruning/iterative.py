"""Iterative pruning: cut a little, score again, cut further (arXiv:2407.14679, section 2.2).

Round i of T, from 0, cuts every dim to source - (i + 1) (source - target) / T and scores what is left. The plans of the
rounds are composed into one from the teacher to the last student, which is still cut out of the teacher once.
The paper found no gain over one shot (its table of iterative importance); it is here to be measured on other models.
Nothing here communicates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from minitron_nemo.checks import require
from minitron_nemo.plan import PruningPlan
from minitron_nemo.pruning.composition import compose
from minitron_nemo.pruning.planning import plan_from_importance
from minitron_nemo.scores import Importance
from minitron_nemo.shape import ModelShape


def plan_in_rounds(
    importance: Importance,
    targets: Sequence[ModelShape],
    score: Callable[[PruningPlan], Importance],
    *,
    agreed: Callable[[PruningPlan], PruningPlan] = lambda plan: plan,
    layers: Sequence[int],
    batch_aggregation: str = "l2",
    sequence_aggregation: str = "mean",
) -> PruningPlan:
    """The plan from the scored model to the last of `targets`; before each but the first, what is left is scored.

    Args:
        importance: scores of the model to prune.
        targets: of `targets_of_rounds`.
        score: from a plan to the importance of the student it makes.
        agreed: each round's plan as all ranks follow it.
        layers: kept layers, from 0; the others go in the last round.
    """
    plan = None
    for target in targets:
        step = plan_from_importance(
            importance if plan is None else score(plan),
            importance.shape if plan is None else plan.target,
            target,
            layers=layers if target.num_layers < importance.shape.num_layers else None,
            batch_aggregation=batch_aggregation,
            sequence_aggregation=sequence_aggregation,
        )
        plan = agreed(step if plan is None else compose(plan, step))
    assert plan is not None, "a plan has at least one round"
    return replace(plan, origin={**plan.origin, "rounds": len(targets)})


def targets_of_rounds(source: ModelShape, target: ModelShape, rounds: int, *, multiple: int = 1) -> list[ModelShape]:
    """The shape after each round; the last is `target`.

    Layers go in the last round. Heads shrink by whole steps of their groups.

    Args:
        rounds: T, at least 1.
        multiple: what the dims between must divide by, so that they split over tensor parallelism.
    """
    require(rounds >= 1, f"rounds={rounds} must be at least 1; 1 prunes in one shot.")
    shapes = []
    for done in range(1, rounds):
        dims = {}
        for dim in source.prunable_dims:
            have, want = getattr(source, dim), getattr(target, dim)
            between = have - round(done * (have - want) / rounds)
            dims[dim] = min(have, max(want, -(-between // multiple) * multiple))
        dims["num_layers"] = source.num_layers
        # Groups between source and target need heads that fit them, in no more than the source's number a group.
        groups = dims["num_query_groups"]
        per_group = -(-dims["num_attention_heads"] // groups)
        dims["num_attention_heads"] = groups * max(target.heads_per_group, min(source.heads_per_group, per_group))
        shapes.append(source.pruned_to(**dims))
    return [*shapes, target]

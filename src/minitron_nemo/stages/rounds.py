"""Pruning in rounds: the width cut in steps, and what is left scored before each but the first."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from typing import Any

from megatron.core.models.gpt import GPTModel as MCoreGPTModel
from torch import Tensor

from minitron_nemo import engine, platform
from minitron_nemo.checks import require
from minitron_nemo.config.stages import PruneConfig
from minitron_nemo.config.trainer import Loading
from minitron_nemo.parallel import Groups, agree
from minitron_nemo.plan import PruningPlan
from minitron_nemo.pruning import prune_into
from minitron_nemo.pruning.iterative import plan_in_rounds, targets_of_rounds
from minitron_nemo.resuming import OnePass
from minitron_nemo.scores import Importance
from minitron_nemo.stages.scoring import Calibration


class Rounds:
    """A pruning whose width is scored again between steps; what can be checked before a model is loaded, is."""

    def __init__(
        self, config: PruneConfig, importance: Importance, one_shot: PruningPlan, calibration: Calibration
    ) -> None:
        """
        Args:
            importance: scores of the intact model.
            one_shot: the plan of a single round; says the target and, as layers are scored once, which of them stay.
            calibration: of `importance`.
        Raises: ValueError: a target without a smaller width.
        """
        source, target = one_shot.source, one_shot.target
        require(
            any(getattr(source, dim) != getattr(target, dim) for dim in source.prunable_dims if dim != "num_layers"),
            f"prune.rounds={config.rounds} cuts the width in steps, but the target only drops layers. Set "
            "prune.rounds=1, and estimate importance with depth.greedy to score layers again after every drop.",
        )
        trainer = config.trainer
        multiple = math.lcm(trainer.tensor_model_parallel_size, trainer.expert_model_parallel_size)
        self.targets = targets_of_rounds(source, target, config.rounds, multiple=multiple)
        self._config, self._importance, self._one_shot, self._calibration = config, importance, one_shot, calibration

    def plan(self, teacher: MCoreGPTModel) -> PruningPlan:
        """The plan from teacher to target. Every round cuts a student out of the teacher, scores it and lets it go.

        Communicates: as `prune_into` and `Calibration.score`, once per round but the first.
        """
        config, origin = self._config, self._one_shot.origin

        def score(plan: PruningPlan) -> Importance:
            student = cut(teacher, plan, config.trainer)
            return self._calibration.score(
                student,
                plan.target,
                self._calibration.drawn,
                {"model": origin.get("model")},
                OnePass("importance of a round"),
            )

        plan = plan_in_rounds(
            self._importance,
            self.targets,
            score,
            agreed=plan_of_rank_zero,
            layers=self._one_shot.layer.tolist(),
            batch_aggregation=config.batch_aggregation,
            sequence_aggregation=config.sequence_aggregation,
        )
        return replace(plan, origin={**plan.origin, "depth": origin["depth"]})


def plan_of_rank_zero(plan: PruningPlan) -> PruningPlan:
    """The plan with rank 0's choices and basis: of nearly equal scores or axes another processor may take others.

    Communicates: all ranks.
    """
    entries: dict[str, Any] = {field.name: getattr(plan, field.name) for field in fields(plan)}
    chosen = {name: entry for name, entry in entries.items() if isinstance(entry, Tensor)}
    agreed: dict[str, Any] = {name: agree(entry.to(platform.device())).cpu() for name, entry in chosen.items()}
    return replace(plan, **agreed)


def cut(teacher: MCoreGPTModel, plan: PruningPlan, trainer: Loading) -> MCoreGPTModel:
    """This rank's part of the student, in the teacher's numbers. Communicates: see `prune_into`."""
    student = engine.new_core(plan.target, trainer, next(teacher.parameters()).dtype)
    prune_into(teacher, student, plan, Groups.from_megatron())
    return student

"""Adam and its learning-rate schedules, as NeMo optimizer modules."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.optimizer import OptimizerConfig
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from nemo.lightning.pytorch.optim import MegatronOptimizerModule
from nemo.lightning.pytorch.optim.base import LRSchedulerModule
from torch.optim.lr_scheduler import LambdaLR

from minitron_nemo import platform
from minitron_nemo.config.training import OptimConfig, lr_multiplier
from minitron_nemo.distillation.teacher_student import teacher_student_in
from minitron_nemo.nemo.core_016 import optimizer_by_conditions


class WarmupDecay(LRSchedulerModule):
    """`lr_multiplier` as a NeMo scheduler module."""

    def __init__(self, config: OptimConfig, steps: int, teacher_factor: float = 1.0) -> None:
        """
        Args:
            teacher_factor: the rate of a teacher that learns, by the student's.
        """
        super().__init__()
        self.config, self.teacher_factor = config, teacher_factor
        self.max_steps = steps  # NeMo's strategy writes the trainer's max_steps here

    def scheduler(self, model: Any, optimizers: Any) -> dict[str, Any]:
        def scaled(factor: float) -> Callable[[int], float]:
            return lambda step: factor * lr_multiplier(step, config=self.config, steps=self.max_steps)

        groups = optimizers.param_groups
        for group in groups:
            group["lr"] = self.config.lr  # what all multipliers are of
        factors = [self.teacher_factor if _is_teachers(group) else 1.0 for group in groups]
        schedule = LambdaLR(optimizers, [scaled(factor) for factor in factors])
        return {"optimizer": optimizers, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


_TEACHERS = 0.0
"""What Megatron multiplies the rate of a teacher's parameters by. It makes groups of parameters by weight decay and
this number alone, and knows the groups of a checkpoint by them, so it is not the rate that they get, which may be
another when training goes on: `WarmupDecay` sets that."""


def _is_teachers(group: dict[str, Any]) -> bool:
    """Of a group of parameters; also where this rank holds none of them."""
    return group["pre_lr_mult"] == _TEACHERS  # NeMo's name for it, once it is applied


class SkippingOptimizer(MegatronOptimizerModule):
    """Megatron's optimizer; a step whose gradient is not finite changes no weight and no moment.

    The parameters of a teacher that learns are groups of their own.
    """

    skipped = False
    """Whether the last step was skipped; the same on every rank, as they share the gradient's norm."""
    clip_apart: float | None = None
    """Beside a teacher that learns: the largest norm of either model's gradient, each clipped by its own, so that
    neither's step depends on the other's. None: there is one model, which Megatron clips."""

    def optimizers(self, model: Any) -> list[torch.optim.Optimizer]:
        both = teacher_student_in(model)
        teacher = None if both is None else both.learning_teacher
        if teacher is not None:
            of_teacher = set(teacher.parameters())
            self.scale_lr_cond, self.lr_mult = lambda _, parameter: parameter in of_teacher, _TEACHERS
        with optimizer_by_conditions():
            [optimizer] = super().optimizers(model)
        megatron = optimizer.mcore_optimizer
        prepare_grads, get_grad_norm = megatron.prepare_grads, megatron.get_grad_norm
        norm = math.nan  # of the student

        def prepare_finite_grads() -> bool:
            nonlocal norm
            self.skipped = prepare_grads()
            if not self.skipped and self.clip_apart is None:
                norm = get_grad_norm()
                self.skipped = not math.isfinite(norm)
            elif not self.skipped and self.clip_apart is not None:
                of_teacher = _clip_by_its_norm(megatron, get_grad_norm, self.clip_apart, teachers=True)
                norm = _clip_by_its_norm(megatron, get_grad_norm, self.clip_apart, teachers=False)
                self.skipped = not math.isfinite(of_teacher + norm)
            return self.skipped

        megatron.prepare_grads = prepare_finite_grads
        megatron.get_grad_norm = lambda: norm  # asked next, in the same step: it takes a reduction over all ranks
        return [optimizer]


def _clip_by_its_norm(megatron: Any, norm_of: Callable[[], float], max_norm: float, *, teachers: bool) -> float:
    """Clip the gradients of one of two models and return their norm before. Communicates: as Megatron's norm does."""
    parts = megatron.chained_optimizers
    for part in parts:
        groups = (group for group in part.param_groups if _is_teachers(group) == teachers)
        chosen = [parameter for group in groups for parameter in group["params"]]
        part.get_parameters = lambda chosen=chosen: chosen  # what norm and clipping go by
    try:
        norm = norm_of()
        for part in parts:
            if max_norm > 0 and (parameters := part.get_parameters()):
                precise = part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8
                clip_grad_by_total_norm_fp32(parameters, max_norm, norm, precise)
    finally:
        for part in parts:
            del part.get_parameters
    return norm


def build_optimizer(
    config: OptimConfig, *, steps: int, dtype: torch.dtype, teacher_lr: float = 0.0
) -> SkippingOptimizer:
    """Megatron's Adam: float32 master weights under bf16, sharded over data-parallel ranks where that is supported.

    Args:
        teacher_lr: peak rate of a teacher that learns beside the student, under the same schedule; 0: it does not.
    """
    teacher_learns = teacher_lr > 0
    optimizer = SkippingOptimizer(
        config=OptimizerConfig(
            optimizer="adam",
            lr=config.lr,
            min_lr=config.min_lr,
            weight_decay=config.weight_decay,
            adam_beta1=config.adam_beta1,
            adam_beta2=config.adam_beta2,
            adam_eps=config.adam_eps,
            clip_grad=0.0 if teacher_learns else config.clip_grad,
            bf16=dtype == torch.bfloat16,
            use_distributed_optimizer=platform.supports_distributed_optimizer(),
        ),
        lr_scheduler=WarmupDecay(config, steps, teacher_lr / config.lr),
    )
    if teacher_learns:
        optimizer.clip_apart = config.clip_grad
    return optimizer

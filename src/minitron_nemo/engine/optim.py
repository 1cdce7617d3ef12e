"""Adam and its learning-rate schedules, as NeMo optimizer modules.

Schedules (steps counted from 0): linear warm-up to `lr`, then cosine to `min_lr`, or WSD (warm-up, stable, linear decay
over the last `decay_steps`), or constant.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.optimizer import OptimizerConfig
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from nemo.lightning.pytorch.optim import MegatronOptimizerModule
from nemo.lightning.pytorch.optim.base import LRSchedulerModule
from torch.optim.lr_scheduler import LambdaLR

from minitron_nemo import platform
from minitron_nemo.checks import did_you_mean, require

SCHEDULES = ("cosine", "wsd", "constant")


@dataclass
class OptimConfig:
    lr: float = 1e-4
    """Peak learning rate. Minitron distils at 1e-4 (arXiv:2408.11796, table 4)."""
    min_lr: float = 1e-5
    """Floor of the schedule."""
    warmup_steps: int = 40
    """Steps of linear warm-up. 40 to 60 in arXiv:2408.11796."""
    schedule: str = "cosine"
    """cosine, wsd or constant."""
    decay_steps: int = 0
    """wsd only: length of the final linear decay, in steps."""
    weight_decay: float = 0.1
    """Not applied to biases and norms (Megatron's rule)."""
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_eps: float = 1e-8
    clip_grad: float = 1.0
    """Largest global gradient norm; 0 switches clipping off."""

    def __post_init__(self) -> None:
        require(self.lr > 0, f"optim.lr={self.lr} must be positive.")
        require(0 <= self.min_lr <= self.lr, f"optim.min_lr={self.min_lr} must lie between 0 and lr={self.lr}.")
        for name in ("warmup_steps", "decay_steps"):
            require(getattr(self, name) >= 0, f"optim.{name}={getattr(self, name)} must be at least 0.")
        require(
            self.schedule in SCHEDULES,
            f"optim.schedule={self.schedule} is not known; {did_you_mean(self.schedule, SCHEDULES)}",
        )


def lr_multiplier(step: int, *, config: OptimConfig, steps: int) -> float:
    """Fraction of the peak learning rate used by step `step` of `steps`."""
    floor = config.min_lr / config.lr
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return 1.0
    length = config.decay_steps if config.schedule == "wsd" else steps - config.warmup_steps
    begin = steps - length
    progress = min(max(step - begin, 0) / max(length, 1), 1.0)
    if config.schedule == "wsd":
        return 1.0 - (1.0 - floor) * progress
    return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))


class WarmupDecay(LRSchedulerModule):
    """`lr_multiplier` as a NeMo scheduler module."""

    def __init__(self, config: OptimConfig, steps: int, teacher_factor: float = 1.0) -> None:
        """
        Args:
            teacher_factor: the teacher's rate by the student's, where it learns too.
        """
        super().__init__()
        self.config, self.teacher_factor = config, teacher_factor
        self.max_steps = steps  # NeMo's strategy writes the trainer's max_steps here

    def scheduler(self, model: Any, optimizers: Any) -> dict[str, Any]:
        def scaled(factor: float) -> Callable[[int], float]:
            return lambda step: factor * lr_multiplier(step, config=self.config, steps=self.max_steps)

        factors = [self.teacher_factor if _is_teachers_group(group) else 1.0 for group in optimizers.param_groups]
        schedule = LambdaLR(optimizers, [scaled(factor) for factor in factors])
        return {"optimizer": optimizers, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class SkippingOptimizer(MegatronOptimizerModule):
    """Megatron's optimizer; a step whose gradient is not finite changes no weight and no moment.

    Of a teacher that is corrected beside its student, the gradients are clipped by their own norm, and so are the
    student's: neither's step depends on the other's.
    """

    skipped = False
    """Whether the last step was skipped; the same on every rank, as they share the gradient's norm."""
    teacher_learns = False

    def optimizers(self, model: Any) -> list[torch.optim.Optimizer]:
        [optimizer] = super().optimizers(model)
        megatron = optimizer.mcore_optimizer
        apart = _Apart(megatron) if self.teacher_learns else None
        prepare_grads, step_with_ready_grads = megatron.prepare_grads, megatron.step_with_ready_grads

        def prepare_finite_grads() -> bool:
            self.skipped = prepare_grads()
            if apart is not None and not self.skipped:
                self.skipped = not math.isfinite(apart.clip_teacher(self.config.clip_grad))
                apart.only = _STUDENT
            self.skipped = self.skipped or not math.isfinite(megatron.get_grad_norm())
            if apart is not None and self.skipped:
                apart.only = None
            return self.skipped

        def step_all() -> bool:
            if apart is not None:
                apart.only = None
            return step_with_ready_grads()

        megatron.prepare_grads, megatron.step_with_ready_grads = prepare_finite_grads, step_all
        return [optimizer]


_STUDENT, _TEACHER = "student", "teacher"
_TEACHERS_MARK = math.nextafter(1.0, 0.0)
"""Multiplier of the teacher's rate for Megatron, which makes groups of parameters by it and knows them again by it."""


def _is_teachers(name: str, _: torch.nn.Parameter) -> bool:
    return _TEACHER in name.split(".")


def _is_teachers_group(group: dict[str, Any]) -> bool:
    return group["pre_lr_mult"] == _TEACHERS_MARK  # NeMo's name for it, once it is applied


class _Apart:
    """Makes Megatron's norm and clipping of gradients see one of two models.

    `only` says which one; None: both.
    """

    def __init__(self, megatron: Any) -> None:
        self.only: str | None = None
        self.megatron = megatron
        self.parts: list[Any] = getattr(megatron, "chained_optimizers", [megatron])
        for part in self.parts:
            part.get_parameters = lambda part=part: self._parameters(part)

    def _parameters(self, part: Any) -> list[torch.nn.Parameter]:
        groups = getattr(part.optimizer, "param_groups", [])
        return [
            parameter
            for group in groups
            if self.only is None or self.only == (_TEACHER if _is_teachers_group(group) else _STUDENT)
            for parameter in group["params"]
        ]

    def clip_teacher(self, max_norm: float) -> float:
        """The norm of the teacher's gradients before. Communicates: as Megatron's norm of gradients."""
        self.only = _TEACHER
        norm = float(self.megatron.get_grad_norm())
        for part in self.parts:
            if max_norm > 0 and math.isfinite(norm) and (parameters := part.get_parameters()):
                precise = part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8
                clip_grad_by_total_norm_fp32(parameters, max_norm, norm, precise)
        return norm


def build_optimizer(config: OptimConfig, *, steps: int, bf16: bool, teacher_lr: float = 0.0) -> SkippingOptimizer:
    """Megatron's Adam: float32 master weights under bf16, sharded over data-parallel ranks where that is supported.

    Args:
        teacher_lr: peak rate of a teacher that learns beside the student, under the same schedule; 0: it does not.
    """
    optimizer = SkippingOptimizer(
        config=OptimizerConfig(
            optimizer="adam",
            lr=config.lr,
            min_lr=config.min_lr,
            weight_decay=config.weight_decay,
            adam_beta1=config.adam_beta1,
            adam_beta2=config.adam_beta2,
            adam_eps=config.adam_eps,
            clip_grad=config.clip_grad,
            bf16=bf16,
            use_distributed_optimizer=platform.supports_distributed_optimizer(),
        ),
        lr_scheduler=WarmupDecay(config, steps, teacher_lr / config.lr),
        scale_lr_cond=_is_teachers if teacher_lr > 0 else None,
        lr_mult=_TEACHERS_MARK,
    )
    optimizer.teacher_learns = teacher_lr > 0
    return optimizer

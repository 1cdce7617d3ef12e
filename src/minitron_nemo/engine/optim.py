"""Adam and its learning-rate schedules, as NeMo optimizer modules.

Schedules (steps counted from 0): linear warm-up to `lr`, then cosine to `min_lr`, or WSD (warm-up, stable, linear decay
over the last `decay_steps`), or constant.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.optimizer import OptimizerConfig
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

    def __init__(self, config: OptimConfig, steps: int) -> None:
        super().__init__()
        self.config = config
        self.max_steps = steps  # NeMo's strategy writes the trainer's max_steps here

    def scheduler(self, model: Any, optimizers: Any) -> dict[str, Any]:
        schedule = LambdaLR(optimizers, lambda step: lr_multiplier(step, config=self.config, steps=self.max_steps))
        return {"optimizer": optimizers, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class SkippingOptimizer(MegatronOptimizerModule):
    """Megatron's optimizer; a step whose gradient is not finite changes no weight and no moment."""

    skipped = False
    """Whether the last step was skipped; the same on every rank, as they share the gradient's norm."""

    def optimizers(self, model: Any) -> list[torch.optim.Optimizer]:
        [optimizer] = super().optimizers(model)
        megatron = optimizer.mcore_optimizer
        prepare_grads = megatron.prepare_grads

        def prepare_finite_grads() -> bool:
            self.skipped = prepare_grads() or not math.isfinite(megatron.get_grad_norm())
            return self.skipped

        megatron.prepare_grads = prepare_finite_grads
        return [optimizer]


def build_optimizer(config: OptimConfig, *, steps: int, bf16: bool) -> SkippingOptimizer:
    """Megatron's Adam: float32 master weights under bf16, sharded over data-parallel ranks where that is supported."""
    return SkippingOptimizer(
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
        lr_scheduler=WarmupDecay(config, steps),
    )

"""One training run: steps, schedule, checkpoints, a task that is watched: conf's `training` groups."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

from minitron_nemo.checks import did_you_mean, require
from minitron_nemo.config.ranges import Ranged, ranged

SCHEDULES = ("cosine", "wsd", "constant")


@dataclass
class OptimConfig(Ranged):
    KEY: ClassVar[str] = "training.optim"

    lr: float = ranged(1e-4, above=0)
    """Peak learning rate. Minitron distils at 1e-4 (arXiv:2408.11796, table 4)."""
    min_lr: float = ranged(1e-5, at_least=0)
    """Floor of the schedule, at most lr."""
    warmup_steps: int = ranged(40, at_least=0)
    """Steps of linear warm-up, at most training.steps. 40 to 60 in arXiv:2408.11796."""
    schedule: str = "cosine"
    """cosine, wsd or constant."""
    decay_steps: int = ranged(0, at_least=0)
    """wsd only: length of the final linear decay, in steps."""
    weight_decay: float = ranged(0.1, at_least=0)
    """Not applied to biases and norms (Megatron's rule)."""
    adam_beta1: float = ranged(0.9, at_least=0, below=1)
    adam_beta2: float = ranged(0.95, at_least=0, below=1)
    adam_eps: float = ranged(1e-8, above=0)
    clip_grad: float = ranged(1.0, at_least=0)
    """Largest global gradient norm; 0 switches clipping off."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.min_lr <= self.lr, f"{self.KEY}.min_lr={self.min_lr} must be at most {self.KEY}.lr={self.lr}.")
        require(
            self.schedule in SCHEDULES,
            f"{self.KEY}.schedule={self.schedule} is not known; {did_you_mean(self.schedule, SCHEDULES)}",
        )


def lr_multiplier(step: int, *, config: OptimConfig, steps: int) -> float:
    """Fraction of the peak learning rate used by step `step` of `steps`, counted from 0.

    Linear warm-up to `lr`, then cosine to `min_lr`, or WSD (warm-up, stable, linear decay over the last `decay_steps`),
    or constant.
    """
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


@dataclass
class DownstreamConfig(Ranged):
    """A task that is watched, and what is done where the model gets worse at it."""

    KEY: ClassVar[str] = "training.downstream"

    file: str | None = None
    """JSONL file of multiple-choice questions, one a line: {"context", "options", "answer"} or Winogrande's own fields;
    or YAML of a multiple-choice task of lm_eval; null: no task is watched."""
    every: int = ranged(1, at_least=1)
    """Validations per evaluation."""
    normalize: bool = False
    """Divide an option's log-likelihood by its number of characters (acc_norm of lm-evaluation-harness; else acc)."""
    patience: int = ranged(3, at_least=1)
    """Evaluations in a row that are worse than the best before the run is said to over-fit."""
    keep_best: bool = False
    """Give the artifact the weights of the best evaluation, not the last step's. Writes them at each new best."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.file is not None or not self.keep_best,
            "training.downstream.keep_best=true needs a task to be best at. Set training.downstream.file.",
        )


@dataclass
class TrainingConfig(Ranged):
    """One training run."""

    KEY: ClassVar[str] = "training"

    steps: int = ranged(100, at_least=1)
    """Optimizer steps."""
    validation_every: int = ranged(0, at_least=0)
    """Steps between validations; 0 validates never."""
    validation_batches: int = ranged(8, at_least=1, mend="training.validation_every=0 validates never")
    """Global batches per validation."""
    checkpoint_every: int = ranged(100, at_least=0, how=True)
    """Steps between resumable checkpoints; 0 writes none but when the run is told to stop."""
    continue_from: str | None = None
    """Artifact of the phase before this one, made with keep_optimizer=true: its weights and its optimizer's moments go
    on under this run's steps, schedule, data, batch, sequence length and layout."""
    keep_optimizer: bool = False
    """Leave the optimizer's state in the artifact, for a later phase."""
    max_skipped_steps: int = ranged(10, at_least=1)
    """Steps in a row with a gradient that is not finite, which change nothing, before the run ends."""
    moe_aux_loss_coeff: float | None = ranged(None, at_least=0)
    """Of a mixture of experts: weight of its routers' load-balancing loss, which is minimised beside the run's own and
    logged without this weight; 0: none. Null: 0 where a teacher is learned from, else the family's own."""
    downstream: DownstreamConfig = field(default_factory=DownstreamConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        warmup, decay = self.optim.warmup_steps, self.optim.decay_steps if self.optim.schedule == "wsd" else 0
        require(
            warmup <= self.steps,
            f"training.optim.warmup_steps={warmup} is more than training.steps={self.steps}: the learning rate would "
            f"never arrive. Set training.optim.warmup_steps={self.steps // 10}, or more steps.",
        )
        require(
            warmup + decay <= self.steps,
            f"training.optim.decay_steps={decay} after training.optim.warmup_steps={warmup} is more than "
            f"training.steps={self.steps}. Set training.optim.decay_steps to at most {self.steps - warmup}.",
        )
        if self.downstream.file is not None:
            steps = self.validation_every * self.downstream.every
            require(
                1 <= steps <= self.steps,
                f"training.downstream.file={self.downstream.file} is evaluated every {self.downstream.every} "
                f"validations, and training.validation_every={self.validation_every} makes this no step of "
                f"training.steps={self.steps}. Set training.validation_every between 1 and training.steps.",
            )
        require(
            not (self.downstream.keep_best and self.keep_optimizer),
            "training.downstream.keep_best=true gives the artifact the weights of an earlier step, to which the "
            "optimizer's state of training.keep_optimizer=true does not belong. Set one of them to false.",
        )

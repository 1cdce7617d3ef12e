"""What a training run is, said without any trainer's classes: a stage says it, and `engine.train` does it.

<output>.training/             kept until the artifact is whole, so that a killed run continues
    checkpoints/step-N/        the newest complete checkpoint: weights, optimizer, data position
    history.jsonl              see nemo/history.py
    tensorboard/ wandb/        what those loggers write
    index/                     of the data
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.core.models.gpt import GPTModel as MCoreGPTModel
from torch.utils.data import Dataset

from minitron_nemo.config.data import DataConfig
from minitron_nemo.config.distillation import DistillationConfig
from minitron_nemo.config.trainer import TrainerConfig
from minitron_nemo.config.training import TrainingConfig
from minitron_nemo.distillation.teacher import TeacherSource
from minitron_nemo.plan import PruningPlan
from minitron_nemo.shape import ModelShape
from minitron_nemo.text.questions import Question

HISTORY = "history.jsonl"
CHECKPOINTS = "checkpoints"
OPTIMIZER = "optimizer"
"""Folder of an artifact with the last checkpoint of its run."""


@dataclass(frozen=True)
class Trainee:
    """The model that is trained, and whom it learns from."""

    shape: ModelShape
    tokenizer: Path
    """Directory of the HF tokenizer."""
    vocab_size: int
    """Rows of the embedding that are tokens; the rest is padding."""
    weights: Path | None = None
    """Of the model artifact that training starts from; None: random."""
    teacher: TeacherSource | None = None
    """None: the next token is learned."""
    plan: PruningPlan | None = None
    """By which it was cut from the teacher; hidden losses may ask for it."""
    distillation: DistillationConfig | None = None
    """Given where there is a teacher."""


@dataclass(frozen=True)
class TrainingRun:
    """One training run on the layout that stands."""

    trainee: Trainee
    data: DataConfig
    trainer: TrainerConfig
    training: TrainingConfig
    directory: Path
    """For checkpoints, logs and history; survives a kill."""
    label: str
    """For the progress line."""
    questions: Sequence[Question] = ()
    """Of the downstream task; all of them on every rank."""
    pause_at: int | None = None
    """Step after which the run validates, saves and raises `Paused`; the same run without it goes on there."""
    train_dataset: Callable[[int], Dataset] | None = None
    """Given the number of samples of the run, what it trains on; None: shuffled windows of the prepared data."""


@dataclass(frozen=True)
class Trained:
    """What a training run came to."""

    core: MCoreGPTModel
    """This rank's part of the model; the weights of the best evaluation where these were to be kept."""
    history: list[dict[str, Any]]
    """On rank 0; empty elsewhere."""
    teacher_core: MCoreGPTModel | None = None
    """This rank's part of a teacher that learned beside it."""
    best: dict[str, Any] | None = None
    """The best evaluation, {step, downstream_accuracy}, where its weights were to be kept."""


def checkpoint_of(checkpoints: Path, step: int) -> Path:
    """Folder of the checkpoint of a step."""
    return checkpoints / f"step-{step}"


def newest_checkpoint(checkpoints: Path) -> Path | None:
    """The newest whole one of a run's checkpoints."""
    found = checkpoints.glob("step-*[0-9]")
    return max(found, key=lambda path: int(path.name.split("-")[1]), default=None)

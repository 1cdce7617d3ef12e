"""What a training run survives: being killed, being told to stop, and steps whose gradient is not finite.

    killed at any moment       continues from the newest whole checkpoint (`ResumableCheckpoints`), and validates there
                               only what is still to be (`ResumedValidation`)
    told to stop (stopping.py) ends after the step at hand with a checkpoint and `Interrupted`, which the doors make
                               exit code 75 (`StopWhenAsked`); the same command continues it
    asked to pause at a step   validates there and ends with a checkpoint and `Paused`
    a gradient not finite      changes no weight; too many in a row end the run (`SkippedSteps`, `optim.py`)

Communication: every rank, one number a step, in `StopWhenAsked`; one where a run goes on; a checkpoint's own.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from minitron_nemo.checks import Interrupted, Mistake, Paused
from minitron_nemo.nemo.optim import SkippingOptimizer
from minitron_nemo.parallel import all_reduce_max, rank_zero_works, world
from minitron_nemo.runtime.training_run import checkpoint_of, newest_checkpoint
from minitron_nemo.stopping import listening, only_this_process, told_to_stop


class ResumableCheckpoints(pl.Callback):
    """Every `every` steps a complete checkpoint (weights, optimizer, data position) in `directory/step-N`.

    Written under a temporary name and renamed, so that the newest `step-N` is always whole; older ones are removed.
    """

    def __init__(self, directory: Path, every: int, *, also_the_last: bool = False) -> None:
        self.directory, self.every, self.also_the_last = directory, every, also_the_last

    def newest(self) -> Path | None:
        """Communicates: all ranks."""
        return rank_zero_works(lambda: newest_checkpoint(self.directory))

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        step = trainer.global_step
        last = step == trainer.max_steps
        if self.also_the_last if last else self.every and step % self.every == 0:
            self.save(trainer)

    def save(self, trainer: pl.Trainer) -> None:
        """Write the checkpoint of the step that has just ended, unless it is there. Communicates: every rank."""
        step = trainer.global_step
        whole = checkpoint_of(self.directory, step)
        writing = whole.with_name(f"{whole.name}.partial")
        previous = self.newest()
        if previous == whole:
            return
        with only_this_process():
            trainer.save_checkpoint(writing)

        def replace() -> None:
            writing.rename(whole)
            if previous is not None:
                shutil.rmtree(previous)

        rank_zero_works(replace)


class ResumedValidation(pl.Callback):
    """Validates where a run goes on if that was still to be, by the samples of every other validation.

    By itself Lightning 2.4 validates there whenever the step is one that validates, and reads on behind the samples of
    the validation before the checkpoint: one batch, or none.
    """

    def __init__(self, validated: Callable[[int], bool]) -> None:
        """
        Args:
            validated: whether a step's validation has been written, asked on rank 0.
        """
        self.validated = validated
        self._batches: int | float = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Communicates: all ranks."""
        loop = trainer.fit_loop.epoch_loop
        if not (loop.restarting and trainer.enable_validation):
            return
        loop.val_loop.restarting = False
        if rank_zero_works(lambda: self.validated(trainer.global_step)):
            self._batches, trainer.limit_val_batches = trainer.limit_val_batches, 0

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if self._batches:
            self._batches, trainer.limit_val_batches = 0, self._batches


class StopWhenAsked(pl.Callback):
    """Ends the run after the step in which any rank was asked to stop, or where it pauses; saves it then."""

    def __init__(self, checkpoints: ResumableCheckpoints, pause_at: int | None = None) -> None:
        self.checkpoints, self.pause_at = checkpoints, pause_at
        self.stopped_after: int | None = None
        """Steps done when the run was stopped; None while it was not."""
        self.asked = False
        self._closing = ExitStack()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._closing.enter_context(listening())

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Communicates: every rank, a maximum of one number."""
        asked = told_to_stop()
        anyone = all_reduce_max(torch.tensor(float(asked), device=pl_module.device), group=world())
        if trainer.global_step == trainer.max_steps:
            return
        if bool(anyone):
            self.checkpoints.save(trainer)
            trainer.limit_val_batches = 0  # else Lightning validates on the way out
        if bool(anyone) or trainer.global_step == self.pause_at:
            self.stopped_after = trainer.global_step
            self.asked = bool(anyone)
            trainer.should_stop = True

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A pause is saved with its validation behind it, so that one killed in between comes there again."""
        if trainer.global_step == self.pause_at and self.stopped_after is not None:
            self.checkpoints.save(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._closing.close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._closing.close()

    def require_finished(self, steps: int) -> None:
        """Raises: Paused, Interrupted: the run was stopped."""
        if self.stopped_after is not None and not self.asked:
            raise Paused(f"paused after step {self.stopped_after} of {steps}.")
        if self.stopped_after is not None:
            raise Interrupted(
                f"stopped after step {self.stopped_after} of {steps}, as it was asked to; everything is saved. "
                "The same command continues there."
            )


class SkippedSteps(pl.Callback):
    """Says which steps were skipped for a gradient that is not finite, and ends a run that only skips."""

    def __init__(self, optimizer: SkippingOptimizer, checkpoints: ResumableCheckpoints, limit: int, batch: int) -> None:
        """
        Args:
            limit: skipped steps in a row that end the run.
            batch: samples of a step over all ranks.
        """
        self.optimizer, self.checkpoints, self.limit, self.batch = optimizer, checkpoints, limit, batch
        self.in_a_row = 0

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """Raises: ValueError, on every rank: `limit` steps in a row were skipped."""
        if not self.optimizer.skipped:
            self.in_a_row = 0
            return
        self.in_a_row += 1
        step = trainer.global_step
        first = (step - 1) * self.batch
        if trainer.is_global_zero:
            print(
                f"Step {step} changed nothing: its gradient is not finite. Its samples are {first} to "
                f"{first + self.batch - 1}, counted from the start of training.",
                file=sys.stderr,
                flush=True,
            )
        if self.in_a_row >= self.limit:
            newest = self.checkpoints.newest()
            raise Mistake(
                f"{self.in_a_row} steps in a row, up to step {step}, had gradients that are not finite (NaN or "
                f"infinity); training.max_skipped_steps={self.limit}. Lower training.optim.lr, or look at samples "
                f"{first - (self.in_a_row - 1) * self.batch} to {first + self.batch - 1}. "
                + (f"The newest whole checkpoint is {newest}." if newest else "No checkpoint was written before.")
            )

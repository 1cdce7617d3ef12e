"""A task watched while a model trains: a loss that still falls can hide a model that gets worse at what it is for.

    evaluation   accuracy on multiple-choice questions (multiple_choice.py), after validations
    over-fit     `patience` evaluations in a row are below the best accuracy by more than its standard error,
                 sqrt(p (1 - p) / questions), while the validation divergence (without a teacher: the loss) is lower
                 than it was at the best; said once
    best         with `keep_best` the weights of the highest accuracy so far, of equal ones the latest, in `best-step-N`
                 beside the checkpoints, and at the end in the artifact

Whether a run over-fits is read off its history, and which step was best is written beside those weights, so that a run
that was cut off and goes on says the same.

Communication: an evaluation's own (`depth.option_likelihoods`); all ranks where weights are written.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from minitron_nemo.config.training import DownstreamConfig
from minitron_nemo.importance.removal import Pass
from minitron_nemo.nemo.history import History
from minitron_nemo.parallel import rank_zero_works
from minitron_nemo.runtime.depth_sweep import option_likelihoods
from minitron_nemo.runtime.distributed_checkpoint import save_weights
from minitron_nemo.text.questions import Question, accuracy

ACCURACY = "downstream_accuracy"
_FILE = "evaluation.json"


class Downstream(pl.Callback):
    """Evaluates the task after validations; comes after `History` in the list of callbacks."""

    def __init__(
        self, config: DownstreamConfig, questions: Sequence[Question], history: History, directory: Path, *, rows: int
    ) -> None:
        """
        Args:
            directory: of the run; keeps the best weights.
            rows: options of questions that are run at once.
        """
        self.config, self.questions, self.history = config, questions, history
        self.directory, self.rows = directory, rows

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        step = trainer.global_step
        if (step // trainer.val_check_interval) % self.config.every:
            return
        likelihoods = option_likelihoods(
            pl_module.core,
            [Pass()],
            self.questions,
            self.rows,
            vocab_size=pl_module.vocab_size,
            label="task",
            key="training.downstream.file",
        )
        right = float(accuracy(self.questions, likelihoods, normalize=self.config.normalize)[0])
        self.history.add(trainer, {ACCURACY: right})
        if trainer.is_global_zero and (
            warning := over_fit(self.history.records, questions=len(self.questions), patience=self.config.patience)
        ):
            kept = "Its weights are kept." if self.config.keep_best else "training.downstream.keep_best=true keeps it."
            print(f"{warning} {kept}", file=sys.stderr, flush=True)
        if self.config.keep_best:
            self._keep(pl_module.core, {"step": step, ACCURACY: right})

    def _keep(self, core: Any, evaluation: dict[str, Any]) -> None:
        """Write the weights where they are the best so far. Communicates: all ranks, where they are."""
        before = best_kept(self.directory)
        if before is not None and _rank_of(evaluation) <= _rank_of(before[1]):
            return
        whole, writing = (self.directory / f"best-step-{evaluation['step']}{end}" for end in ("", ".partial"))

        def begin() -> None:
            shutil.rmtree(writing, ignore_errors=True)
            writing.mkdir()

        def finish() -> None:
            (writing / _FILE).write_text(json.dumps(evaluation))
            shutil.rmtree(whole, ignore_errors=True)
            writing.rename(whole)
            if before is not None and before[0] != whole:
                shutil.rmtree(before[0])

        rank_zero_works(begin)
        save_weights(core, writing)
        rank_zero_works(finish)


def best_kept(directory: Path) -> tuple[Path, dict[str, Any]] | None:
    """Folder of the best weights that a run in `directory` has kept, and their {step, downstream_accuracy}.

    Communicates: all ranks.
    """

    def look() -> tuple[Path, dict[str, Any]] | None:
        found = [(path, json.loads((path / _FILE).read_text())) for path in directory.glob("best-step-*[0-9]")]
        return max(found, key=lambda each: _rank_of(each[1]), default=None)

    return rank_zero_works(look)


def _rank_of(evaluation: dict[str, Any]) -> tuple[float, int]:
    return evaluation[ACCURACY], evaluation["step"]


def over_fit(records: Sequence[dict[str, Any]], *, questions: int, patience: int) -> str | None:
    """What to say after the last evaluation of a history, where it is the first to make the run over-fit; else None."""
    steps: dict[int, dict[str, Any]] = {}
    for record in records:
        steps.setdefault(record["step"], {}).update(record)
    evaluations = [record for record in steps.values() if ACCURACY in record]
    best: dict[str, Any] | None = None
    in_a_row = 0
    for number, now in enumerate(evaluations, start=1):
        if best is None or now[ACCURACY] >= best[ACCURACY]:
            best, in_a_row = now, 0
            continue
        error = math.sqrt(best[ACCURACY] * (1 - best[ACCURACY]) / questions)
        name = "validation_divergence" if "validation_divergence" in now else "validation_loss"
        worse = now[ACCURACY] < best[ACCURACY] - error and now[name] < best[name]
        in_a_row = in_a_row + 1 if worse else 0
        if in_a_row == patience:
            said_before = number < len(evaluations)
            return None if said_before else _warning(best, now, name, error, questions, patience)
    return None


def _warning(best: dict[str, Any], now: dict[str, Any], name: str, error: float, questions: int, patience: int) -> str:
    return (
        f"Step {now['step']}: {name.replace('_', ' ')} has fallen from {best[name]:.4f} to {now[name]:.4f} since step "
        f"{best['step']}, but accuracy on the task from {best[ACCURACY]:.1%} to {now[ACCURACY]:.1%}; {patience} "
        f"evaluations in a row are worse by more than the standard error ({error:.1%} of {questions} questions). The "
        f"model over-fits; step {best['step']} was best."
    )

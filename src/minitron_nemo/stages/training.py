"""What the training stages share: a model, data and a trainer in; a model artifact with its history out."""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from minitron_nemo import engine
from minitron_nemo.artifact import Artifact, Draft, link_or_copy, open_artifact, saying_when_full, writing
from minitron_nemo.checks import Mistake, reading, require, require_divisible
from minitron_nemo.config.data import DataConfig
from minitron_nemo.config.identity import as_dict, differences
from minitron_nemo.config.trainer import TrainerConfig
from minitron_nemo.config.training import DownstreamConfig, TrainingConfig, lr_multiplier
from minitron_nemo.evaluation.questions import open_questions
from minitron_nemo.parallel import is_rank_zero, rank_zero_says, rank_zero_works
from minitron_nemo.runtime.layout import require_recomputed_layers, require_tokens_split
from minitron_nemo.runtime.training_run import (
    CHECKPOINTS,
    HISTORY,
    OPTIMIZER,
    Trained,
    Trainee,
    TrainingRun,
    checkpoint_of,
    newest_checkpoint,
)
from minitron_nemo.shape import ModelShape
from minitron_nemo.text.encoding import Encoder
from minitron_nemo.text.questions import Question
from minitron_nemo.text.tokenizer import load_tokenizer, vocabulary_size

TRAINING_STAGES = ("pretrain", "correct-teacher", "distill")


def require_vocabulary(shape: ModelShape, tokenizer_path: Path) -> int:
    """Tokens of the tokenizer, for each of which the embedding table must have a row."""
    size = vocabulary_size(load_tokenizer(tokenizer_path))
    require(
        size <= shape.padded_vocab_size,
        f"The tokenizer in {tokenizer_path} knows {size} tokens, but the model's embedding has "
        f"{shape.padded_vocab_size} rows. Use the tokenizer the model was trained with, or set padded_vocab_size to at "
        f"least {size} for a new model.",
    )
    return size


def run_training(
    trainee: Trainee,
    *,
    stage: str,
    label: str,
    trainer: TrainerConfig,
    training: TrainingConfig,
    data: DataConfig,
    output: Path,
    config: Any,
    inputs: Sequence[Artifact],
    train_dataset: Callable[[int], Dataset] | None = None,
    trained: Callable[[Trained], None] = lambda _: None,
    pause_at: int | None = None,
) -> Artifact:
    """Train a model and write it as the artifact `output`.

    Args:
        train_dataset: as `TrainingRun.train_dataset`.
        trained: called when the training is over, before the artifact is written.
        pause_at: as `TrainingRun.pause_at`.

    Checkpoints and logs live in `<output>.training` until the artifact is whole, so a killed run continues there.
    Raises: Paused: it has come to `pause_at`. As `engine.train`.
    """
    require_tokens_split(trainee.shape, trainer)
    require_recomputed_layers(trainee.shape, trainer)
    require(
        trainee.shape.num_moe_experts is not None or not training.moe_aux_loss_coeff,
        f"training.moe_aux_loss_coeff={training.moe_aux_loss_coeff} balances experts, and this model has none. Leave "
        "it out.",
    )
    if data.reset_at_documents and trainer.context_parallel_size > 1:
        chunks = 2 * trainer.context_parallel_size
        require_divisible("data.pad_documents_to", data.pad_documents_to, "2 x trainer.context_parallel_size", chunks)
    if training.continue_from is not None:
        inputs = [*inputs, _phase_before(training.continue_from, trainee.shape, config)]
    run = TrainingRun(
        trainee,
        data,
        trainer,
        training,
        directory_of_run(output),
        label,
        questions=_questions(training.downstream, trainee),
        train_dataset=train_dataset,
        pause_at=pause_at,
    )
    with saying_when_full(output), _leaving_nothing_of_a_mistake(run.directory):
        continue_only_the_same(run.directory, config)
        result = engine.train(run)
        trained(result)
    with writing(output, stage=stage, config=config, inputs=inputs) as draft:
        _write(run, result, draft)
    rank_zero_works(lambda: shutil.rmtree(run.directory, ignore_errors=True))
    return open_artifact(output)


def directory_of_run(output: Path) -> Path:
    """Where a training keeps its checkpoints and history until its artifact `output` is whole."""
    return output.with_name(output.name + ".training")


def _write(run: TrainingRun, result: Trained, draft: Draft) -> None:
    """The model, its history and logs, and what the run came to."""
    trainee, directory = run.trainee, run.directory
    engine.save_model(result.core, trainee.shape, trainee.tokenizer, draft.path)

    def copy() -> None:
        if (directory / HISTORY).is_file() and result.history:
            shutil.copyfile(directory / HISTORY, draft.path / HISTORY)
        for logs in ("tensorboard", "wandb"):
            if (directory / logs).is_dir():
                shutil.copytree(directory / logs, draft.path / logs, symlinks=True)
        if run.training.keep_optimizer:
            last = checkpoint_of(directory / CHECKPOINTS, run.training.steps)  # stays there until the artifact is whole
            shutil.copytree(last, draft.path / OPTIMIZER, copy_function=link_or_copy)

    rank_zero_works(copy)
    draft.facts["vocab_size"] = trainee.vocab_size
    draft.metrics.update(
        parameters=trainee.shape.num_parameters,
        non_embedding_parameters=trainee.shape.num_non_embedding_parameters,
        steps=run.training.steps,
        tokens=run.training.steps * run.trainer.tokens_per_step,
        training_seconds=round(sum(record.get("seconds", 0.0) for record in result.history), 1),
    )
    if result.best is not None:
        draft.metrics["best"] = result.best


def _questions(config: DownstreamConfig, trainee: Trainee) -> list[Question]:
    if config.file is None:
        return []
    encoder, key = Encoder(load_tokenizer(trainee.tokenizer)), "training.downstream.file"
    return open_questions(config.file, encoder, seq_length=trainee.shape.seq_length, key=key)


def _phase_before(path: str, shape: ModelShape, config: Any) -> Artifact:
    """The artifact that a run continues. Raises: ValueError, FileNotFoundError: it cannot."""
    before = open_artifact(path, made_by=TRAINING_STAGES, key="training.continue_from")
    require(
        rank_zero_says((before.path / OPTIMIZER).is_dir()),
        f"training.continue_from={path} holds no {OPTIMIZER}/. Make it with training.keep_optimizer=true, or go on "
        "from its weights alone: give it as the model to train.",
    )
    found = engine.open_model(before.path, key="training.continue_from").shape
    require(
        found == shape,
        f"training.continue_from={path} holds a model of another shape ({found}) than the one to train ({shape}). Name "
        "the phase of this model.",
    )

    def hidden_states(of: dict[str, Any]) -> Any:
        return (of.get("distillation") or {}).get("hidden_states") or {"enabled": False}

    then, now = hidden_states(before.manifest["config"]), hidden_states(as_dict(config))
    learned = ("enabled", "projection", "places", "mapping", "pairs", "k")
    for key in learned:
        require(
            then.get(key) == now.get(key) or not (then["enabled"] or now["enabled"]),
            f"training.continue_from={path} was trained with distillation.hidden_states.{key}={then.get(key)}, not "
            f"{now.get(key)}: what its hidden losses have learned would not fit. Use the same.",
        )
    return before


def continue_only_the_same(directory: Path, config: Any) -> None:
    """A run that was cut off continues with the values it was started with; they are kept beside its checkpoints.

    Raises: ValueError: other values. `training.steps` may change, to end a run sooner or later, and
        `training.keep_optimizer`.
    """
    kept = directory / "config.json"

    def compare_and_keep() -> None:
        if kept.is_file():
            with reading(kept, f"Remove {directory} to start over."):
                started_with = json.loads(kept.read_text())
            for key, then, now in differences(started_with, config):
                require(
                    key in ("training.steps", "training.keep_optimizer"),
                    f"{directory} holds a run that was cut off and was started with {key}={then}, not {now}. "
                    f"Continue it with {key}={then}, or remove {directory} to start over.",
                )
                if key == "training.steps":
                    _say_how_the_rate_bends(directory, config.training, steps_before=int(then))
        directory.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(as_dict(config)))

    rank_zero_works(compare_and_keep)


def _say_how_the_rate_bends(directory: Path, training: TrainingConfig, *, steps_before: int) -> None:
    """A schedule is made for the run's length: what another one does to a run that goes on."""
    checkpoint = newest_checkpoint(directory / CHECKPOINTS)
    if checkpoint is None:
        return
    step, optim = int(checkpoint.name.split("-")[1]), training.optim
    shared = range(step, min(steps_before, training.steps))
    rates = {
        at: [optim.lr * lr_multiplier(at, config=optim, steps=steps) for steps in (steps_before, training.steps)]
        for at in (step, *shared)
    }
    before, now = rates[step]
    if not math.isclose(before, now, rel_tol=1e-2):
        bends = f"the learning rate jumps there from {before:.3g} to {now:.3g}"
    elif other := [at for at, (then, from_now) in rates.items() if not math.isclose(then, from_now, rel_tol=1e-2)]:
        then, from_now = rates[other[-1]]
        bends = f"the learning rate leaves the one it would have had, at step {other[-1]} {from_now:.3g} for {then:.3g}"
    else:
        return
    print(
        f"This run goes on after step {step} with training.steps={training.steps} instead of {steps_before}, and its "
        f"{optim.schedule} schedule is that of the new length: {bends}. As it was begun: "
        f"training.steps={steps_before}, then a phase of its own (training.continue_from).",
        file=sys.stderr,
        flush=True,
    )


@contextmanager
def _leaving_nothing_of_a_mistake(directory: Path) -> Iterator[None]:
    """Remove what a run began to write before its first checkpoint, where the user's values turn out not to work."""
    stood = directory.exists()
    try:
        yield
    except Mistake:
        if is_rank_zero() and not stood and newest_checkpoint(directory / CHECKPOINTS) is None:
            shutil.rmtree(directory, ignore_errors=True)
        raise

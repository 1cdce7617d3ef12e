"""What the training stages share: a model, data and a trainer in; a model artifact with its history out."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minitron_nemo.artifact import Artifact, open_artifact, writing
from minitron_nemo.checks import require
from minitron_nemo.engine.checkpoint import save_model
from minitron_nemo.engine.data import DataConfig, build_data_module
from minitron_nemo.engine.distributed import use_layout
from minitron_nemo.engine.models import EngineModel
from minitron_nemo.engine.progress import HISTORY
from minitron_nemo.engine.tokenizer import load_tokenizer, vocabulary_size
from minitron_nemo.engine.training import TrainerConfig, TrainingConfig, train
from minitron_nemo.shape import ModelShape


def config_dict(config: Any) -> dict[str, Any]:
    """A stage's config as the plain data its manifest keeps."""
    return dataclasses.asdict(config)


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
    model: EngineModel,
    *,
    stage: str,
    label: str,
    tokenizer_path: Path,
    vocab_size: int,
    trainer: TrainerConfig,
    training: TrainingConfig,
    data: DataConfig,
    output: Path,
    config: dict[str, Any],
    inputs: Sequence[Artifact],
) -> Artifact:
    """Train `model` and write it as the artifact `output`.

    Checkpoints and logs live in `<output>.training` until the artifact is whole, so a killed run continues there.
    """
    directory = output.with_name(output.name + ".training")
    tokenizer = load_tokenizer(tokenizer_path)
    module = build_data_module(
        data,
        tokenizer,
        trainer.seq_length,
        trainer.micro_batch_size,
        trainer.global_batch_size,
        index_dir=directory / "index",
    )
    history = train(model, module, trainer, training, directory=directory, label=label)
    with writing(output, stage=stage, config=config, inputs=inputs) as draft:
        save_model(model.core, model.shape, tokenizer_path, draft.path)
        if (directory / HISTORY).is_file() and history:
            shutil.copyfile(directory / HISTORY, draft.path / HISTORY)
        if (directory / "tensorboard").is_dir():
            shutil.copytree(directory / "tensorboard", draft.path / "tensorboard", dirs_exist_ok=True)
        draft.facts["vocab_size"] = vocab_size
        draft.metrics.update(
            parameters=model.shape.num_parameters,
            non_embedding_parameters=model.shape.num_non_embedding_parameters,
            steps=training.steps,
            tokens=training.steps * trainer.tokens_per_step,
            training_seconds=round(sum(record.get("seconds", 0.0) for record in history), 1),
        )
    shutil.rmtree(directory, ignore_errors=True)
    return open_artifact(output)


def prepare_layout(trainer: TrainerConfig, shape: ModelShape, *, seed: int) -> None:
    """Build the groups of `trainer`'s layout after checking that the model's dims split over it."""
    shape.require_splits_over(trainer.tensor_model_parallel_size, trainer.pipeline_model_parallel_size)
    require(
        trainer.seq_length <= shape.seq_length,
        f"trainer.seq_length={trainer.seq_length} is longer than the model's context of {shape.seq_length} tokens. "
        f"Set trainer.seq_length to at most {shape.seq_length}.",
    )
    use_layout(trainer, seed=seed)

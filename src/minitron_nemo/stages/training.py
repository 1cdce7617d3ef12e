"""What the training stages share: a model, data and a trainer in; a model artifact with its history out."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.utils.data import Dataset

from minitron_nemo import platform
from minitron_nemo.artifact import Artifact, link_or_copy, open_artifact, saying_when_full, writing
from minitron_nemo.checks import Mistake, require, require_divisible
from minitron_nemo.config.data import DataConfig
from minitron_nemo.config.identity import as_dict, differences
from minitron_nemo.config.trainer import Layout, TrainerConfig
from minitron_nemo.config.training import DownstreamConfig, TrainingConfig
from minitron_nemo.nemo.data_module import build_data_module
from minitron_nemo.nemo.downstream import best_kept
from minitron_nemo.nemo.history import HISTORY
from minitron_nemo.nemo.models import EngineModel
from minitron_nemo.nemo.trainer import OPTIMIZER, train
from minitron_nemo.runtime.distributed_checkpoint import load_weights
from minitron_nemo.runtime.layout import is_rank_zero, use_layout
from minitron_nemo.runtime.model_artifact import read_shape, save_model
from minitron_nemo.shape import ModelShape
from minitron_nemo.text.questions import Question, read_questions
from minitron_nemo.text.tokenizer import load_tokenizer, plain_encoder, vocabulary_size

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
    config: Any,
    inputs: Sequence[Artifact],
    train_dataset: Callable[[int], Dataset] | None = None,
    trained: Callable[[], None] = lambda: None,
) -> Artifact:
    """Train `model` and write it as the artifact `output`.

    Args:
        train_dataset: as `PackedDataModule.train_dataset`.
        trained: called when the training is over, before the artifact is written.

    Checkpoints and logs live in `<output>.training` until the artifact is whole, so a killed run continues there.
    """
    _require_tokens_split(trainer, model.shape)
    if data.reset_at_documents and trainer.context_parallel_size > 1:
        chunks = 2 * trainer.context_parallel_size
        require_divisible("data.pad_documents_to", data.pad_documents_to, "2 x trainer.context_parallel_size", chunks)
    if training.continue_from is not None:
        inputs = [*inputs, _phase_before(training.continue_from, model.shape, config)]
    tokenizer = load_tokenizer(tokenizer_path)
    questions = _questions(training.downstream, tokenizer, model.shape.seq_length)
    directory = output.with_name(output.name + ".training")
    with saying_when_full(output), _leaving_nothing_of_a_mistake(directory):
        _continue_only_the_same(directory, config)
        module = build_data_module(
            data,
            tokenizer,
            trainer.seq_length,
            trainer.micro_batch_size,
            trainer.global_batch_size,
            index_dir=directory / "index",
            train_dataset=train_dataset,
        )
        history = train(model, module, trainer, training, directory=directory, label=label, questions=questions)
        trained()
    best = best_kept(directory) if training.downstream.keep_best else None
    if best is not None:
        load_weights(model.core, best[0])
    with writing(output, stage=stage, config=as_dict(config), inputs=inputs) as draft:
        save_model(model.core, model.shape, tokenizer_path, draft.path)
        if (directory / HISTORY).is_file() and history:
            shutil.copyfile(directory / HISTORY, draft.path / HISTORY)
        for logs in ("tensorboard", "wandb"):
            if (directory / logs).is_dir() and is_rank_zero():
                shutil.copytree(directory / logs, draft.path / logs, symlinks=True)
        if training.keep_optimizer and is_rank_zero():
            last = directory / "checkpoints" / f"step-{training.steps}"  # stays there until the artifact is whole
            shutil.copytree(last, draft.path / OPTIMIZER, copy_function=link_or_copy)
        draft.facts["vocab_size"] = vocab_size
        draft.metrics.update(
            parameters=model.shape.num_parameters,
            non_embedding_parameters=model.shape.num_non_embedding_parameters,
            steps=training.steps,
            tokens=training.steps * trainer.tokens_per_step,
            training_seconds=round(sum(record.get("seconds", 0.0) for record in history), 1),
        )
        if best is not None:
            draft.metrics["best"] = best[1]
    shutil.rmtree(directory, ignore_errors=True)
    return open_artifact(output)


def _questions(config: DownstreamConfig, tokenizer: Any, seq_length: int) -> list[Question]:
    if config.file is None:
        return []

    encode, end_of_text = plain_encoder(tokenizer), tokenizer.eos_token_id
    key = "training.downstream.file"
    return read_questions(config.file, encode, end_of_text=end_of_text, seq_length=seq_length, key=key)


def _phase_before(path: str, shape: ModelShape, config: Any) -> Artifact:
    """The artifact that a run continues. Raises: ValueError, FileNotFoundError: it cannot."""
    before = open_artifact(path, made_by=TRAINING_STAGES, key="training.continue_from")
    require(
        (before.path / OPTIMIZER).is_dir(),
        f"training.continue_from={path} holds no {OPTIMIZER}/. Make it with training.keep_optimizer=true, or go on "
        "from its weights alone: give it as the model to train.",
    )
    found = read_shape(before.path, key="training.continue_from")
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


def _continue_only_the_same(directory: Path, config: Any) -> None:
    """A run that was cut off continues with the values it was started with; they are kept beside its checkpoints.

    Raises: ValueError: other values. `training.steps` may change, to end a run sooner or later, and
        `training.keep_optimizer`.
    """
    kept = directory / "config.json"
    if kept.is_file():
        for key, then, now in differences(json.loads(kept.read_text()), config):
            require(
                key in ("training.steps", "training.keep_optimizer"),
                f"{directory} holds a run that was cut off and was started with {key}={then}, not {now}. "
                f"Continue it with {key}={then}, or remove {directory} to start over.",
            )
    dist.barrier()  # all have read it
    if is_rank_zero():
        directory.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(as_dict(config)))


@contextmanager
def _leaving_nothing_of_a_mistake(directory: Path) -> Iterator[None]:
    """Remove what a run began to write before its first checkpoint, where the user's values turn out not to work."""
    stood = directory.exists()
    try:
        yield
    except Mistake:
        if is_rank_zero() and not stood and not any((directory / "checkpoints").glob("step-*")):
            shutil.rmtree(directory, ignore_errors=True)
        raise


def _require_tokens_split(layout: Layout, shape: ModelShape) -> None:
    """What Megatron-core asks to train a mixture of experts on tensor-parallel ranks, or to spread its experts."""
    require(
        shape.num_moe_experts is None or layout.tensor_model_parallel_size == 1 or layout.sequence_parallel,
        f"trainer.tensor_model_parallel_size={layout.tensor_model_parallel_size} of a model with experts needs "
        "sequence parallelism, as every rank would route every token. Set trainer.sequence_parallel=true.",
    )


def prepare_layout(layout: Layout, shape: ModelShape, *, seq_length: int = 1, seed: int = 0) -> None:
    """Build the groups of a layout after checking that the model's dims split over it.

    Args:
        seq_length: of the samples that will run through the model.
        seed: of what is drawn: new weights, dropout, generation.
    """
    shape.require_splits_over(
        layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size, layout.expert_model_parallel_size
    )
    if layout.expert_model_parallel_size > 1:
        _require_tokens_split(layout, shape)
    require(
        seq_length <= shape.seq_length,
        f"trainer.seq_length={seq_length} is longer than the model's context of {shape.seq_length} tokens. "
        f"Set trainer.seq_length to at most {shape.seq_length}.",
    )
    require(
        layout.context_parallel_size == 1 or platform.has_transformer_engine(),
        f"trainer.context_parallel_size={layout.context_parallel_size} needs transformer-engine, whose attention "
        "passes keys and values between ranks; this machine has none. Set trainer.context_parallel_size=1.",
    )
    use_layout(layout, seed=seed)

"""pretrain: next-token cross-entropy, from random weights (`shape`) or from a model (`initial`).

Makes the embedded teacher, and the controls a distillation is measured against: the same shape from scratch, and the
pruned student retrained without a teacher.
"""

from __future__ import annotations

from pathlib import Path

from minitron_nemo import engine
from minitron_nemo.artifact import Artifact
from minitron_nemo.checks import require
from minitron_nemo.config.stages import PretrainConfig
from minitron_nemo.runtime.layout import prepare_layout
from minitron_nemo.runtime.training_run import Trainee
from minitron_nemo.shape import ModelShape
from minitron_nemo.stages.training import require_vocabulary, run_training
from minitron_nemo.text.blend import open_blend


def run(config: PretrainConfig) -> Artifact:
    require(
        any((config.shape, config.like, config.initial)),
        "pretrain: nothing says what to train. Set shape (random weights), like (random weights, same shape) or "
        "initial (continue a model).",
    )
    inputs = [artifact for artifact, _ in open_blend(config.data)]
    if config.shape:
        shape, tokenizer = ModelShape.from_dict(config.shape), inputs[0].path / "tokenizer"
        vocab_size = require_vocabulary(shape, tokenizer)
    else:
        key = "like" if config.like else "initial"
        source = engine.open_model(config.like or config.initial, key=key)
        shape, tokenizer, vocab_size = source.shape, source.tokenizer, source.vocab_size
        inputs += source.artifacts
    prepare_layout(config.trainer, shape, seq_length=config.trainer.seq_length, seed=config.seed)
    weights = Path(config.initial) if config.initial else None
    return run_training(
        Trainee(shape, tokenizer, vocab_size, weights=weights),
        stage="pretrain",
        label=Path(config.output).name,
        trainer=config.trainer,
        training=config.training,
        data=config.data,
        output=Path(config.output),
        config=config,
        inputs=inputs,
    )

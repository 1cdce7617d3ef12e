"""pretrain: next-token cross-entropy, from random weights (`shape`) or from a model (`initial`).

Makes the embedded teacher, and the controls a distillation is measured against: the same shape from scratch, and the
pruned student retrained without a teacher.
"""

from __future__ import annotations

from pathlib import Path

from minitron_nemo import platform
from minitron_nemo.artifact import Artifact
from minitron_nemo.checks import require
from minitron_nemo.config.stages import PretrainConfig
from minitron_nemo.nemo.models import PrunableGPTModel
from minitron_nemo.nemo.optim import build_optimizer
from minitron_nemo.runtime.model_artifact import open_model
from minitron_nemo.shape import ModelShape
from minitron_nemo.stages.training import prepare_layout, require_vocabulary, run_training
from minitron_nemo.text.blend import open_blend


def run(config: PretrainConfig) -> Artifact:
    require(
        any((config.shape, config.like, config.initial)),
        "pretrain: nothing says what to train. Set shape (random weights), like (random weights, same shape) or "
        "initial (continue a model).",
    )
    inputs = [artifact for artifact, _ in open_blend(config.data)]
    if config.shape is not None:
        shape, tokenizer = ModelShape.from_dict(config.shape), inputs[0].path / "tokenizer"
        vocab_size = require_vocabulary(shape, tokenizer)
    else:
        key = "like" if config.like else "initial"
        source = open_model(config.like or config.initial, key=key, trust_checkpoint=config.trust_checkpoint)
        shape, tokenizer, vocab_size = source.shape, source.tokenizer, source.vocab_size
        inputs += source.artifacts
    prepare_layout(config.trainer, shape, seq_length=config.trainer.seq_length, seed=config.seed)

    optimizer = build_optimizer(
        config.training.optim, steps=config.training.steps, dtype=platform.dtype_of(config.trainer.precision)
    )
    initial = Path(config.initial) if config.initial else None
    model = PrunableGPTModel(shape, optim=optimizer, initial=initial, **config.trainer.recomputation)
    return run_training(
        model,
        stage="pretrain",
        label=Path(config.output).name,
        tokenizer_path=tokenizer,
        vocab_size=vocab_size,
        trainer=config.trainer,
        training=config.training,
        data=config.data,
        output=Path(config.output),
        config=config,
        inputs=inputs,
    )

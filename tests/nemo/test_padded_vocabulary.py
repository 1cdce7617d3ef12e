"""Rows that pad a vocabulary are no tokens: no loss of any stage knows of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from minitron_nemo import engine
from minitron_nemo.artifact import open_artifact
from minitron_nemo.config.data import DataConfig
from minitron_nemo.config.importance import DepthConfig
from minitron_nemo.config.trainer import TrainerConfig
from minitron_nemo.config.training import OptimConfig, TrainingConfig
from minitron_nemo.importance.removal import Pass
from minitron_nemo.runtime.depth_sweep import estimate_depth, option_likelihoods
from minitron_nemo.runtime.layout import prepare_layout
from minitron_nemo.stages import correct_teacher, evaluate, import_hf
from minitron_nemo.text.questions import Continuation, Question
from support.ranks import Ranks, current_layout
from support.tiny import SEQ_LENGTH, VOCAB_SIZE
from support.tiny_run import TinyRun, trainer_values


def losses(run: TinyRun, divisible_by: int) -> dict[str, list[float]]:
    """Of every kind, with the teacher's vocabulary padded to a multiple."""
    trainer = TrainerConfig(**trainer_values(tensor_model_parallel_size=current_layout().tp))
    data, place = DataConfig(prepared=run.data), f"{run.directory}/padded-{divisible_by}"
    importing = import_hf.ImportHfConfig(model=str(run.hf), make_vocab_size_divisible_by=divisible_by, trainer=trainer)
    importing.output = f"{place}-teacher"
    import_hf.run(importing)
    optim = OptimConfig(lr=1e-3, min_lr=1e-4, warmup_steps=1)
    training = TrainingConfig(steps=3, checkpoint_every=0, validation_every=1, validation_batches=1, optim=optim)
    correct_teacher.run(
        correct_teacher.CorrectTeacherConfig(
            model=importing.output, trainer=trainer, training=training, data=data, output=f"{place}-corrected"
        )
    )
    evaluate.run(
        evaluate.EvaluateConfig(
            model=f"{place}-corrected", num_samples=4, trainer=trainer, data=data, output=f"{place}-evaluation"
        )
    )
    source = engine.open_model(importing.output, key="model")
    prepare_layout(trainer, source.shape, seq_length=SEQ_LENGTH)
    core = engine.open_core(source, trainer, torch.float32)
    ids = torch.randint(VOCAB_SIZE, (2, SEQ_LENGTH + 1), generator=torch.Generator().manual_seed(2))
    places = torch.arange(SEQ_LENGTH).repeat(2, 1)
    batch = {
        "tokens": ids[:, :-1],
        "labels": ids[:, 1:],
        "position_ids": places,
        "loss_mask": torch.ones(2, SEQ_LENGTH),
    }
    depth = estimate_depth(core, source.shape, [batch], DepthConfig(metrics=["loss"]), vocab_size=source.vocab_size)
    options = tuple(Continuation(ids[row, :9].tolist(), 4, 1) for row in range(2))
    task = option_likelihoods(core, [Pass()], [Question(options, 0)], 2, vocab_size=source.vocab_size)
    history = [json.loads(line) for line in Path(f"{place}-corrected", "history.jsonl").read_text().splitlines()]
    return {
        "training": [record["loss"] for record in history if "loss" in record],
        "validation": [record["validation_loss"] for record in history if "validation_loss" in record],
        "held out": [open_artifact(f"{place}-evaluation").metrics["held_out_loss"]],
        "depth": depth["loss"][1].tolist(),
        "task": task.flatten().tolist(),
    }


def test_no_loss_goes_by_how_far_the_vocabulary_is_padded(ranks: Ranks, tiny_run: TinyRun) -> None:
    [bare] = ranks("single").run(losses, tiny_run, 1)
    padded, _ = ranks("tp2").run(losses, tiny_run, 600)  # 88 rows, of which the second rank has all
    assert len(bare["training"]) == len(bare["validation"]) == 3
    for kind, expected in bare.items():
        assert padded[kind] == pytest.approx(expected, rel=5e-4), kind

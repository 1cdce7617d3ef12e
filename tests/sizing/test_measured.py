"""Memory as it is reckoned beside what training really takes, on one CPU: the most a process holds on top of before."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from minitron_nemo.artifact import Artifact
from minitron_nemo.config.data import DataConfig
from minitron_nemo.config.distillation import DistillationConfig
from minitron_nemo.config.trainer import Batch, Layout, Recomputation, TrainerConfig
from minitron_nemo.config.training import OptimConfig, TrainingConfig
from minitron_nemo.shape import ModelShape
from minitron_nemo.sizing.jobs import CROSS_ENTROPY, DIVERGENCE, Job, Model
from minitron_nemo.sizing.machine import Machine
from minitron_nemo.sizing.memory import Memory, memory_of
from support.ranks import Ranks

TEACHER = ModelShape(
    family="llama",
    num_layers=6,
    hidden_size=512,
    ffn_hidden_size=1536,
    num_attention_heads=8,
    num_query_groups=2,
    kv_channels=64,
    padded_vocab_size=8192,
    seq_length=512,
)
STUDENT = dataclasses.replace(TEACHER, hidden_size=384, ffn_hidden_size=1024)
CPU = Machine(1, 1, 0, 0, 1, 1, fused=False, distributed_optimizer=False)
TRAINER = TrainerConfig(precision="fp32", seq_length=256, micro_batch_size=8, global_batch_size=16, tensorboard=False)
RECOMPUTING = dataclasses.replace(TRAINER, recompute_granularity="full")


def peak_of_training(trainer: TrainerConfig, data: Path, tokenizer: Path, directory: Path, *, distilled: bool) -> int:
    """Bytes at most on top of what is held before there is a model, over two steps: the second has Adam's moments."""
    from minitron_nemo import engine
    from minitron_nemo.distillation.teacher import TeacherAtHand
    from minitron_nemo.platform.memory import held_bytes, peak_bytes, reset_peak
    from minitron_nemo.runtime.distributed_checkpoint import save_weights
    from minitron_nemo.runtime.layout import use_layout
    from minitron_nemo.runtime.training_run import Trainee, TrainingRun

    use_layout(Layout(), seed=1)
    trainee = Trainee(STUDENT, tokenizer, STUDENT.padded_vocab_size)
    if distilled:
        for name, shape in (("teacher", TEACHER), ("student", STUDENT)):
            (directory / name).mkdir(parents=True)
            save_weights(engine.new_core(shape, Layout(), torch.float32), directory / name)
        trainee = dataclasses.replace(
            trainee,
            weights=directory / "student",
            teacher=TeacherAtHand(TEACHER, directory / "teacher"),
            distillation=DistillationConfig(),
        )
    training = TrainingConfig(steps=2, checkpoint_every=0, optim=OptimConfig(warmup_steps=1))
    tiny = dataclasses.replace(STUDENT, num_layers=1, hidden_size=32, ffn_hidden_size=32)  # imports, and allocates once
    warm = dataclasses.replace(trainer, micro_batch_size=1, global_batch_size=1)
    prepared = DataConfig(prepared=str(data))
    warming = TrainingRun(Trainee(tiny, tokenizer, 8192), prepared, warm, training, directory / "warm", "warm")
    engine.train(warming)
    reset_peak()
    before = held_bytes()
    engine.train(TrainingRun(trainee, prepared, trainer, training, directory / "run", "run"))
    return peak_bytes() - before


def reckoned(trainer: TrainerConfig, *, distilled: bool) -> Memory:
    models = (Model("student", STUDENT, trained=True), *([Model("teacher", TEACHER)] if distilled else []))
    job = Job(
        models,
        Layout(),
        element=4,
        batch=Batch(trainer.micro_batch_size, trainer.seq_length),
        global_batch_size=trainer.global_batch_size,
        recomputation=Recomputation(trainer.recompute_granularity),
        loss=DIVERGENCE if distilled else CROSS_ENTROPY,
    )
    return memory_of(job, CPU)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trainer", "distilled"),
    [(TRAINER, False), (TRAINER, True), (RECOMPUTING, True)],
    ids=["cross-entropy", "distillation", "distillation with all recomputed"],
)
def test_training_takes_what_was_reckoned(
    ranks: Ranks, prepared: Artifact, tmp_path: Path, trainer: TrainerConfig, distilled: bool
) -> None:
    tokenizer = prepared.path / "tokenizer"
    (found,) = ranks("single").run(peak_of_training, trainer, prepared.path, tokenizer, tmp_path, distilled=distilled)
    memory = reckoned(trainer, distilled=distilled)
    print(f"measured {found / 1e6:.0f} MB, reckoned {memory.total / 1e6:.0f} MB", memory.pieces)
    assert found == pytest.approx(memory.total, rel=0.1), memory.pieces

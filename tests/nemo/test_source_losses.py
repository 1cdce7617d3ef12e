"""Validations of a run on a blend say what each source has come to: the same on every layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from minitron_nemo.config.data import DataConfig
from minitron_nemo.config.trainer import TrainerConfig
from minitron_nemo.config.training import OptimConfig, TrainingConfig
from minitron_nemo.stages import distill, pretrain
from support.ranks import Ranks, current_layout
from support.tiny import SEQ_LENGTH
from support.tiny_run import TinyRun, trainer_values

Blend = list[dict[str, Any]]
SOURCES = ("data", "poems.jsonl", "lists.jsonl")
BATCHES = 4
PER_BATCH = 4


def run_on(blend: Blend, run: TinyRun, output: str, *, learns_from_teacher: bool, micro_batch_size: int) -> None:
    """One step, and a validation after it."""
    layout = current_layout()
    sizes = {
        "tensor_model_parallel_size": layout.tp,
        "pipeline_model_parallel_size": layout.pp,
    }
    trainer = trainer_values(micro_batch_size=micro_batch_size, global_batch_size=PER_BATCH, tensorboard=True, **sizes)
    optim = OptimConfig(lr=1e-2, min_lr=1e-2, warmup_steps=0, schedule="constant")
    options: dict[str, Any] = {
        "trainer": TrainerConfig(**trainer),
        "training": TrainingConfig(
            steps=1, checkpoint_every=0, validation_every=1, validation_batches=BATCHES, optim=optim
        ),
        "data": DataConfig(prepared=blend),
        "output": output,
    }
    if learns_from_teacher:
        distill.run(distill.DistillConfig(teacher=run.teacher, student=run.student, **options))
    else:
        pretrain.run(pretrain.PretrainConfig(initial=run.student, **options))


def by_hand(blend: Blend, model: str, teacher: str, index: str) -> dict[str, float]:
    """From whole logits of one sample after the other, on one process."""
    from minitron_nemo import engine
    from minitron_nemo.nemo.data_module import build_data_module
    from minitron_nemo.runtime.forward import last_logits
    from minitron_nemo.runtime.layout import prepare_layout
    from minitron_nemo.text.tokenizer import load_tokenizer

    trainer = TrainerConfig(**trainer_values())
    sources = [engine.open_model(path, key="model") for path in (model, teacher)]
    prepare_layout(trainer, sources[0].shape, seq_length=SEQ_LENGTH)
    cores = [engine.open_core(source, trainer, torch.float32) for source in sources]
    tokenizer = load_tokenizer(sources[0].tokenizer)
    data = build_data_module(DataConfig(prepared=blend), tokenizer, SEQ_LENGTH, 1, PER_BATCH, index_dir=index)
    data.build(1, 1, BATCHES, 0)
    found: dict[str, list[torch.Tensor]] = {}
    for sample in (data._validation_ds[number] for number in range(BATCHES * PER_BATCH)):
        of_student, of_teacher = (
            last_logits(core, sample["tokens"][None])[0, :, : sources[0].vocab_size].double().log_softmax(-1)
            for core in cores
        )
        losses = -of_student.gather(1, sample["labels"][:, None])[:, 0]
        divergences = (of_teacher.exp() * (of_teacher - of_student)).sum(1)
        agreement = (of_student.argmax(1) == of_teacher.argmax(1)).double()
        name = SOURCES[sample["dataset_id"]]
        for part, values in {"loss": losses, "divergence": divergences, "agreement": agreement}.items():
            found.setdefault(f"validation_{part}/{name}", []).append(values)
    return {key: float(torch.cat(values).mean()) for key, values in found.items()}


def validation_of(output: str) -> dict[str, float]:
    records = [json.loads(line) for line in (Path(output) / "history.jsonl").read_text().splitlines()]
    (found,) = [record for record in records if "validation_loss" in record]
    return found


@pytest.mark.parametrize(("layout", "micro_batch_size"), [("dp2", 2), ("pp2", 1)])
def test_each_source_has_the_loss_and_the_distance_of_its_own_tokens(
    ranks: Ranks, tiny_run: TinyRun, tiny_blend: Blend, tmp_path: Path, layout: str, micro_batch_size: int
) -> None:
    output = str(tmp_path / "distilled")
    options = {"learns_from_teacher": True, "micro_batch_size": micro_batch_size}
    ranks(layout).run(run_on, tiny_blend, tiny_run, output, **options)
    (expected,) = ranks("single").run(by_hand, tiny_blend, output, tiny_run.teacher, str(tmp_path / "index"))
    assert len(expected) == 3 * len(SOURCES)
    found = validation_of(output)
    assert {key: value for key, value in found.items() if "/" in key} == pytest.approx(expected, rel=1e-5)
    losses = [found[f"validation_loss/{name}"] for name in SOURCES]
    assert max(losses) - min(losses) > 1e-2


def test_without_a_teacher_each_source_has_its_loss_and_tensorboard_draws_it(
    ranks: Ranks, tiny_run: TinyRun, tiny_blend: Blend, tmp_path: Path
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    output = str(tmp_path / "trained")
    ranks("tp2").run(run_on, tiny_blend, tiny_run, output, learns_from_teacher=False, micro_batch_size=4)
    (expected,) = ranks("single").run(by_hand, tiny_blend, output, tiny_run.teacher, str(tmp_path / "index"))
    losses = {key: value for key, value in expected.items() if key.startswith("validation_loss/")}
    found = {key: value for key, value in validation_of(output).items() if "/" in key}
    assert found == pytest.approx(losses, rel=1e-5)
    events = EventAccumulator(f"{output}/tensorboard").Reload()
    assert {tag: events.Scalars(tag)[0].value for tag in losses} == pytest.approx(found, rel=1e-6)

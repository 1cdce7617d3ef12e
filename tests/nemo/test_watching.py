"""What a person sees of a training run: the history, and the same numbers in TensorBoard and Weights & Biases."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from minitron_nemo.config.data import DataConfig
from minitron_nemo.config.distillation import DistillationConfig
from minitron_nemo.config.trainer import TrainerConfig
from minitron_nemo.config.training import OptimConfig, TrainingConfig
from minitron_nemo.shape import ModelShape
from minitron_nemo.stages import distill
from support.ranks import Ranks, current_layout
from support.tiny import SEQ_LENGTH
from support.tiny_run import TinyRun, trainer_values

STEPS, EVERY = 4, 2
PEAK = 1e-3  # TFLOP/s
TOKENS_PER_STEP = 4 * SEQ_LENGTH


def run_distill(run: TinyRun, output: str, **trainer: Any) -> None:
    layout = current_layout()
    values = {"tensor_model_parallel_size": layout.tp, "pipeline_model_parallel_size": layout.pp, "peak_tflops": PEAK}
    distill.run(
        distill.DistillConfig(
            teacher=run.teacher,
            student=run.student,
            distillation=DistillationConfig(cross_entropy_weight=0.1),
            trainer=TrainerConfig(**trainer_values(sequence_parallel=layout.sequence_parallel, **values, **trainer)),
            training=TrainingConfig(
                steps=STEPS,
                checkpoint_every=0,
                validation_every=EVERY,
                validation_batches=1,
                optim=OptimConfig(lr=1e-2, min_lr=1e-3, warmup_steps=1),
            ),
            data=DataConfig(prepared=run.data),
            output=output,
        )
    )


def history(path: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(path) / "history.jsonl").read_text().splitlines()]


def run_watched(run: TinyRun, output: str) -> None:
    os.environ |= {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    run_distill(run, output, tensorboard=True, wandb_project="minitron")


@pytest.fixture(scope="module")
def watched(ranks: Ranks, tiny_run: TinyRun) -> str:
    output = str(tiny_run.directory / "watched")
    ranks("single").run(run_watched, tiny_run, output)
    return output


def test_a_distillation_step_tells_its_parts_and_how_well_it_used_the_device(tiny_run: TinyRun, watched: str) -> None:
    student, teacher = (
        ModelShape.from_dict(json.loads(Path(path, "shape.json").read_text()))
        for path in (tiny_run.student, tiny_run.teacher)
    )
    flops = 3 * student.flops_per_token(SEQ_LENGTH) + teacher.flops_per_token(SEQ_LENGTH)
    steps = [record for record in history(watched) if "loss" in record]
    assert [record["step"] for record in steps] == list(range(1, STEPS + 1))
    for record in steps:
        assert record["parts"].keys() == {"loss", "divergence", "cross_entropy", "agreement"}
        assert 0 <= record["parts"]["agreement"] <= 1
        seconds = TOKENS_PER_STEP / record["tokens_per_second"]
        assert record["seconds"] == pytest.approx(seconds, rel=1e-2, abs=1e-4)  # it is written to a tenth of a ms
        assert record["tflops_per_device"] == pytest.approx(flops * record["tokens_per_second"] / 1e12, rel=1e-2)
        assert record["mfu"] == pytest.approx(record["tflops_per_device"] / PEAK, rel=1e-2)


@pytest.mark.parametrize("layout", ["pp2", "dp2"])
def test_validations_measure_the_distance_from_the_teacher_on_every_layout(
    ranks: Ranks, tiny_run: TinyRun, watched: str, layout: str
) -> None:
    output = str(tiny_run.directory / f"watched-{layout}")
    ranks(layout).run(run_distill, tiny_run, output)
    expected, found = (
        [record for record in history(path) if "validation_loss" in record] for path in (watched, output)
    )
    assert [record["step"] for record in expected] == [2, 4]
    for one, two in zip(expected, found, strict=True):
        assert one.keys() == {
            *("step", "tokens", "validation_loss", "validation_divergence", "validation_agreement"),
        }
        assert two == pytest.approx(one, abs=1e-4)  # float32 sums in another order; no token is so close to a tie
    assert [record["mfu"] > 0 for record in history(output) if "loss" in record] == [True] * STEPS


def flat(record: dict[str, Any]) -> dict[str, float]:
    parts = {f"parts/{name}": value for name, value in record.pop("parts", {}).items()}
    return parts | {name: value for name, value in record.items() if name != "step"}


def test_tensorboard_holds_every_number_of_the_history_at_its_step(watched: str) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(Path(watched, "tensorboard"))).Reload()
    drawn = {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in events.Tags()["scalars"]}
    for record in history(watched):
        step = record["step"]
        for name, value in flat(record).items():
            if name != "tokens":  # at one step for training and validation
                assert drawn[name][step] == pytest.approx(value, rel=1e-6), (name, step)  # float32
    assert drawn["tokens"] == {step: step * TOKENS_PER_STEP for step in range(1, STEPS + 1)}
    assert {"loss", "lr", "grad_norm", "mfu", "parts/agreement", "validation_divergence"} <= drawn.keys()


def offline_records(file: Path) -> Iterator[bytes]:
    """Of a run that Weights & Biases wrote offline: LevelDB's log format, 7 bytes in."""
    content, place, record = file.read_bytes(), 7, b""
    while place + 7 <= len(content):
        if 32768 - place % 32768 < 7:  # no header fits in what is left of the block
            place += 32768 - place % 32768
        _, size, kind = struct.unpack_from("<IHB", content, place)
        record += content[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


def test_weights_and_biases_gets_the_same_numbers(watched: str) -> None:
    protocol = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    (file,) = Path(watched, "wandb").glob("offline-run-*/run-*.wandb")
    logged = []
    for data in offline_records(file):
        items = protocol.Record.FromString(data).history.item
        logged.append({"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items})
    steps = [values for values in logged if "loss" in values]
    assert len(steps) == STEPS
    for values, record in zip(steps, (record for record in history(watched) if "loss" in record), strict=True):
        assert values["trainer/global_step"] == record["step"]
        assert flat(record).items() <= values.items()

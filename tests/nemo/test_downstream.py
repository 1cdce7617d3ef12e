"""A task watched during training: its accuracy is recorded, over-fitting is said, and the best weights are kept."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from minitron_nemo.artifact import open_artifact
from minitron_nemo.config.data import DataConfig
from minitron_nemo.config.distillation import DistillationConfig
from minitron_nemo.config.trainer import TrainerConfig
from minitron_nemo.config.training import DownstreamConfig, OptimConfig, TrainingConfig
from minitron_nemo.nemo.downstream import best_kept, over_fit
from minitron_nemo.stages import distill
from support.ranks import Ranks, current_layout
from support.tiny_run import TinyRun, read_weights, trainer_values


def records(accuracies: list[float], divergences: list[float], name: str = "validation_divergence") -> list[dict]:
    """A history with an evaluation every 10 steps."""
    lines: list[dict[str, Any]] = []
    for number, (accuracy, divergence) in enumerate(zip(accuracies, divergences, strict=True), start=1):
        lines.append({"step": 10 * number, "loss": 1.0})
        lines.append({"step": 10 * number, "validation_loss": 3.0, name: divergence})
        lines.append({"step": 10 * number, "downstream_accuracy": accuracy})
    return lines


FALLING = [0.9, 0.8, 0.7, 0.6, 0.5, 0.4]
WORSE_TWICE = [0.5, 0.7, 0.6, 0.6, 0.6, 0.6]  # of 100 questions: the standard error of 0.7 is 0.046


def steps_with_a_warning(history: list[dict], patience: int = 2) -> list[int]:
    """What a run says that asks after each of its evaluations."""
    ends = [place for place, record in enumerate(history, start=1) if "downstream_accuracy" in record]
    return [history[end - 1]["step"] for end in ends if over_fit(history[:end], questions=100, patience=patience)]


def test_a_divergence_that_falls_while_the_task_falls_is_said_once_with_the_best_step() -> None:
    history = records(WORSE_TWICE, FALLING)
    assert steps_with_a_warning(history) == [40]
    said = over_fit(history[:12], questions=100, patience=2)
    for part in (
        "Step 40",
        "from 0.8000 to 0.6000",
        "from 70.0% to 60.0%",
        "4.6%",
        "100 questions",
        "step 20 was best",
    ):
        assert said is not None and part in said, part


@pytest.mark.parametrize(
    ("accuracies", "distances", "name"),
    [
        ([0.5, 0.7, 0.66, 0.66, 0.66, 0.66], FALLING, "validation_divergence"),  # within the noise
        (WORSE_TWICE, [0.9, 0.4, 0.5, 0.6, 0.7, 0.8], "validation_divergence"),  # the divergence rises as well
        ([0.5, 0.7, 0.6, 0.7, 0.6, 0.7], FALLING, "validation_divergence"),  # not twice in a row
        (WORSE_TWICE, [0.9, 0.4, 0.5, 0.6, 0.7, 0.8], "validation_loss"),
    ],
)
def test_a_run_that_does_not_over_fit_is_left_in_peace(
    accuracies: list[float], distances: list[float], name: str
) -> None:
    assert steps_with_a_warning(records(accuracies, distances, name)) == []


def test_without_a_teacher_the_loss_decides() -> None:
    assert steps_with_a_warning(records(WORSE_TWICE, FALLING, "validation_loss"), patience=3) == [50]


# ---- in a run --------------------------------------------------------------------------------------------------------


def write_questions(run: TinyRun) -> str:
    """Words drawn so that the student gets better at them by step 4 and worse again by step 6."""
    file = run.directory / "questions.jsonl"
    words = ["".join(letters) for letters in itertools.product("bdfglmnprst", "aeiou", "bdglmnrst")]
    generator = random.Random(0)
    lines = [
        {"context": " ".join(generator.sample(words, 4)), "options": generator.sample(words, 2), "answer": 0}
        for _ in range(234)
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines[204:]))
    return str(file)


def run_distill(run: TinyRun, output: str, steps: int, keep_best: bool, stop_at: int | None = None) -> None:
    from minitron_nemo.nemo.downstream import Downstream

    evaluate, layout = Downstream.on_validation_end, current_layout()

    def evaluate_and_fail(self: Downstream, trainer: Any, pl_module: Any) -> None:
        evaluate(self, trainer, pl_module)
        if trainer.global_step == stop_at:
            raise KeyError("the machine is gone")

    split = {"tensor_model_parallel_size": layout.tp, "pipeline_model_parallel_size": layout.pp}
    with pytest.MonkeyPatch.context() as changed:
        changed.setattr(Downstream, "on_validation_end", evaluate_and_fail)
        distill.run(
            distill.DistillConfig(
                teacher=run.teacher,
                student=run.student,
                distillation=DistillationConfig(),
                trainer=TrainerConfig(**trainer_values(**split)),
                training=TrainingConfig(
                    steps=steps,
                    checkpoint_every=2,
                    validation_every=1,
                    validation_batches=1,
                    optim=OptimConfig(lr=1e-2, min_lr=1e-3, warmup_steps=1, schedule="constant"),
                    downstream=DownstreamConfig(file=write_questions(run), every=2, keep_best=keep_best),
                ),
                data=DataConfig(prepared=run.data),
                output=output,
            )
        )


def accuracies(output: str) -> dict[int, float]:
    lines = [json.loads(line) for line in Path(output, "history.jsonl").read_text().splitlines()]
    return {line["step"]: line["downstream_accuracy"] for line in lines if "downstream_accuracy" in line}


def test_the_best_weights_are_kept_through_a_kill_and_on_every_layout(ranks: Ranks, tiny_run: TinyRun) -> None:
    whole, cut, split, short = (str(tiny_run.directory / f"task-{name}") for name in ("whole", "cut", "split", "short"))
    single = ranks("single")
    single.run(run_distill, tiny_run, whole, 6, True)
    found = accuracies(whole)
    assert list(found) == [2, 4, 6]
    best = max(found, key=lambda step: (found[step], step))
    assert best == 4, f"{found}: nothing would tell the best weights from the last"
    assert open_artifact(whole).metrics["best"] == {"step": best, "downstream_accuracy": found[best]}

    with pytest.raises(KeyError):
        single.run(run_distill, tiny_run, cut, 6, True, 4)
    kept = best_kept(Path(cut + ".training"))
    assert kept is not None and kept[1]["step"] == best
    single.run(run_distill, tiny_run, cut, 6, True)
    assert open_artifact(cut).metrics["best"] == open_artifact(whole).metrics["best"]

    single.run(run_distill, tiny_run, short, best, False)  # the run as it was at its best step
    weights = [single.run(read_weights, path)[0] for path in (short, whole, cut)]
    for name, tensor in weights[0].items():
        assert all(torch.equal(tensor, other[name]) for other in weights[1:]), name

    ranks("pp2").run(run_distill, tiny_run, split, 6, True)
    assert accuracies(split) == found


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ({"validation_every": 0}, "training.validation_every=0 makes this no step of training.steps=10"),
        ({"validation_every": 6, "every": 2}, "training.validation_every=6 makes this no step"),
        ({"validation_every": 2, "keep_best": True, "keep_optimizer": True}, "Set one of them to false"),
        ({"validation_every": 2, "patience": 0}, "training.downstream.patience=0 must be at least 1"),
        ({"validation_every": 2, "file": None, "keep_best": True}, "Set training.downstream.file"),
    ],
)
def test_a_task_that_cannot_be_watched_is_named(training: dict[str, Any], message: str) -> None:
    own = ("file", "every", "patience", "keep_best")
    downstream = {"file": "questions.jsonl"} | {key: training[key] for key in own if key in training}
    rest = {key: value for key, value in training.items() if key not in own}
    optim = OptimConfig(warmup_steps=1)
    with pytest.raises(ValueError, match=message):
        TrainingConfig(steps=10, downstream=DownstreamConfig(**downstream), optim=optim, **rest)

"""A teacher that is corrected while it teaches goes the way of one that is corrected by itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from minitron_nemo.checks import Interrupted
from minitron_nemo.config.data import DataConfig
from minitron_nemo.config.distillation import DistillationConfig, HiddenStateConfig
from minitron_nemo.config.trainer import TrainerConfig
from minitron_nemo.config.training import OptimConfig, TrainingConfig
from minitron_nemo.stages import correct_teacher, distill
from minitron_nemo.stopping import STOP_FILE
from support.ranks import Ranks, current_layout
from support.tiny_run import TinyRun, read_weights, trainer_values

STUDENT_LR, TEACHER_LR = 1e-2, 2e-3
CLIP = 0.05  # far below both models' norms of gradients, so that a common norm would show
STEPS = 4
LATER_TEACHER_LR, LATER_STEPS = 1e-7, 2
HIDDEN_STATES = HiddenStateConfig(enabled=True, mapping="plan", projection_init="plan")
"""With a projection that learns and a balance that goes by the step before, both of which a resumed run needs."""


def shared(run: TinyRun, lr: float, steps: int = STEPS, **training: Any) -> dict[str, Any]:
    layout = current_layout()
    values = trainer_values(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        sequence_parallel=layout.sequence_parallel,
    )
    optim = OptimConfig(lr=lr, min_lr=lr / 10, warmup_steps=1, clip_grad=CLIP)
    return {
        "trainer": TrainerConfig(**values),
        "training": TrainingConfig(steps=steps, checkpoint_every=0, optim=optim, **training),
        "data": DataConfig(prepared=run.data),
    }


def run_both(run: TinyRun, output: str) -> None:
    distill.run(
        distill.DistillConfig(
            teacher=run.teacher,
            student=run.student,
            distillation=DistillationConfig(hidden_states=HIDDEN_STATES, teacher_lr=TEACHER_LR),
            corrected_teacher=output + " teacher",
            output=output,
            **shared(run, STUDENT_LR, keep_optimizer=True),
        )
    )


def go_on(run: TinyRun, before: str, output: str) -> None:
    """At another rate of the student, and a teacher that hardly moves."""
    distill.run(
        distill.DistillConfig(
            teacher=run.teacher,
            student=before,
            distillation=DistillationConfig(hidden_states=HIDDEN_STATES, teacher_lr=LATER_TEACHER_LR),
            plan=run.student,
            corrected_teacher=output + " teacher",
            output=output,
            **shared(run, STUDENT_LR / 2, steps=LATER_STEPS, continue_from=before),
        )
    )


def run_teacher_alone(run: TinyRun, output: str) -> None:
    correct_teacher.run(
        correct_teacher.CorrectTeacherConfig(model=run.teacher, output=output, **shared(run, TEACHER_LR))
    )


def run_both_stopping_after_each_step(run: TinyRun, output: str) -> int:
    """Returns how often it was stopped."""
    stop_file, stops = Path(output + ".stop"), 0
    stop_file.touch()
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv(STOP_FILE, str(stop_file))
        while not Path(output).exists():
            try:
                run_both(run, output)
            except Interrupted:
                stops += 1
    return stops


def history(path: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path, "history.jsonl").read_text().splitlines()]


def losses(path: str) -> list[dict[str, float]]:
    return [record["parts"] | {"grad_norm": record["grad_norm"]} for record in history(path)]


@pytest.fixture(scope="module")
def both(ranks: Ranks, tiny_run: TinyRun) -> str:
    output = str(tiny_run.directory / "both")
    ranks("single").run(run_both, tiny_run, output)
    return output


def test_the_teacher_goes_the_way_of_one_corrected_by_itself(ranks: Ranks, tiny_run: TinyRun, both: str) -> None:
    alone = str(tiny_run.directory / "teacher alone")
    ranks("single").run(run_teacher_alone, tiny_run, alone)
    of_teacher = [parts["teacher_cross_entropy"] for parts in losses(both)]
    assert of_teacher == pytest.approx([record["loss"] for record in history(alone)], rel=1e-5)
    before, expected, found = (
        ranks("single").run(read_weights, path)[0] for path in (tiny_run.teacher, alone, both + " teacher")
    )
    for name, tensor in expected.items():
        change = (tensor - before[name]).norm()
        assert change > 0, name
        assert (found[name] - tensor).norm() <= 1e-3 * change, name  # Adam divides small gradients' noise by their size


def test_the_student_learns_from_the_teacher_as_it_is_at_each_step(ranks: Ranks, tiny_run: TinyRun, both: str) -> None:
    """Same first step as beside a frozen teacher, to the norm of the gradient; not the same afterwards."""
    frozen = str(tiny_run.directory / "frozen")
    ranks("single").run(run_frozen, tiny_run, frozen)
    found, expected = losses(both), losses(frozen)
    assert "teacher_cross_entropy" not in expected[0]
    for name, value in expected[0].items():
        assert found[0][name] == pytest.approx(value, rel=1e-6), name
    assert abs(found[2]["divergence"] - expected[2]["divergence"]) > 1e-4


def run_frozen(run: TinyRun, output: str) -> None:
    distill.run(
        distill.DistillConfig(
            teacher=run.teacher,
            student=run.student,
            distillation=DistillationConfig(hidden_states=HIDDEN_STATES),
            output=output,
            **shared(run, STUDENT_LR),
        )
    )


def test_both_resume_to_the_bit(ranks: Ranks, tiny_run: TinyRun, both: str) -> None:
    output = str(tiny_run.directory / "both in pieces")
    assert ranks("single").run(run_both_stopping_after_each_step, tiny_run, output) == [STEPS - 1]
    assert losses(output) == losses(both)
    for kind in ("", " teacher"):
        [found], [expected] = (ranks("single").run(read_weights, path + kind) for path in (output, both))
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_both_go_on_in_a_phase_of_other_rates(ranks: Ranks, tiny_run: TinyRun, both: str) -> None:
    output = str(tiny_run.directory / "both in a later phase")
    ranks("single").run(go_on, tiny_run, both, output)
    moved = {}
    for kind in ("", " teacher"):
        [found], [before] = (ranks("single").run(read_weights, path + kind) for path in (output, both))
        moved[kind] = max(float((found[name] - tensor).abs().max()) for name, tensor in before.items())
    at_most = LATER_STEPS * 10 * LATER_TEACHER_LR  # Adam's steps are of the rate's size
    assert 0 < moved[" teacher"] <= at_most < moved[""]


@pytest.mark.parametrize("layout", ["tp2-sp", "pp2"])
def test_both_take_the_same_steps_on_every_layout(ranks: Ranks, tiny_run: TinyRun, both: str, layout: str) -> None:
    output = str(tiny_run.directory / f"both on {layout}")
    ranks(layout).run(run_both, tiny_run, output)
    for found, expected in zip(losses(output), losses(both), strict=True):
        assert found == pytest.approx(expected, rel=1e-4)

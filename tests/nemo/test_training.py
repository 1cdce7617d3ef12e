"""A training run that is killed and started again ends where an uninterrupted one does."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from minitron_nemo.config.data import DataConfig
from minitron_nemo.config.trainer import TrainerConfig
from minitron_nemo.config.training import OptimConfig, TrainingConfig, lr_multiplier
from minitron_nemo.nemo.survival import ResumableCheckpoints
from minitron_nemo.nemo.trainer import StepEnds
from minitron_nemo.stages import pretrain
from minitron_nemo.stages.training import continue_only_the_same
from support.door import Door, environment
from support.patience import Patience, end
from support.ranks import Ranks
from support.tiny import SEQ_LENGTH
from support.tiny_run import TinyRun, read_weights, trainer_values

STEPS, EVERY = 8, 2
OPTIM = {"lr": 1e-2, "min_lr": 1e-3, "warmup_steps": 3}


def run_pretrain(
    run: TinyRun, output: str, initial: str | None = None, trainer: dict[str, Any] | None = None, **training: Any
) -> None:
    values = {"steps": STEPS, "checkpoint_every": EVERY, "validation_every": 4, "validation_batches": 1}
    pretrain.run(
        pretrain.PretrainConfig(
            initial=initial or run.student,
            trainer=TrainerConfig(**trainer_values(**trainer or {})),
            training=TrainingConfig(**values | {"optim": OptimConfig(**OPTIM)} | training),
            data=DataConfig(prepared=run.data),
            output=output,
        )
    )


def distillation(run: TinyRun, output: str) -> list[str]:
    """With all that a distillation carries from step to step, as a user asks for it on the command line."""
    values = {f"trainer.{key}": value for key, value in trainer_values().items()}
    values |= {f"distill.training.optim.{key}": value for key, value in OPTIM.items()}
    values |= {
        "distill.distillation.cross_entropy_weight": 0.1,
        "distill.distillation.hidden_states.enabled": True,
        "distill.distillation.hidden_states.mapping": "plan",
        "distill.distillation.hidden_states.projection": "shared",
        "distill.distillation.hidden_states.balance": "dynamic",
        "distill.training.steps": STEPS,
        "distill.training.checkpoint_every": EVERY,
        "distill.training.validation_every": 4,
        "distill.training.validation_batches": 1,
        "distill.teacher": run.teacher,
        "distill.student": run.student,
        "distill.output": output,
        "data.prepared": run.data,
        "run_dir": str(run.directory / "unused"),
    }
    return ["distill", "recipe=quickstart", *(f"{key}={value}" for key, value in values.items())]


def run_until_killed(command: list[str], output: str, log: Path) -> tuple[Path, Path]:
    """Start it in a process of its own and kill that outright while it writes a checkpoint that is not its first.

    Returns: the newest whole checkpoint, and the one that is not.
    """
    checkpoints = Path(output + ".training") / "checkpoints"

    def written_in_part() -> list[Path]:
        return list(checkpoints.glob("*.partial/**/*.distcp")) if list(checkpoints.glob("step-*[0-9]")) else []

    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "minitron_nemo.cli", *command],
            env=environment(),
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
    patience = Patience([process.pid])
    try:
        while True:
            assert process.poll() is None, f"it ended by itself:\n{log.read_text()}"
            assert not patience.over(), f"no second checkpoint, and nothing done any more:\n{log.read_text()}"
            if written_in_part():
                os.killpg(process.pid, signal.SIGSTOP)  # so that it is still being written when the kill arrives
                os.waitpid(process.pid, os.WUNTRACED)
                if written_in_part():
                    break
                os.killpg(process.pid, signal.SIGCONT)
            time.sleep(0.001)
    finally:
        end(process)  # its checkpoint writers too
    [partial] = checkpoints.glob("*.partial")
    newest = ResumableCheckpoints(checkpoints, EVERY).newest()
    assert newest is not None
    return newest, partial


def history(path: str) -> list[dict[str, Any]]:
    """Every record but for how long its step took, and how fast that was."""
    records = [json.loads(line) for line in (Path(path) / "history.jsonl").read_text().splitlines()]
    speed = ("seconds", "tokens_per_second", "tflops_per_device", "mfu")
    return [{key: value for key, value in record.items() if key not in speed} for record in records]


@pytest.fixture(scope="module")
def uninterrupted(ranks: Ranks, tiny_run: TinyRun) -> str:
    output = str(tiny_run.directory / "uninterrupted")
    ranks("single").run(run_pretrain, tiny_run, output)
    return output


def test_a_killed_distillation_resumes_to_the_same_losses_and_weights_to_the_bit(
    ranks: Ranks, door: Door, tiny_run: TinyRun, tmp_path: Path
) -> None:
    """Hidden losses with a projection that learns, and a balance that goes by the step before."""
    output, whole = str(tiny_run.directory / "killed"), str(tiny_run.directory / "not killed")
    checkpoint, partial = run_until_killed(distillation(tiny_run, output), output, tmp_path / "log")
    assert not Path(output).exists()
    reached = int(checkpoint.name.removeprefix("step-"))
    assert EVERY <= reached < STEPS and partial.name == f"step-{reached + EVERY}.partial"
    shutil.copytree(partial, partial.with_name("step-1000.partial"))  # one that looks newest

    for path in (output, whole):
        done = door(*distillation(tiny_run, path))
        assert done.code == 0, done.err

    assert history(output) == history(whole)
    alphas = [record["parts"]["alpha"] for record in history(whole) if "parts" in record]
    assert len(set(alphas)) == STEPS
    [found], [expected] = (ranks("single").run(read_weights, path) for path in (output, whole))
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    assert not Path(output + ".training").exists()  # checkpoints go when the artifact stands


@pytest.mark.parametrize("layout", ["single", "dp2"])
def test_a_run_told_to_stop_saves_ends_and_continues_to_the_same_losses(
    ranks: Ranks, tiny_run: TinyRun, uninterrupted: str, layout: str
) -> None:
    output = str(tiny_run.directory / f"stopped-{layout}")
    said = ranks(layout).run(run_and_stop, tiny_run, output)
    assert all("stopped after step 3 of 8" in message for message in said), said
    assert [path.name for path in Path(output + ".training", "checkpoints").iterdir()] == ["step-3"]
    ranks(layout).run(run_pretrain, tiny_run, output)
    assert [record["step"] for record in history(output) if "loss" in record] == list(range(1, STEPS + 1))
    if layout == "single":
        assert history(output) == history(uninterrupted)


def run_and_stop(run: TinyRun, output: str) -> str:
    """SIGUSR1 to the first rank in step 3. Returns what every rank says."""
    from minitron_nemo.checks import Interrupted

    def signal_in_step_3(step: int, loss: torch.Tensor) -> torch.Tensor:
        if step == 3 and torch.distributed.get_rank() == 0:
            os.kill(os.getpid(), signal.SIGUSR1)
        return loss

    with changed_losses(signal_in_step_3), pytest.raises(Interrupted) as stopped:
        run_pretrain(run, output)
    return str(stopped.value)


@pytest.mark.parametrize("layout", ["single", "dp2"])
def test_where_a_run_goes_on_it_validates_once_and_as_if_undisturbed(
    ranks: Ranks, tiny_run: TinyRun, tmp_path: Path, layout: str
) -> None:
    """Killed behind the checkpoint of step 4, before its validation and after it."""
    whole, before, after = (str(tmp_path / name) for name in ("whole", "before", "after"))
    expected = ranks(layout).run(run_and_watch_validations, tiny_run, whole)
    assert expected[0] == [2, 4, 6, 8]

    for output, killed, resumed in ((before, "validation", [4, 6, 8]), (after, "step", [6, 8])):
        ranks(layout).run(run_and_die_at_4, tiny_run, output, killed)
        assert not Path(output).exists()
        found = ranks(layout).run(run_and_watch_validations, tiny_run, output)
        assert all(each == resumed for each in found)
        assert history(output) == history(whole)


def run_and_watch_validations(run: TinyRun, output: str) -> list[int]:
    """Returns: the steps it validates after."""
    steps: list[int] = []
    with pytest.MonkeyPatch.context() as changed:
        changed.setattr(StepEnds, "on_validation_epoch_end", lambda _, trainer, __: steps.append(trainer.global_step))
        run_pretrain(run, output, validation_every=2)
    return steps


def run_and_die_at_4(run: TinyRun, output: str, where: str) -> None:
    """A run that ends by an error once its checkpoint of step 4 stands: before the validation there, or in step 5."""

    def die(step: int, loss: torch.Tensor) -> torch.Tensor:
        if step > 4:
            raise RuntimeError("killed")
        return loss

    def die_at_validation(_: StepEnds, trainer: Any, __: Any) -> None:
        die(trainer.global_step + 1, torch.empty(0))

    with pytest.MonkeyPatch.context() as changed, changed_losses(die):
        if where == "validation":
            changed.setattr(StepEnds, "on_validation_start", die_at_validation)
        with pytest.raises(RuntimeError, match="killed"):
            run_pretrain(run, output, validation_every=2)


@contextmanager
def changed_losses(change: Callable[[int, torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Every training micro-batch's losses go through `change(step from 1, losses)`."""
    from minitron_nemo.nemo import models

    forward_step, micro_batches = models.forward_step, 0

    def changed(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        nonlocal micro_batches
        losses = forward_step(model, batch)
        if not torch.is_grad_enabled():
            return losses
        per_step = trainer_values()["global_batch_size"] // torch.distributed.get_world_size()
        micro_batches += 1
        return change(-(-micro_batches // per_step), losses)

    models.forward_step = changed
    try:
        yield
    finally:
        models.forward_step = forward_step


def test_a_step_whose_gradient_is_not_finite_changes_nothing_and_too_many_end_the_run(
    ranks: Ranks, tiny_run: TinyRun
) -> None:
    output = str(tiny_run.directory / "skipping")
    ranks("dp2").run(run_with_nan, tiny_run, output, [3], 2)
    records = [record for record in history(output) if "validation_loss" not in record]
    assert [record["step"] for record in records if record.get("skipped")] == [3]
    assert all(np.isfinite(record["loss"]) for record in records if not record.get("skipped"))
    losses = {record["step"]: record.get("loss") for record in records}
    assert losses[8] < losses[1]
    with pytest.raises(ValueError, match=r"2 steps in a row, up to step 4(.|\n)*samples 8 to 15(.|\n)*step-2"):
        ranks("dp2").run(run_with_nan, tiny_run, str(tiny_run.directory / "ending"), [3, 4], 2)


def run_with_nan(run: TinyRun, output: str, steps: list[int], limit: int) -> None:
    """One rank's losses are not a number in these steps."""

    def poison(step: int, losses: torch.Tensor) -> torch.Tensor:
        return losses * float("nan") if step in steps and torch.distributed.get_rank() == 1 else losses

    with changed_losses(poison):
        run_pretrain(run, output, max_skipped_steps=limit)


def test_history_holds_each_steps_tokens_and_the_learning_rate_it_used(uninterrupted: str) -> None:
    records = history(uninterrupted)
    training = [record for record in records if "loss" in record]
    tokens = trainer_values()["global_batch_size"] * trainer_values()["seq_length"]
    assert [record["step"] for record in training] == list(range(1, STEPS + 1))
    assert [record["tokens"] for record in training] == [tokens * step for step in range(1, STEPS + 1)]
    config = OptimConfig(**OPTIM)
    for step, record in enumerate(training):
        expected = config.lr * lr_multiplier(step, config=config, steps=STEPS)
        assert record["lr"] == pytest.approx(expected, rel=1e-12), f"step {step + 1}"
    assert [record["step"] for record in records if "validation_loss" in record] == [4, 8]


def test_training_lowers_the_loss(uninterrupted: str) -> None:
    losses = [record["loss"] for record in history(uninterrupted) if "loss" in record]
    assert losses[-1] < losses[0] - 0.1


def test_a_checkpoint_being_written_never_counts(tmp_path: Path) -> None:
    checkpoints = ResumableCheckpoints(tmp_path, EVERY)
    assert checkpoints.newest() is None
    for name in ("step-2", "step-10", "step-9", "step-12.partial"):  # 10 is newer than 9, though not in the alphabet
        (tmp_path / name).mkdir()
    assert checkpoints.newest() == tmp_path / "step-10"


def test_a_global_batch_that_does_not_split_names_the_mend(ranks: Ranks, tiny_run: TinyRun) -> None:
    with pytest.raises(ValueError, match=r"trainer.global_batch_size=3 (.|\n)*trainer.micro_batch_size"):
        ranks("dp2").run(run_uneven, tiny_run, str(tiny_run.directory / "uneven"))


def run_uneven(run: TinyRun, output: str) -> None:
    pretrain.run(
        pretrain.PretrainConfig(
            initial=run.student,
            trainer=TrainerConfig(**trainer_values(global_batch_size=3)),
            training=TrainingConfig(steps=1, optim=OptimConfig(warmup_steps=1)),
            data=DataConfig(prepared=run.data),
            output=output,
        )
    )


def test_nemo_builds_ddp_after_the_parameters_and_before_the_first_step(ranks: Ranks, tiny_run: TinyRun) -> None:
    [events] = ranks("single").run(events_of_a_start, tiny_run, str(tiny_run.directory / "ordered"))
    built = events.index("buffers")
    assert events[built - 1] == events[built + 1] == "synchronize"


def events_of_a_start(run: TinyRun, output: str) -> list[str]:
    """When the device is waited for, and when NeMo, on a CUDA stream of its own, makes DDP's buffers."""
    from nemo.lightning.megatron_parallel import MegatronParallel

    events: list[str] = []
    synchronize, init_ddp = torch.cuda.synchronize, MegatronParallel.init_ddp

    def recorded_synchronize(*args: Any) -> None:
        events.append("synchronize")
        synchronize(*args)

    def recorded_init_ddp(parallel: MegatronParallel) -> None:
        events.append("buffers")
        init_ddp(parallel)

    with pytest.MonkeyPatch.context() as changed:
        changed.setattr(torch.cuda, "synchronize", recorded_synchronize)
        changed.setattr(MegatronParallel, "init_ddp", recorded_init_ddp)
        run_pretrain(run, output)
    return events


# ---- phases ----------------------------------------------------------------------------------------------------------

FIRST_PHASE = {"steps": 4, "validation_every": 0, "checkpoint_every": 0}
NEXT_TRAINER = {"seq_length": SEQ_LENGTH // 2, "global_batch_size": 6}
NEXT_PHASE = {
    "steps": 3,
    "validation_every": 0,
    "checkpoint_every": 0,
    "optim": OptimConfig(lr=4e-3, min_lr=4e-3, warmup_steps=0, schedule="constant"),
}


@pytest.fixture(scope="module")
def first_phase(ranks: Ranks, tiny_run: TinyRun) -> str:
    output = str(tiny_run.directory / "first phase")
    ranks("single").run(run_pretrain, tiny_run, output, keep_optimizer=True, **FIRST_PHASE)
    return output


def test_a_phase_goes_on_with_the_moments_of_the_one_before_under_its_own_values(
    ranks: Ranks, tiny_run: TinyRun, first_phase: str
) -> None:
    """Half the sequence length, another batch and learning rate; a start from the weights alone is the contrast."""
    going_on, from_weights = (str(tiny_run.directory / name) for name in ("next phase", "from weights"))
    ranks("single").run(
        run_pretrain, tiny_run, going_on, first_phase, NEXT_TRAINER, continue_from=first_phase, **NEXT_PHASE
    )
    ranks("single").run(run_pretrain, tiny_run, from_weights, first_phase, NEXT_TRAINER, **NEXT_PHASE)
    found, contrast = history(going_on), history(from_weights)
    assert [record["step"] for record in found] == [1, 2, 3]
    assert [record["tokens"] for record in found] == [6 * (SEQ_LENGTH // 2) * step for step in (1, 2, 3)]
    assert all(record["lr"] == pytest.approx(4e-3, rel=1e-12) for record in found)
    assert found[0]["loss"] == contrast[0]["loss"]  # the same weights meet the same samples
    assert abs(found[1]["loss"] - contrast[1]["loss"]) > 1e-3  # and move with other moments
    inputs = [each["path"] for each in json.loads(Path(going_on, "manifest.json").read_text())["inputs"]]
    assert first_phase in inputs


def test_a_phase_may_have_another_layout(ranks: Ranks, tiny_run: TinyRun, first_phase: str) -> None:
    losses = []
    for layout, values in {"single": {}, "tp2": {"tensor_model_parallel_size": 2}}.items():
        output = str(tiny_run.directory / f"next phase on {layout}")
        ranks(layout).run(
            run_pretrain, tiny_run, output, first_phase, NEXT_TRAINER | values, continue_from=first_phase, **NEXT_PHASE
        )
        losses.append([record["loss"] for record in history(output)])
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)


def test_what_cannot_be_gone_on_from_says_so(ranks: Ranks, tiny_run: TinyRun, uninterrupted: str) -> None:
    output = str(tiny_run.directory / "never")
    with pytest.raises(ValueError, match=r"holds no optimizer/(.|\n)*training.keep_optimizer=true"):
        ranks("single").run(run_pretrain, tiny_run, output, continue_from=uninterrupted, **NEXT_PHASE)
    with pytest.raises(ValueError, match="was made by stage prune"):
        ranks("single").run(run_pretrain, tiny_run, output, continue_from=tiny_run.student, **NEXT_PHASE)
    assert not Path(output + ".training").exists()


def test_a_run_killed_between_its_last_step_and_its_artifact_trains_no_more(
    ranks: Ranks, tiny_run: TinyRun, first_phase: str
) -> None:
    output = str(tiny_run.directory / "all but written")
    with pytest.raises(KeyboardInterrupt):
        ranks("single").run(run_but_write_nothing, tiny_run, output)
    assert not Path(output).exists()
    ranks("single").run(run_pretrain, tiny_run, output, keep_optimizer=True, **FIRST_PHASE)
    assert history(output) == history(first_phase)
    [found], [expected] = (ranks("single").run(read_weights, path) for path in (output, first_phase))
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def run_but_write_nothing(run: TinyRun, output: str) -> None:
    from minitron_nemo import engine

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as changed:
        changed.setattr(engine, "save_model", killed)
        run_pretrain(run, output, keep_optimizer=True, **FIRST_PHASE)


def test_a_run_that_goes_on_with_another_length_says_how_its_rate_jumps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def config(steps: int, schedule: str = "cosine") -> pretrain.PretrainConfig:
        optim = OptimConfig(**OPTIM, schedule=schedule)
        return pretrain.PretrainConfig(initial="m", training=TrainingConfig(steps=steps, optim=optim))

    (tmp_path / "checkpoints" / "step-6").mkdir(parents=True)
    continue_only_the_same(tmp_path, config(8))
    continue_only_the_same(tmp_path, config(8))
    assert capsys.readouterr().err == ""
    continue_only_the_same(tmp_path, config(80))
    before, now = (OPTIM["lr"] * lr_multiplier(6, config=OptimConfig(**OPTIM), steps=steps) for steps in (8, 80))
    said = capsys.readouterr().err
    assert "goes on after step 6 with training.steps=80 instead of 8" in said
    assert f"the learning rate jumps there from {before:.3g} to {now:.3g}" in said and now > 2 * before
    (tmp_path / "config.json").unlink()
    for steps in (8, 80):
        continue_only_the_same(tmp_path, config(steps, "constant"))
    assert capsys.readouterr().err == ""

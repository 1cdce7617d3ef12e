"""Every stage that takes long stops when it is told to, with exit code 75, and ends as if nothing had been."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from minitron_nemo.artifact import open_artifact
from minitron_nemo.checks import Interrupted
from minitron_nemo.config.data import DataConfig
from minitron_nemo.config.importance import DepthConfig, GreedyConfig, ImportanceConfig
from minitron_nemo.config.trainer import TrainerConfig
from minitron_nemo.stages import estimate_importance, evaluate
from minitron_nemo.stopping import STOP_FILE, STOP_SIGNALS, only_this_process
from support.artifacts import listing
from support.door import Door
from support.ranks import Ranks
from support.tiny import TinyChain
from support.tiny_run import TinyRun, trainer_values

STAGES = {  # command, the key of its output, what is in the tiny chain already, whether it goes on where it was
    "prepare-data": ("prepare_data", "data", False),
    "estimate-importance": ("estimate_importance", "importance", True),
    "prune section=prune_calibrated": ("prune_calibrated", "student_calibrated", False),
    "teacher-logits": ("teacher_logits", None, True),
    "evaluate section=evaluate_pruned": ("evaluate_pruned", "evaluation_pruned", True),
}


def test_what_is_started_to_write_a_checkpoint_never_hears_a_stop_signal() -> None:
    """And this thread hears it again behind the save."""
    asked = [sys.executable, "-c", "import signal; print(*map(int, signal.pthread_sigmask(signal.SIG_BLOCK, [])))"]
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    with only_this_process():
        inside = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.split()
    behind = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.split()
    assert {str(int(each)) for each in STOP_SIGNALS} <= set(inside)
    assert not {str(int(each)) for each in STOP_SIGNALS} & set(behind)
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_that_is_told_to_stop_does_and_ends_as_if_undisturbed(
    door: Door, tiny_chain: TinyChain, tmp_path: Path, stage: str
) -> None:
    section, undisturbed, goes_on = STAGES[stage]
    output = tmp_path / "it"
    command = [*stage.split(), *tiny_chain.overrides]
    if undisturbed is None:
        assert door(*command, f"{section}.output={tmp_path / 'undisturbed'}").code == 0
        expected = open_artifact(tmp_path / "undisturbed")
    else:
        expected = open_artifact(tiny_chain.run_dir / undisturbed)
    command.append(f"{section}.output={output}")
    before = listing(tiny_chain.directory)

    by = signal.SIGTERM if goes_on else signal.SIGUSR1
    stopped = door.told_to_stop(*command, by=by)

    assert stopped.code == 75, stopped.err
    assert "as it was asked to" in stopped.err and "Traceback" not in stopped.err
    assert ("The same command goes on there." in stopped.err) == goes_on, stopped.err
    assert ("the same command begins anew." in stopped.err) != goes_on, stopped.err
    assert not output.exists() and any(path.name.startswith("it.") for path in tmp_path.iterdir()) == goes_on
    done = door(*command)
    assert done.code == 0, done.err
    found = open_artifact(output, verify=True)
    if stage == "prepare-data":
        assert found.manifest["files"] == expected.manifest["files"]
    else:
        assert found.digest == expected.digest
    assert found.metrics.get("held_out_loss") == expected.metrics.get("held_out_loss")
    assert {path.name for path in tmp_path.iterdir()} <= {"it", "undisturbed"}
    assert listing(tiny_chain.directory) == before


def test_a_stopped_stage_with_another_config_begins_anew(door: Door, tiny_chain: TinyChain, tmp_path: Path) -> None:
    output = tmp_path / "it"
    command = ["evaluate", *tiny_chain.overrides, "section=evaluate_pruned", f"evaluate_pruned.output={output}"]
    assert door.told_to_stop(*command).code == 75
    done = door(*command, "trainer.micro_batch_size=1")
    assert f"{output} was begun with trainer.micro_batch_size=2, not 1: it begins anew." in done.err
    expected = open_artifact(tiny_chain.run_dir / "evaluation_pruned").metrics["held_out_loss"]
    assert open_artifact(output).metrics["held_out_loss"] == pytest.approx(expected, rel=1e-5)


# ---- after every micro-batch, on layouts -----------------------------------------------------------------------------


def run_importance(run: TinyRun, output: str) -> None:
    estimate_importance.run(
        estimate_importance.EstimateImportanceConfig(
            model=run.teacher,
            importance=ImportanceConfig(num_samples=6, stream="normalised"),
            depth=DepthConfig(
                metrics=["block_influence", "loss", "accuracy"],
                num_samples=4,
                task=str(run.directory / "task.jsonl"),
                greedy=GreedyConfig(metric="kl", drop=2),
            ),
            trainer=TrainerConfig(**trainer_values()),
            data=DataConfig(prepared=run.data),
            output=output,
        )
    )


def run_evaluate(run: TinyRun, output: str) -> None:
    evaluate.run(
        evaluate.EvaluateConfig(
            model=run.teacher,
            num_samples=6,
            trainer=TrainerConfig(**trainer_values()),
            data=DataConfig(prepared=run.data),
            output=output,
        )
    )


def stopping_after_each_micro_batch(stage: Callable[[TinyRun, str], None], run: TinyRun, output: str) -> int:
    """Returns how often it was stopped."""
    stops = 0
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv(STOP_FILE, str(run.directory / "task.jsonl"))  # a file that is there
        while not Path(output).exists():
            try:
                stage(run, output)
            except Interrupted:
                stops += 1
    return stops


@pytest.mark.parametrize("layout", ["dp2", "pp2"])
def test_importance_and_evaluation_stopped_after_every_micro_batch_are_those_of_one_run(
    ranks: Ranks, tiny_run: TinyRun, tmp_path: Path, layout: str
) -> None:
    questions = [{"context": "import os", "options": [" import", " sys"], "answer": 0}]
    (tiny_run.directory / "task.jsonl").write_text("".join(json.dumps(each) + "\n" for each in questions))
    kinds: dict[str, Any] = {"importance": run_importance, "evaluation": run_evaluate}
    for kind, stage in kinds.items():
        ranks(layout).run(stage, tiny_run, str(tmp_path / kind))
        stops = ranks(layout).run(stopping_after_each_micro_batch, stage, tiny_run, str(tmp_path / f"stopped {kind}"))
        expected, stopped = open_artifact(tmp_path / kind), open_artifact(tmp_path / f"stopped {kind}")
        assert min(stops) > 1
        assert stopped.digest == expected.digest
        assert stopped.metrics.get("held_out_loss") == expected.metrics.get("held_out_loss")
    assert {path.name for path in tmp_path.iterdir()} == {*kinds, *(f"stopped {kind}" for kind in kinds)}

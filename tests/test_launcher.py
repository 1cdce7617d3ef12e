"""Who starts the ranks of a command: `launcher=`, and Hydra's `--multirun`."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from minitron_nemo.artifact import open_artifact
from minitron_nemo.config.launcher import TORCHRUN, LauncherConfig
from minitron_nemo.launcher import torchrun
from minitron_nemo.platform import has_accelerator
from support.door import Door, minitron
from support.tiny import TinyChain


def test_torchrun_is_started_by_the_command_itself(tiny_chain: TinyChain, tmp_path: Path) -> None:
    output, values = tmp_path / "importance", ["trainer.tensor_model_parallel_size=2"]
    values += ["launcher=torchrun", "launcher.processes_per_node=2", f"estimate_importance.output={output}"]
    done = minitron("estimate-importance", *tiny_chain.overrides, *values, stderr=subprocess.STDOUT)
    assert done.returncode == 0 and done.stdout.count(f"{output}\n") == 1, done.stdout
    assert open_artifact(output).manifest["config"]["trainer"]["tensor_model_parallel_size"] == 2


def test_a_mistake_is_said_before_any_rank_is_started(tiny_chain: TinyChain) -> None:
    done = minitron("distill", *tiny_chain.overrides, "launcher=torchrun", "seed=-1", stderr=subprocess.STDOUT)
    assert done.returncode == 2 and len(done.stdout.splitlines()) == 1, done.stdout
    assert "seed=-1" in done.stdout


def test_machines_meet_at_the_endpoint_and_devices_say_how_many_ranks_one_has() -> None:
    alone = torchrun(LauncherConfig(TORCHRUN), "distill", ["recipe=a"])
    ranks = "gpu" if has_accelerator() else 1  # torchrun's word for all of them
    assert alone[3:6] == ["--nnodes=1", f"--nproc-per-node={ranks}", "--standalone"]
    assert alone[6:] == ["-m", "minitron_nemo.cli", "distill", "recipe=a"]
    several = torchrun(LauncherConfig(TORCHRUN, processes_per_node=8, nodes=4, endpoint="a:29500"), "distill", [])
    assert several[3:8] == [
        *("--nnodes=4", "--nproc-per-node=8", "--rdzv-backend=c10d", "--rdzv-id=minitron", "--rdzv-endpoint=a:29500")
    ]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["launcher.kind=slurn"], "launcher.kind=slurn is not known; did you mean slurm?"),
        (["launcher=torchrun", "launcher.nodes=2"], "launcher.nodes=2 have to know where they meet."),
        (["launcher=torchrun", "--multirun"], "launcher=torchrun starts one run, and --multirun several."),
        (["launcher=mpi"], "mpi"),
        (["recipe=quickstart,real", "--multirun"], "recipe=quickstart,real sweeps over recipes or their steps;"),
        (["family=[a],[b]", "--multirun"], "family=[a],[b] sweeps over recipes or their steps;"),
    ],
)
def test_a_launcher_that_cannot_be_says_why(door: Door, given: list[str], words: str) -> None:
    assert words in door("prune", "recipe=quickstart", *given).mistake


def test_a_sweep_ends_with_the_first_that_fails(door: Door, tiny_chain: TinyChain, tmp_path: Path) -> None:
    output = f"prune.output={tmp_path}/student_${{prune.target.hidden_size}}"
    given = [value for value in tiny_chain.overrides if not value.startswith("prune.target.hidden_size=")]
    refused = door("prune", *given, "prune.target.hidden_size=999,24", output, "--multirun")
    assert "999" in refused.mistake and list(tmp_path.iterdir()) == []


def test_a_sweep_runs_a_stage_once_for_each_value(door: Door, tiny_chain: TinyChain, tmp_path: Path) -> None:
    given = [value for value in tiny_chain.overrides if not value.startswith("prune.target.hidden_size=")]
    output = f"prune.output={tmp_path}/student_${{prune.target.hidden_size}}"
    swept = Path(door.working_directory) / "runs" / "multirun"
    before = set(swept.glob("*"))
    done = door("prune", *given, "prune.target.hidden_size=24,16", output, "--multirun")
    assert done.code == 0, done.err
    for size in (24, 16):
        assert open_artifact(tmp_path / f"student_{size}").manifest["config"]["target"]["hidden_size"] == size
    assert {each.name for each in tmp_path.iterdir()} == {"student_24", "student_16"}
    assert all([each.name for each in folder.iterdir()] == ["multirun.yaml"] for folder in {*swept.glob("*")} - before)
    student = tiny_chain.run_dir / "student_pruned"
    assert open_artifact(tmp_path / "student_24").digest == open_artifact(student).digest

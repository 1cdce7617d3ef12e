"""What becomes of a job whose ranks were killed, told to stop, or failed: on a real SLURM."""

from __future__ import annotations

import subprocess
import time
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from minitron_nemo.cluster import StageJob, render_chain, submit_chain
from minitron_nemo.config.slurm import SlurmConfig
from support.slurm import ENDED, SingleNodeSlurm

# What torchrun runs in the place of minitron_nemo.cli: one rank that leaves its last word as a stage's door does.
TOY = """
import os, signal, sys, time
from pathlib import Path
from minitron_nemo import ending

stage, *overrides = sys.argv[1:]
run_dir, restarts = Path(os.environ["MINITRON_RUN_DIR"]), int(os.environ.get("SLURM_RESTART_COUNT", 0))
ending.leave_word(ending.RUNNING)
told = []
signal.signal(signal.SIGTERM, lambda *_: told.append(True))
with (run_dir / "began").open("a") as file:
    file.write(f"{restarts}\\n")
if "dies=always" in overrides or ("dies=once" in overrides and restarts == 0):
    os.kill(os.getpid(), signal.SIGKILL)
if "fails=true" in overrides:
    ending.leave_word(ending.FAILED)
    raise SystemExit("this stage was told to fail")
if "long=true" in overrides and restarts == 0:
    while not told:
        time.sleep(0.1)
    ending.leave_word(ending.STOPPED)
    raise SystemExit(75)
"""


JOBS = {  # all at once, as each of them waits for most of its time
    "dies once": [StageJob("distill", ("dies=once",))],
    "dies always": [StageJob("distill", ("dies=always",)), StageJob("evaluate")],
    "fails": [StageJob("distill", ("fails=true",))],
    "never begins": [StageJob("distill")],
    "preempted": [StageJob("distill", ("long=true",))],
    "cancelled": [StageJob("distill", ("long=true",))],
}


@dataclass(frozen=True)
class Ended:
    states: list[str]
    starts: list[int]
    """SLURM's count of restarts, each time that the stage began."""
    log: str
    files: list[str]
    """Beside scripts and logs."""


@pytest.fixture(scope="module")
def ended(slurm_cluster: SingleNodeSlurm, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ended]:
    folder = tmp_path_factory.mktemp("requeue")
    (folder / "toy_stage.py").write_text(TOY)
    environment = {"PYTHONPATH": f"{folder}:{Path(__file__).parents[2] / 'src'}", "OMP_NUM_THREADS": "1"}
    usual = SlurmConfig(cpus_per_task=1, time="60", requeues=1, environment=environment)
    ids: dict[str, list[int]] = {}
    for name, jobs in JOBS.items():
        slurm = replace(usual, python="no-such-python") if name == "never begins" else usual
        scripts = render_chain(folder / name, jobs, slurm, module="toy_stage")
        ids[name] = [job.job_id for job in submit_chain(scripts, say=lambda _: None)]
    for name, options in (("preempted", ["--signal=TERM"]), ("cancelled", [])):  # that signal: to the ranks alone
        while not (folder / name / "began").exists():
            assert slurm_cluster.states(ids[name]).get(ids[name][0]) not in ENDED, log(folder / name)
            time.sleep(0.2)
        subprocess.run(["scancel", *options, str(ids[name][0])], check=True)
    states = slurm_cluster.wait_for_jobs([job for of_name in ids.values() for job in of_name])
    return {name: _ended(folder / name, [states[job] for job in of_name]) for name, of_name in ids.items()}


def _ended(run_dir: Path, states: list[str]) -> Ended:
    began = run_dir / "began"
    files = [path.name for path in (run_dir / "slurm").iterdir() if path.suffix not in (".log", ".sbatch")]
    starts = [int(line) for line in began.read_text().split()] if began.exists() else []
    return Ended(states, starts, log(run_dir), sorted(files))


@pytest.mark.slurm
def test_ranks_that_die_without_a_word_are_started_again(ended: dict[str, Ended]) -> None:
    once = ended["dies once"]
    assert once.states == ["COMPLETED"], once.log
    assert once.starts == [0, 1]
    assert "the ranks died without a word, for the 1. time of at most 1" in once.log
    assert once.files == ["jobs.json"]


@pytest.mark.slurm
def test_but_not_for_ever(ended: dict[str, Ended]) -> None:
    always = ended["dies always"]
    assert always.states == ["FAILED", "CANCELLED"], always.log
    assert always.starts == [0, 1]
    assert "the ranks died 2 times without a word; not queued again (slurm.requeues=1)" in always.log


@pytest.mark.slurm
def test_a_stage_that_says_what_is_wrong_is_not_started_again(ended: dict[str, Ended]) -> None:
    assert ended["fails"].states == ["FAILED"]
    assert ended["fails"].starts == [0]
    assert "the stage failed; it is not queued again" in ended["fails"].log


@pytest.mark.slurm
def test_nor_is_one_that_never_began(ended: dict[str, Ended]) -> None:
    assert ended["never begins"].states == ["FAILED"]
    assert "queue" not in ended["never begins"].log


@pytest.mark.slurm
def test_ranks_that_preemption_tells_to_stop_go_on(ended: dict[str, Ended]) -> None:
    assert ended["preempted"].states == ["COMPLETED"], ended["preempted"].log
    assert ended["preempted"].starts == [0, 1]


@pytest.mark.slurm
def test_a_cancelled_job_does_not(ended: dict[str, Ended]) -> None:
    assert ended["cancelled"].states == ["CANCELLED"]
    assert ended["cancelled"].starts == [0]


def log(run_dir: Path) -> str:
    return "\n".join(f"-- {log.name}\n{log.read_text()}" for log in sorted((run_dir / "slurm").glob("*.log")))

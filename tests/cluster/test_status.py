"""What `minitron status` says of a run and `minitron cancel` does: under a real SLURM, in a shell, from records."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import pytest
from omegaconf import OmegaConf

from minitron_nemo import status
from minitron_nemo.checks import Mistake, NothingKept
from minitron_nemo.cli import leave_allocation, main
from minitron_nemo.cluster import StageJob, render_chain, submit_chain
from minitron_nemo.cluster.submit import run
from minitron_nemo.config.slurm import SlurmConfig
from minitron_nemo.progress import Reporter
from minitron_nemo.run_record import (
    ListedStep,
    Record,
    begins,
    is_at_work,
    read_records,
    read_steps,
    recording,
    write_steps,
)
from support.slurm import SingleNodeSlurm

Asks = Callable[..., tuple[int, str]]
Says = Callable[..., None]
ROOT = Path(__file__).parents[2]
STILL_SECONDS = 300.0  # in which a job or a process gets to where a test waits for it, however busy the machine

# In the place of minitron_nemo.cli: a stage of 8 samples that writes its record, as `standing.make` has it.
TOY_STAGE = """
import os, sys, time
from pathlib import Path

from minitron_nemo.cli import leave_allocation
from minitron_nemo.progress import Reporter
from minitron_nemo.run_record import recording

stage, *overrides = sys.argv[1:]
output = Path(os.environ["MINITRON_RUN_DIR"]) / stage
leave_allocation()
with recording(stage, output, of_chain=False), Reporter("samples", 8) as reporter:
    for done in range(1, 5):
        reporter.update(done, "calm")
    if "fail=true" in overrides:
        print("the fifth sample is broken", file=sys.stderr)
        raise SystemExit("no model learns from it")
    while "long=true" in overrides:
        time.sleep(2.1)
        reporter.update(4, "calm")
    output.mkdir()
    (output / "manifest.json").write_text("{}")
"""


# In the place of `python -m torch.distributed.run <options> -m <module> ...`: one rank, without torch's import.
TOY_LAUNCHER = f"""#!/bin/sh
shift 2
while [ "$1" != -m ]; do shift; done
exec {sys.executable} "$@"
"""


@pytest.fixture
def toy(tmp_path: Path) -> SlurmConfig:
    """A SLURM config whose jobs run the module `toy_stage`."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "toy_stage.py").write_text(TOY_STAGE)
    (launcher := tmp_path / "launcher").write_text(TOY_LAUNCHER)
    launcher.chmod(0o755)
    setup = [f"export PYTHONPATH={tmp_path / 'modules'}:{ROOT / 'src'}"]
    return SlurmConfig(time="60", setup=setup, python=str(launcher))


def submit(run_dir: Path, slurm: SlurmConfig, *chain: StageJob) -> list[int]:
    """As `minitron submit` does, with the toy on the ranks."""
    jobs = submit_chain(render_chain(run_dir, chain, slurm, module="toy_stage"), say=lambda line: None)
    write_steps(run_dir, "submit", [ListedStep(job.name, job.stage, str(run_dir / job.name)) for job in chain])
    return [job.job_id for job in jobs]


@pytest.fixture
def ask(capsys: pytest.CaptureFixture[str]) -> Asks:
    """Exit code and what is printed by `minitron status` or `cancel`."""

    def asked(*command: object) -> tuple[int, str]:
        code = main([str(word) for word in command])
        shown = capsys.readouterr()
        return code, shown.out + shown.err

    return asked


def until(ready: Callable[[], bool], said: Callable[[], object]) -> None:
    end = time.monotonic() + STILL_SECONDS
    while not ready():
        assert time.monotonic() < end, said()
        time.sleep(0.2)


# ---- under SLURM -----------------------------------------------------------------------------------------------------


@pytest.mark.slurm
def test_a_failed_job_is_shown_with_what_its_stage_said_last(
    slurm_cluster: SingleNodeSlurm, toy: SlurmConfig, tmp_path: Path, ask: Asks
) -> None:
    run_dir = tmp_path / "run"
    chain = [StageJob("prune"), StageJob("distill", ("fail=true",)), StageJob("export-hf", name="export")]
    ids = submit(run_dir, toy, *chain)
    slurm_cluster.wait_for_jobs(ids)
    code, said = ask("status", run_dir)
    assert code == 1
    lines = said.splitlines()
    assert lines[0] == f"{run_dir} (submitted to SLURM), 3 steps: 1 complete, 1 failed, 1 cancelled"
    assert lines[1] == f"  1 prune    complete    job {ids[0]}: COMPLETED"
    assert lines[2].startswith(
        f"  2 distill  failed      job {ids[1]}: FAILED (NonZeroExitCode); samples 4/8, last seen "
    )
    assert lines[2].endswith("ago: SystemExit: no model learns from it")
    assert lines[3] == f"      {run_dir}/slurm/02-distill-{ids[1]}.log ends:"
    tail = lines[4:-1]  # what srun says of it may come between
    assert tail[0] == "      | the fifth sample is broken" and "      | no model learns from it" in tail
    assert lines[-1].startswith(f"  3 export   cancelled   job {ids[2]}: CANCELLED")
    assert ask("cancel", run_dir) == (0, f"{run_dir}: nothing of it runs or waits, so there is nothing to cancel.\n")


@pytest.mark.slurm
def test_what_waits_and_what_runs_is_told_apart_and_cancelled(
    slurm_cluster: SingleNodeSlurm, toy: SlurmConfig, tmp_path: Path, ask: Asks
) -> None:
    run_dir = tmp_path / "run"
    ids = submit(run_dir, toy, StageJob("distill", ("long=true",)), StageJob("evaluate"))
    until(lambda: "samples 4/8" in ask("status", run_dir)[1], lambda: ask("status", run_dir))
    code, said = ask("status", run_dir)
    _, runs, waits = said.splitlines()
    assert code == 0
    assert re.fullmatch(
        rf"  1 distill   running     job {ids[0]}: RUNNING \(\S+\); samples 4/8 \(50%\), .+ each, .+ left, "
        r"last .+ ago; calm",
        runs,
    )
    assert waits == f"  2 evaluate  waiting     job {ids[1]}: PENDING (Dependency)"

    code, said = ask("cancel", run_dir)
    assert code == 0
    assert re.fullmatch(
        rf"job {ids[0]}: distill, RUNNING \(\S+\): cancelled\njob {ids[1]}: evaluate, PENDING \(Dependency\): "
        r"cancelled\n",
        said,
    )
    assert slurm_cluster.wait_for_jobs(ids) == dict.fromkeys(ids, "CANCELLED")
    code, said = ask("status", run_dir)
    assert code == 1 and said.startswith(f"{run_dir} (submitted to SLURM), 2 steps: 2 cancelled\n")


@pytest.mark.slurm
def test_jobs_that_slurm_has_forgotten_are_told_by_what_they_left(
    slurm_cluster: SingleNodeSlurm, tmp_path: Path, ask: Asks
) -> None:
    listed = [{"name": name, "job_id": 900001 + place} for place, name in enumerate(("prune", "distill", "report"))]
    make_submission(tmp_path, listed)
    whole(tmp_path / "prune")
    (tmp_path / "slurm" / "02-distill-900002.log").write_text("the disk is full\n")
    code, said = ask("status", tmp_path)
    assert code == 1
    assert [line.split("job")[0].split() for line in said.splitlines() if " job " in line] == [
        ["1", "prune", "complete"],
        ["2", "distill", "unfinished"],
        ["3", "report", "not", "begun"],
    ]
    assert "      | the disk is full" in said
    assert "nothing to cancel" in ask("cancel", tmp_path)[1]


# ---- what SLURM says, by programs that stand in its place ------------------------------------------------------------


def test_the_tasks_of_an_array_are_one_step(tmp_path: Path, slurm_says: Says, ask: Asks) -> None:
    make_submission(tmp_path, [{"name": "search", "job_id": 7}])
    for task, log_id in enumerate((8, 9, 7)):
        (tmp_path / "slurm" / f"01-search-{log_id}.log").write_text(f"said by task {task}\n")
    now = time.time()
    for task in (0, 1):
        write_record(tmp_path / f"search.progress-{task}.json", job=f"7_{task}", done=3 + task, updated=now)
    write_record(tmp_path / "search.progress-2.json", job="6_2", done=99, updated=now)  # of an earlier submission
    slurm_says(squeue="7_0|7|8|RUNNING|None|n1\n7_1|7|9|RUNNING|None|n2\n7_[2-5]|7|7|PENDING|Resources|\n")
    code, said = ask("status", tmp_path)
    assert code == 0
    assert "search  running     job 7: 1 RUNNING (n1), 1 RUNNING (n2), 1 PENDING (Resources); task " in said
    assert "task 0 samples 3/8" in said and "task 1 samples 4/8" in said and "samples 99/" not in said

    slurm_says(squeue="7_0|7|8|RUNNING|None|n1\n7_1|7|9|FAILED|NonZeroExitCode|n2\n")
    code, said = ask("status", tmp_path)
    assert code == 1 and "search  failed" in said and "      | said by task 1\n" in said
    assert ask("cancel", tmp_path) == (0, "job 7_0: search, RUNNING (n1): cancelled\n")
    assert (tmp_path / "cancelled").read_text() == "7_0\n"


def test_what_squeue_has_forgotten_sacct_may_know(tmp_path: Path, slurm_says: Says, ask: Asks) -> None:
    make_submission(
        tmp_path, [{"name": name, "job_id": 7 + n} for n, name in enumerate(("prune", "distill", "report"))]
    )
    slurm_says(
        squeue="garbage\n||||\n",
        sacct="7|7|COMPLETED|0:0|n1\n8|8|OUT_OF_MEMORY|0:125|n1\n9|9|CANCELLED by 1000|0:0|None assigned\n",
    )
    code, said = ask("status", tmp_path)
    assert code == 1
    assert "prune    unfinished  job 7: COMPLETED; but no artifact stands at" in said
    assert "distill  failed      job 8: OUT_OF_MEMORY (exit code 0:125)\n" in said
    assert "report   cancelled   job 9: CANCELLED\n" in said


def test_where_slurm_cannot_be_asked_the_files_speak(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ask: Asks
) -> None:
    make_submission(
        tmp_path, [{"name": name, "job_id": 7 + n} for n, name in enumerate(("prune", "distill", "report"))]
    )
    whole(tmp_path / "prune")
    write_record(tmp_path / "distill.progress.json", job="8", host="n17", done=4, updated=time.time())
    (tmp_path / "slurm" / "03-report-9.log").write_text("begun\n")
    monkeypatch.setenv("PATH", str(tmp_path))
    code, said = ask("status", tmp_path)
    assert code == 0
    first, unasked, *steps = said.splitlines()
    assert first.endswith("3 steps: 1 complete, 1 running, 1 unknown")
    assert unasked == "SLURM cannot be asked here (squeue): this is what the files say."
    assert steps[1].startswith("  2 distill  running     job 8; samples 4/8 (50%), 2 s each, 8 s left, last ")
    assert ask("cancel", tmp_path) == (
        1,
        "SLURM cannot be asked here (squeue). On a machine where it can: scancel 7 8 9\n",
    )


# ---- in a shell ------------------------------------------------------------------------------------------------------


def test_a_killed_process_reads_as_ended_and_one_that_goes_on_as_running(
    toy: SlurmConfig, tmp_path: Path, ask: Asks
) -> None:
    run_dir = tmp_path / "run"
    write_steps(run_dir, "compress", [listed(run_dir, name) for name in ("prune", "distill")])
    assert ask("status", run_dir)[0] == 0
    with (run_dir / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "toy_stage", "distill", "long=true"],
            env={
                **os.environ,
                "PYTHONPATH": f"{tmp_path / 'modules'}:{ROOT / 'src'}",
                "MINITRON_RUN_DIR": str(run_dir),
            },
            stderr=log,
        )
    try:
        until(lambda: "samples 4/8" in ask("status", run_dir)[1], lambda: ask("status", run_dir))
        code, said = ask("status", run_dir)
        assert code == 0
        assert said.startswith(f"{run_dir} (compress), 2 steps: 1 not begun, 1 running\n  1 prune    not begun\n")
        assert said.endswith(f"; calm; process {process.pid} on {socket.gethostname()}\n")
    finally:
        process.kill()
    until(lambda: "unfinished" in ask("status", run_dir)[1], lambda: ask("status", run_dir))  # not reaped yet
    process.wait()
    code, said = ask("status", run_dir)
    assert code == 1
    assert f"ago: process {process.pid} on {socket.gethostname()} ended without finishing\n" in said
    assert f"      {run_dir / 'log'} ends:\n" in said
    assert "nothing to cancel" in ask("cancel", run_dir)[1]


def test_a_process_is_told_to_stop_and_leaves_its_last_words(tmp_path: Path, ask: Asks) -> None:
    script = f"""
import signal, sys, time
from minitron_nemo.checks import Interrupted
from minitron_nemo.run_record import begins, gets_on, recording

def stop(*_):
    raise Interrupted("stopped after 3 of 8 samples, as it was asked to.")

with recording("distill", {str(tmp_path / "distill")!r}, of_chain=False):
    signal.signal(signal.SIGTERM, stop)
    begins("samples", 8)
    while True:
        gets_on("samples", 3, 8)
        time.sleep(0.1)
"""
    write_steps(tmp_path, "compress", [listed(tmp_path, "distill")])
    process = subprocess.Popen(
        [sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": str(ROOT / "src")}, stderr=subprocess.DEVNULL
    )
    try:
        until(lambda: "samples 3/8" in ask("status", tmp_path)[1], lambda: ask("status", tmp_path))
        assert ask("cancel", tmp_path) == (
            0,
            f"process {process.pid} on {socket.gethostname()}: distill, told to stop; it keeps what it can and ends "
            "with exit code 75\n",
        )
        process.wait(STILL_SECONDS)
    finally:
        process.kill()
    code, said = ask("status", tmp_path)
    assert code == 1 and "distill  stopped     samples 3/8, last seen " in said
    assert said.endswith("ago: stopped after 3 of 8 samples, as it was asked to.\n")


def test_a_number_that_another_process_has_now_is_not_sent_a_signal(tmp_path: Path, ask: Asks) -> None:
    """The process that asks has the number of the record's, but began at another time."""
    write_steps(tmp_path, "compress", [listed(tmp_path, "distill")])
    created = psutil.Process().create_time()
    write_record(tmp_path / "distill.progress.json", pid=os.getpid(), created=created - 60, done=4)
    assert "unfinished" in ask("status", tmp_path)[1]
    assert "nothing to cancel" in ask("cancel", tmp_path)[1]
    write_record(tmp_path / "distill.progress.json", pid=os.getpid(), created=created, done=4)
    assert "running" in ask("status", tmp_path)[1]


def test_a_process_of_another_host_is_ended_there(tmp_path: Path, ask: Asks) -> None:
    write_steps(tmp_path, "compress", [listed(tmp_path, "distill")])
    write_record(tmp_path / "distill.progress.json", host="n17", pid=4, job="55", done=4, updated=time.time())
    code, said = ask("status", tmp_path)
    assert code == 0 and said.endswith("; process 4 on n17, which cannot be seen from here\n")
    assert ask("cancel", tmp_path) == (
        1,
        "process 4 on n17: distill, which cannot be ended from here. "
        f"Run there: minitron cancel {tmp_path}, or anywhere: scancel 55\n",
    )


@pytest.mark.parametrize(
    ("silent", "each", "longest", "hung"),
    [
        (23 * 60, 2.0, 5.0, True),
        (23 * 60, 90.0, 100.0, False),  # slow: 15 times as long as one takes
        (23 * 60, 2.0, 600.0, False),  # it has been as silent before, in a validation
        (200, 0.1, 0.2, False),  # a checkpoint between two steps
        (3600, None, 0.0, False),  # nothing has been done yet: how long it takes is not known
    ],
)
def test_hung_is_told_from_slow_by_how_long_one_took(
    silent: float, each: float | None, longest: float, hung: bool
) -> None:
    now = 1e9
    record = a_record(done=None if each is None else 4, seconds_each=each, longest=longest, updated=now - silent)
    said = status.progress_of(record, now)
    assert ("no progress for 23 min, where one took 2 s: perhaps hung" in said) == hung
    assert ("perhaps hung" in said) == hung
    assert hung or status.duration(silent) in said
    record.done = 8
    assert "hung" not in status.progress_of(record, now), "what follows the last one was not measured"


# ---- what a run writes of itself -------------------------------------------------------------------------------------


def test_a_record_goes_with_its_artifact_and_a_mistake_leaves_none(tmp_path: Path) -> None:
    with recording("prune", tmp_path / "student", of_chain=False):
        (record,) = read_records(tmp_path / "student")
        assert (record.step, record.pid, record.runs()) == ("prune", os.getpid(), True)
    assert not [*tmp_path.iterdir()]
    for of_chain in (False, True):
        for error in (Mistake("no such corpus."), NothingKept("stopped."), RuntimeError("cannot\nbe")):
            with pytest.raises(type(error)), recording("prune", tmp_path / "student", of_chain=of_chain):
                raise error
            records = read_records(tmp_path / "student")
            assert bool(records) == (of_chain or isinstance(error, RuntimeError))
            if records:
                ended = "stopped" if isinstance(error, NothingKept) else "failed"
                said = "RuntimeError: cannot" if isinstance(error, RuntimeError) else str(error)
                assert (records[0].ended, records[0].said, records[0].runs()) == (ended, said, False)
                (tmp_path / "student.progress.json").unlink()


def test_where_nothing_can_be_written_a_run_goes_on_without(tmp_path: Path) -> None:
    with recording("prune", tmp_path / "nowhere" / "student", of_chain=False), Reporter("samples", 2) as reporter:
        reporter.update(1)
    assert not [*tmp_path.iterdir()]


def test_ranks_but_the_first_and_forked_processes_write_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with recording("prune", tmp_path / "student", of_chain=False):
        if (child := os.fork()) == 0:
            begins("of the child", 3)
            os._exit(0)
        os.waitpid(child, 0)
        (record,) = read_records(tmp_path / "student")
        assert record.label == ""
    monkeypatch.setenv("RANK", "1")
    with recording("prune", tmp_path / "student", of_chain=False):
        assert not [*tmp_path.iterdir()]


def test_a_record_says_how_long_one_takes_and_the_longest_silence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [1e9]
    monkeypatch.setattr(time, "time", lambda: clock[0])
    with recording("distill", tmp_path / "it", of_chain=False), Reporter("training", 100, show=False) as reporter:
        for step in (41, 42, 43, 44):  # it goes on after 40
            clock[0] += 10.0
            reporter.update(step, f"loss {step}")
        clock[0] += 60.0
        is_at_work()  # a validation
        (record,) = read_records(tmp_path / "it")
    assert (record.label, record.done, record.total, record.note) == ("training", 44, 100, "loss 44")
    assert (record.seconds_each, record.longest, record.updated) == (25.0, 60.0, 1e9 + 100.0)


def test_the_job_of_a_record_is_that_of_its_allocation(monkeypatch: pytest.MonkeyPatch) -> None:
    variables = {"MINITRON_JOB": "before", "SLURM_JOB_ID": "12"}
    monkeypatch.setattr(os, "environ", variables)
    leave_allocation()
    assert variables == {"MINITRON_JOB": "12"}
    variables.update(SLURM_JOB_ID="12", SLURM_ARRAY_JOB_ID="10", SLURM_ARRAY_TASK_ID="4")
    leave_allocation()
    assert variables == {"MINITRON_JOB": "10_4"}


def test_a_moved_run_is_read_where_it_is_now(tmp_path: Path, ask: Asks) -> None:
    before, elsewhere = tmp_path / "before", tmp_path / "elsewhere" / "teacher"
    steps = [listed(before, "prune"), ListedStep("import_hf", "import-hf", str(elsewhere))]
    write_steps(before, "compress", steps)
    for place in (before / "prune", elsewhere):
        whole(place)
    before.rename(tmp_path / "after")
    assert ask("status", tmp_path / "after")[1].startswith(f"{tmp_path / 'after'} (compress), 2 steps: 2 complete\n")


def test_a_list_that_stands_is_not_written_again(tmp_path: Path) -> None:
    write_steps(tmp_path, "compress", [listed(tmp_path, "prune")])
    os.utime(tmp_path / "steps.json", (1, 1))
    write_steps(tmp_path, "compress", [listed(tmp_path, "prune")])
    assert (tmp_path / "steps.json").stat().st_mtime == 1
    write_steps(tmp_path, "submit", [listed(tmp_path, "prune")])
    assert (tmp_path / "steps.json").stat().st_mtime > 1


def test_stages_run_by_themselves_are_seen_too(tmp_path: Path, ask: Asks) -> None:
    write_record(tmp_path / "it.progress.json", ended="failed", said="RuntimeError: no memory", done=4)
    code, said = ask("status", tmp_path)
    assert code == 1 and said.startswith(
        f"{tmp_path} (stages run by themselves), 1 step: 1 failed\n  1 distill  failed"
    )


def test_a_submission_lists_its_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slurm_says: Says, ask: Asks
) -> None:
    slurm_says(squeue="17|17|17|PENDING|Priority|\n")
    config = OmegaConf.create({"run_dir": str(tmp_path / "run"), "submit": {"dry_run": False}})
    run(config, [StageJob("prune", output=str(tmp_path / "run" / "student"))])
    assert read_steps(tmp_path / "run") == ("submit", [listed(tmp_path / "run", "prune", output="student")])
    assert ask("status", tmp_path / "run")[1].endswith("  1 prune  waiting     job 17: PENDING (Priority)\n")


# ---- what is asked wrongly -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("look", ["status", "cancel"])
def test_a_place_without_a_run_is_named_with_what_was_looked_for(look: str, tmp_path: Path, ask: Asks) -> None:
    code, said = ask(look, tmp_path / "runs")
    assert (code, said) == (
        2,
        f"minitron {look}: {tmp_path / 'runs'} is no directory. Name a run_dir; a recipe's is runs/<name>.\n",
    )
    code, said = ask(look, tmp_path)
    assert code == 2
    assert (
        f"minitron {look}: {tmp_path} holds no run: neither steps.json, which compress and submit write there" in said
    )
    for wrong in ([], ["recipe=quickstart"], ["a", "b"]):
        assert ask(look, *wrong) == (
            2,
            f"minitron {look}: name one directory, that of the run, and no keys: minitron {look} runs/quickstart\n",
        )
    code, said = ask(look, "--help")
    assert code == 0 and said.startswith(f"usage: minitron {look} RUNDIR\n\n{look}: ")


def test_what_launchers_say_afterwards_is_left_out_of_a_logs_end(tmp_path: Path, slurm_says: Says, ask: Asks) -> None:
    make_submission(tmp_path, [{"name": "distill", "job_id": 8}])
    slurm_says(squeue="8|8|8|FAILED|NonZeroExitCode|n1\n")
    said_by_ranks = [f"line {number}" for number in range(20)]
    elastic = "E1130 10:44:01.123000 4242 torch/distributed/elastic/"
    launchers = [
        "W1130 10:44:01.120000 4242 torch/distributed/elastic/multiprocessing/api.py:900] Sending process 7 SIGTERM",
        f"{elastic}multiprocessing/api.py:874] failed (exitcode: 2) local_rank: 0 (pid: 4243) of binary: python",
        "Traceback (most recent call last):",
        *(["torch.distributed.elastic.multiprocessing.errors.ChildFailedError:"] * 30),
        "srun: error: n1: task 0: Exited with exit code 1",
    ]
    (tmp_path / "slurm" / "01-distill-8.log").write_text("\n".join([*said_by_ranks, *launchers]) + "\n")
    said = ask("status", tmp_path)[1]
    assert [line for line in said.splitlines() if line.startswith("      | ")] == [
        f"      | {line}" for line in said_by_ranks[-15:]
    ]


# ---- runs as they are left -------------------------------------------------------------------------------------------


def listed(run_dir: Path, name: str, *, output: str = "") -> ListedStep:
    return ListedStep(name, name, str(run_dir / (output or name)))


def whole(output: Path) -> None:
    output.mkdir(parents=True)
    (output / "manifest.json").write_text("{}")


def a_record(**given: Any) -> Record:
    values = {"step": "distill", "host": socket.gethostname(), "pid": 2**22 + 1, "created": 1.0, "began": 1.0}
    values |= {"label": "samples", "total": 8, "seconds_each": 2.0, "updated": 1.0}
    return Record(**{**values, **given})


def write_record(file: Path, **given: Any) -> None:
    file.write_text(json.dumps(asdict(a_record(**given))))


def make_submission(run_dir: Path, jobs: Sequence[dict[str, Any]]) -> None:
    (run_dir / "slurm").mkdir()
    scripts = [f"{place:02d}-{job['name']}.sbatch" for place, job in enumerate(jobs, start=1)]
    text = json.dumps([job | {"script": script} for job, script in zip(jobs, scripts, strict=True)])
    (run_dir / "slurm" / "jobs.json").write_text(text)
    write_steps(run_dir, "submit", [listed(run_dir, job["name"]) for job in jobs])


@pytest.fixture
def slurm_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Says:
    """Programs in SLURM's place: squeue and sacct print what they are given, scancel writes down what it is told."""
    programs = tmp_path / "programs"
    programs.mkdir()
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")

    def says(**printed: str) -> None:
        texts = {"sacct": "exit 1", "scancel": f'echo "$@" >> {tmp_path / "cancelled"}', "sbatch": "echo 17"}
        texts |= {name: f"cat <<'END'\n{text}END" for name, text in printed.items()}
        for name, text in texts.items():
            (programs / name).write_text(f"#!/bin/sh\n{text}\n")
            (programs / name).chmod(0o755)

    return says

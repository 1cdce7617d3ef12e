"""status: the steps of the run in a directory, each with its state, how far it is, and why it failed.

Works the same for `compress` in a shell and for `submit`: it reads which steps the run has, what each one's process
writes while it goes, which artifacts are whole, and asks SLURM about its jobs where there are any. A step that gets
nothing done for many times as long as one such thing took is said to hang, perhaps; SLURM's time alone says nothing.

    complete    its artifact is whole
    running     a process makes it
    waiting     SLURM has its job in the queue
    stopped     it was told to stop; its last words say whether the same command goes on there
    unfinished  its process ended without a word, killed for instance
    failed      with the end of its log
    cancelled   by a person, or by SLURM since a step before it failed
    not begun
    unknown     its job's log is there, but SLURM cannot be asked here

Exit code 0: all is complete or goes on; 1: a step has failed, or was stopped, cancelled or killed before its end; 2:
there is no run there.
"""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from minitron_nemo import run_record
from minitron_nemo.checks import NothingThere, require
from minitron_nemo.cluster import queue
from minitron_nemo.cluster.submit import JOBS
from minitron_nemo.kinds import ARTIFACT, kind_of
from minitron_nemo.run_record import ListedStep, Record

COMPLETE, RUNNING, WAITING, NOT_BEGUN = "complete", "running", "waiting", "not begun"
STOPPED, UNFINISHED, FAILED, CANCELLED, UNKNOWN = "stopped", "unfinished", "failed", "cancelled", "unknown"
_WENT_WRONG = {STOPPED, UNFINISHED, FAILED, CANCELLED}
_TAIL_LINES, _TAIL_BYTES = 15, 64 * 1024

_HANGS_AFTER = 300.0
"""Seconds without progress below which nothing is said to hang: a checkpoint may take them between two fast steps."""
_TIMES_ONE, _TIMES_LONGEST = 20, 3
"""How many times as long as one thing took on the average, and as the longest silence so far."""

_TORCHRUN = re.compile(r"[WE]\d{4} [\d:.]+ .*torch/distributed/elastic/")


@dataclass
class Job:
    """A job of a submission, and what SLURM says of it."""

    job_id: int
    script: Path
    tasks: list[queue.Task] = field(default_factory=list)
    """Empty: SLURM does not know it any more, or cannot be asked."""

    def log(self) -> Path | None:
        """That of the task which failed, or else the one written last; an array has one a task."""
        begin = f"{self.script.stem}-"
        logs = {file.stem.removeprefix(begin): file for file in self.script.parent.glob(f"{begin}*.log")}
        for task in self.tasks:
            if task.state in queue.FAILED and task.log_id in logs:
                return logs[task.log_id]
        ours = [file for name, file in logs.items() if name.isdigit() and int(name) >= self.job_id]
        return max(ours, key=lambda file: file.stat().st_mtime, default=None)


@dataclass
class StepSeen:
    """A step of a run as it is now."""

    step: ListedStep
    state: str
    records: list[Record]
    job: Job | None = None

    @property
    def log(self) -> Path | None:
        if self.job is not None and (log := self.job.log()):
            return log
        places = [Path(record.log) for record in self.records if record.log]
        return next((place for place in places if place.is_file()), None)


@dataclass
class RunSeen:
    """A run as it is now."""

    run_dir: Path
    door: str
    """That was told its steps last; empty: none was, and these are stages run by themselves."""
    steps: list[StepSeen]
    slurm_answers: bool
    """Whether SLURM could be asked; true where there is nothing to ask."""


def run(run_dir: Path) -> int:
    """Print the run's steps. Returns: the exit code. Raises: NothingThere: no run there."""
    seen = look(run_dir)
    for line in lines_of(seen, time.time()):
        print(line)
    return int(any(step.state in _WENT_WRONG for step in seen.steps))


# ---- looking ---------------------------------------------------------------------------------------------------------


def look(run_dir: Path) -> RunSeen:
    """Read what a run left and ask SLURM. Raises: NothingThere: no such directory, or no run in it."""
    require(run_dir.is_dir(), f"{run_dir} is no directory. Name a run_dir; a recipe's is runs/<name>.", NothingThere)
    door, steps = run_record.read_steps(run_dir) or ("", [])
    listed = {Path(step.output).resolve() for step in steps}
    others = {
        output: records
        for output, records in run_record.records_in(run_dir).items()
        if Path(output).resolve() not in listed
    }
    require(
        bool(steps or others),
        f"{run_dir} holds no run: neither {run_record.STEPS}, which compress and submit write there, nor "
        "*.progress.json beside a step's output. Name a run_dir; a recipe's is runs/<name>.",
        NothingThere,
    )
    jobs = _jobs(run_dir) if door == "submit" else {}
    found = queue.ask([job.job_id for job in jobs.values()])
    for job in jobs.values():
        job.tasks = (found or {}).get(job.job_id, [])
    seen = [
        _seen(step, run_record.read_records(step.output), jobs.get(step.name), answers=found is not None)
        for step in steps
    ]
    for output, records in others.items():
        seen.append(_seen(ListedStep(records[0].step, "", output), records, None, answers=True))
    return RunSeen(run_dir, door, seen, slurm_answers=found is not None)


def _jobs(run_dir: Path) -> dict[str, Job]:
    """By step, the jobs of the last submission."""
    folder = run_dir / "slurm"
    try:
        listed = json.loads((folder / JOBS).read_text())
        return {each["name"]: Job(int(each["job_id"]), folder / Path(each["script"]).name) for each in listed}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _seen(step: ListedStep, records: Sequence[Record], job: Job | None, *, answers: bool) -> StepSeen:
    if job is not None:  # those of an earlier submission say nothing of this one
        records = [each for each in records if each.job is None or each.job.split("_")[0] == str(job.job_id)]
    records = list(records)
    return StepSeen(step, _state(step, records, job, answers=answers), records, job)


def _state(step: ListedStep, records: Sequence[Record], job: Job | None, *, answers: bool) -> str:
    whole = kind_of(Path(step.output)) == ARTIFACT
    if any(record.runs() for record in records):
        return RUNNING
    if job is not None and job.tasks:
        return _state_of_job(job.tasks, whole=whole)
    if whole:
        return COMPLETE
    elsewhere = job is None or not answers  # else SLURM has ended what it does not know any more
    if elsewhere and any(record.runs() is None for record in records):
        return RUNNING
    if records:
        return records[0].ended or UNFINISHED
    if job is not None and job.log() is not None:
        return UNFINISHED if answers else UNKNOWN
    return NOT_BEGUN if answers or job is None else UNKNOWN


def _state_of_job(tasks: Sequence[queue.Task], *, whole: bool) -> str:
    states = {task.state for task in tasks}
    if states & queue.FAILED:  # of an array one task is enough
        return FAILED
    if states <= {queue.COMPLETED}:
        return COMPLETE if whole else UNFINISHED
    if queue.CANCELLED in states and not any(task.unfinished for task in tasks):
        return CANCELLED
    return WAITING if states <= queue.WAITING | {queue.COMPLETED} else RUNNING


# ---- saying ----------------------------------------------------------------------------------------------------------


def lines_of(seen: RunSeen, now: float) -> Iterator[str]:
    """What a person reads; `now` in seconds since 1970."""
    counts = Counter(step.state for step in seen.steps)
    by = {"submit": "submitted to SLURM", "compress": "compress", "": "stages run by themselves"}[seen.door]
    number = f"{len(seen.steps)} step{'s' if len(seen.steps) != 1 else ''}"
    yield f"{seen.run_dir} ({by}), {number}: {', '.join(f'{n} {state}' for state, n in counts.items())}"
    if not seen.slurm_answers:
        yield "SLURM cannot be asked here (squeue): this is what the files say."
    width = max(len(step.step.name) for step in seen.steps)
    for place, step in enumerate(seen.steps, start=1):
        yield f"{place:3} {step.step.name:{width}}  {step.state:10}  {'; '.join(_details(step, now))}".rstrip()
        if step.state in (FAILED, UNFINISHED):
            yield from _tail(step.log)


def _details(step: StepSeen, now: float) -> Iterator[str]:
    if step.job is not None:
        yield _words_of(step.job)
    if step.state in (COMPLETE, CANCELLED):
        return
    for record in step.records:
        who = f"task {record.job.partition('_')[2]} " if record.job and "_" in record.job else ""
        if step.state != RUNNING:
            yield who + _last_words(record, now)
        elif record.ended is None:
            yield who + progress_of(record, now) + ("" if step.job else f"; {_process(record)}")
    if step.state == RUNNING and not any(record.ended is None for record in step.records):
        yield "starting"
    if step.state == UNFINISHED and step.job and {task.state for task in step.job.tasks} == {queue.COMPLETED}:
        yield f"but no artifact stands at {step.step.output}"


def _words_of(job: Job) -> str:
    if not job.tasks:
        return f"job {job.job_id}"
    if len(job.tasks) == 1:
        return f"job {job.tasks[0].name}: {job.tasks[0].words}"
    counts = Counter(task.words for task in job.tasks)
    return f"job {job.job_id}: {', '.join(f'{number} {words}' for words, number in counts.items())}"


def progress_of(record: Record, now: float) -> str:
    """How far a step is, how fast, and since when it has been silent."""
    if record.done is None or record.total is None:
        what = f"begins {record.label}" if record.label else "at work"
        return f"{what} since {_age(record, now)}"
    parts = [f"{record.label} {record.done:,}/{record.total:,} ({record.done / max(record.total, 1):.0%})"]
    if record.seconds_each is not None and record.done < record.total:
        parts.append(f"{duration(record.seconds_each)} each")
        if hangs(record, now):
            parts.append(
                f"no progress for {_age(record, now)}, where one took {duration(record.seconds_each)}: perhaps hung"
            )
            return ", ".join(parts)
        parts.append(f"{duration((record.total - record.done) * record.seconds_each)} left")
    parts.append(f"last {_age(record, now)} ago")
    return ", ".join(parts) + (f"; {' '.join(record.note.split())}" if record.note else "")


def hangs(record: Record, now: float) -> bool:
    """Whether it is silent for so much longer than it was while it went on that it may have stopped to."""
    if record.seconds_each is None or record.done is None or record.total is None or record.done >= record.total:
        return False  # what it does next was not measured
    usual = max(_TIMES_ONE * record.seconds_each, _TIMES_LONGEST * record.longest)
    return now - record.updated > max(_HANGS_AFTER, usual)


def _last_words(record: Record, now: float) -> str:
    if record.ended is None:
        end = f"{_process(record)} ended without finishing"
    else:
        end = record.said or record.ended
    counted = record.done is not None and record.total is not None
    far = f"{record.label} {record.done:,}/{record.total:,}, " if counted else ""
    return f"{far}last seen {_age(record, now)} ago: {end}"


def _process(record: Record) -> str:
    here = record.runs() is not None
    return f"process {record.pid} on {record.host}" + ("" if here else ", which cannot be seen from here")


def _age(record: Record, now: float) -> str:
    return duration(round(now - record.updated))


def duration(seconds: float) -> str:
    """As a person says it, in two figures or two units."""
    seconds = max(0.0, seconds)
    if seconds < 9.95:
        return f"{seconds:.2g} s" if seconds >= 0.01 else "0 s" if seconds == 0 else f"{seconds * 1000:.2g} ms"
    whole = round(seconds)
    if whole < 120:
        return f"{whole} s"
    if whole < 2 * 3600:
        return f"{whole // 60} min"
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours // 24} days {hours % 24} h"


def _tail(log: Path | None) -> Iterator[str]:
    if log is None:
        return
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - _TAIL_BYTES))
            text = file.read().decode(errors="replace")
    except OSError as error:
        text = f"cannot be read: {error.strerror}"
    yield f"      {log} ends:"
    for line in _without_launchers(text.splitlines())[-_TAIL_LINES:]:
        yield f"      | {line}"


def _without_launchers(lines: list[str]) -> list[str]:
    """Without what torchrun and srun say of it afterwards, which is longer than what the ranks said themselves."""
    reports = [n for n, line in enumerate(lines) if _TORCHRUN.match(line) and "failed (exitcode" in line]
    begin = reports[-1] if reports else 0
    while begin > 0 and _TORCHRUN.match(lines[begin - 1]):
        begin -= 1
    return lines[:begin] if begin > 0 else lines

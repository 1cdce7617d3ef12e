"""What a run writes of itself while it goes, so that `minitron status` and `minitron cancel` can read it elsewhere.

    <run_dir>/steps.json          its steps in order, by the door that was told them last, compress or submit
    <output>.progress.json        beside a step's output while a process makes it: which process, how far it is, when
                                  it last got something done, and how long such a thing takes; goes when the artifact is
                                  whole
    <output>.progress-3.json      the same of task 3 of a SLURM array, whose tasks share an output

Rank 0 writes, a few hundred bytes every few seconds at most, each time the whole file; where it cannot, the run goes on
without. Nothing here decides what a run does: a record may be old, or that of a run that was killed.
"""

from __future__ import annotations

import dataclasses
import glob
import json
import os
import socket
import stat
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from minitron_nemo.checks import Interrupted, Mistake, NothingKept

STEPS = "steps.json"
JOB = "MINITRON_JOB"
"""Environment variable: the SLURM job that this process is of, `123`, or `123_4` of an array (`leave_allocation`)."""
STOPPED, FAILED = "stopped", "failed"
"""How a process that could say so ended; one that was killed could not."""
_WRITES_EVERY = 2.0  # seconds
_SAME_START = 2.0  # seconds between two readings of when a process began: the system's clock may have been set


# ---- the steps of a run ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ListedStep:
    """A step that a run was told to make, and where."""

    name: str
    stage: str
    output: str
    """Of a run directory that may be moved: relative to it where it lies inside."""


def write_steps(run_dir: Path | str, door: str, steps: Sequence[ListedStep]) -> None:
    """Say which steps `door` was told to make. One process calls; a list that stands already is not touched."""
    file, root = Path(run_dir) / STEPS, os.path.abspath(run_dir)
    listed = []
    for step in steps:
        output = os.path.abspath(step.output)
        inside = output.startswith(os.path.join(root, ""))
        listed.append(asdict(dataclasses.replace(step, output=os.path.relpath(output, root) if inside else output)))
    text = json.dumps({"door": door, "steps": listed}, indent=2) + "\n"
    with suppress(OSError):
        if not file.is_file() or file.read_text() != text:
            file.parent.mkdir(parents=True, exist_ok=True)
            _replace(file, text)


def read_steps(run_dir: Path) -> tuple[str, list[ListedStep]] | None:
    """The door and its steps, outputs as paths from here; None where no such list stands."""
    try:
        found = json.loads((run_dir / STEPS).read_text())
        steps = [ListedStep(**each) for each in found["steps"]]
        return found["door"], [dataclasses.replace(step, output=str(run_dir / step.output)) for step in steps]
    except (OSError, ValueError, KeyError, TypeError):
        return None


# ---- the record of a step that is being made -------------------------------------------------------------------------


@dataclass
class Record:
    """One process's work on one step. Times are seconds since 1970, by the clock of its host."""

    step: str
    host: str
    pid: int
    created: float
    """When the process began, which tells it from a later one of the same number."""
    began: float
    """When it began this step."""
    job: str | None = None
    """The SLURM job that it is of."""
    log: str | None = None
    """Where its messages go, where that is a file."""
    label: str = ""
    """What it does now; empty: nothing that is counted."""
    done: int | None = None
    total: int | None = None
    note: str = ""
    updated: float = 0.0
    """When it last got something done, or began something."""
    seconds_each: float | None = None
    """How long one of `total` has taken, on the average."""
    longest: float = 0.0
    """Seconds, the longest that it got nothing done since `label` began."""
    ended: str | None = None
    """STOPPED or FAILED; None: it goes on, or was killed."""
    said: str = ""
    """Its last words."""

    def runs(self) -> bool | None:
        """Whether its process is still there; None: it is another host's, and not to be seen from here."""
        if self.ended is not None:
            return False
        if self.host != socket.gethostname():
            return None
        try:
            process = psutil.Process(self.pid)
            same = abs(process.create_time() - self.created) < _SAME_START
            return same and process.status() != psutil.STATUS_ZOMBIE
        except psutil.Error:
            return False


def read_records(output: Path | str) -> list[Record]:
    """Those beside an output, of every process that works or worked on it, the newest first."""
    return sorted(filter(None, map(_read, _files(output))), key=lambda record: -record.updated)


def records_in(run_dir: Path) -> dict[str, list[Record]]:
    """By output, all records in a directory."""
    outputs = {str(file).rpartition(".progress")[0] for file in sorted(run_dir.glob("*.progress*.json"))}
    return {output: records for output in sorted(outputs) if (records := read_records(output))}


def _files(output: Path | str) -> list[Path]:
    return sorted(Path(output).parent.glob(f"{glob.escape(Path(output).name)}.progress*.json"))


def _read(file: Path) -> Record | None:
    known = {each.name for each in dataclasses.fields(Record)}
    try:
        return Record(**{name: value for name, value in json.loads(file.read_text()).items() if name in known})
    except (OSError, ValueError, TypeError, AttributeError):  # gone since, or another version's
        return None


class _Pen:
    """The record that this process writes, and when it did."""

    def __init__(self, file: Path, record: Record) -> None:
        self.file, self.record = file, record
        self.first_done, self.since, self.written = 0, record.began, 0.0

    def begin(self, label: str, total: int) -> None:
        self.record.label, self.record.total, self.record.done = label, total, None
        self.record.note, self.record.seconds_each, self.record.longest = "", None, 0.0
        self.record.updated = self.since = time.time()
        self.write()

    def get_on(self, done: int, note: str) -> None:
        first = self.record.done is None
        if first:
            self.first_done = done - 1
        self.record.done, self.record.note = done, note
        self.go_on(at_once=first)

    def go_on(self, *, at_once: bool = False) -> None:
        record, now = self.record, time.time()
        record.longest = max(record.longest, now - record.updated)
        record.updated = now
        if record.done is not None and record.done > self.first_done:
            record.seconds_each = (now - self.since) / (record.done - self.first_done)
        if at_once or now - self.written >= _WRITES_EVERY:
            self.write()

    def write(self) -> None:
        if os.getpid() == self.record.pid:  # and not a process that was forked from it
            self.written = time.time()
            with suppress(OSError):
                _replace(self.file, json.dumps(asdict(self.record)) + "\n")

    def remove(self) -> None:
        for file in (self.file, _partial(self.file)):
            with suppress(OSError):
                file.unlink()


_pen: list[_Pen] = []
"""At most one: a process makes one step at a time."""


@contextmanager
def recording(step: str, output: Path | str, *, of_chain: bool) -> Iterator[None]:
    """While this process makes `output`, progress is written beside it; afterwards nothing of it stays.

    What ends otherwise leaves its last words. Of a mistake, and of a stage that kept nothing when it was told to stop,
    only a chain does: they are about a step that nobody has typed, and many hours later.
    """
    if int(os.environ.get("RANK", 0)) > 0 or _pen:
        yield
        return
    now, job = time.time(), os.environ.get(JOB)
    task = f"-{job.partition('_')[2]}" if job is not None and "_" in job else ""
    created = psutil.Process().create_time()
    record = Record(step, socket.gethostname(), os.getpid(), created, now, job=job, log=_log(), updated=now)
    pen = _Pen(Path(f"{output}.progress{task}.json"), record)
    _pen.append(pen)
    try:
        pen.write()
        yield
    except BaseException as error:
        if isinstance(error, Mistake | NothingKept) and not of_chain:
            pen.remove()
        else:
            told = isinstance(error, Interrupted | KeyboardInterrupt)
            record.ended, record.said = STOPPED if told else FAILED, _words(error)
            pen.write()
        raise
    else:
        pen.remove()
    finally:
        _pen.clear()


def begins(label: str, total: int) -> None:
    """Something begins of which `total` are to be done. Any rank may call; rank 0 writes, within `recording`."""
    for pen in _pen:
        pen.begin(label, total)


def gets_on(label: str, done: int, total: int, note: str = "") -> None:
    """`done` of them are done."""
    for pen in _pen:
        if pen.record.label != label:
            pen.begin(label, total)
        pen.get_on(done, note)


def is_at_work() -> None:
    """Something has been done that is not counted, a validation's micro-batch between two steps for instance."""
    for pen in _pen:
        pen.go_on()


def _words(error: BaseException) -> str:
    first = next(iter(str(error).strip().splitlines()), "")
    return first if isinstance(error, Mistake | Interrupted) else f"{type(error).__name__}: {first}".rstrip(": ")


def _log() -> str | None:
    """The file that standard error goes to; None: a terminal, a pipe, or what is not known."""
    with suppress(OSError):
        place = os.readlink("/proc/self/fd/2")
        if stat.S_ISREG(os.stat(place).st_mode):
            return place
    return None


def _partial(file: Path) -> Path:
    return file.with_name(f".{file.name}.partial")


def _replace(file: Path, text: str) -> None:
    _partial(file).write_text(text)
    _partial(file).replace(file)

"""Progress of one job, as a person sees it: done, left, speed; who looks later, finds it in the run's record."""

from __future__ import annotations

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from minitron_nemo import run_record


def progress_bar(label: str, show: bool) -> Progress:
    """A rich bar where someone watches; a line now and then where output goes to a file (SLURM logs, CI)."""
    return Progress(
        TextColumn(f"[bold]{label}"),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=Console(file=sys.stderr),
        disable=not (show and sys.stderr.isatty()),
    )


class Reporter:
    """Progress of one job: a bar on a terminal, a line every `quiet_seconds` elsewhere."""

    def __init__(self, label: str, total: int, *, show: bool = True, quiet_seconds: float = 20.0) -> None:
        self.label, self.total, self.show, self.quiet_seconds = label, total, show, quiet_seconds
        self.bar = progress_bar(label, show)
        self.task = self.bar.add_task(label, total=total, note="")
        self.started = self.last_line = time.monotonic()
        self.first_done: int | None = None
        run_record.begins(label, total)

    def __enter__(self) -> Reporter:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def update(self, done: int, note: str = "") -> None:
        if self.first_done is None:
            self.first_done = done - 1
        self.bar.update(self.task, completed=done, note=note)
        run_record.gets_on(self.label, done, self.total, note)
        now = time.monotonic()
        if self.show and self.bar.disable and (now - self.last_line >= self.quiet_seconds or done >= self.total):
            rate = (done - self.first_done) / max(now - self.started, 1e-9)
            left = (self.total - done) / max(rate, 1e-9)
            print(f"{self.label} {done}/{self.total}  {note}  eta {left:.0f}s", file=sys.stderr, flush=True)
            self.last_line = now

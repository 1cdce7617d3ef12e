"""What the run cost: of each stage its time times its processes, the tokens it trained on, and what lies on disk.

    hours    wall time of the process that ended the stage x processes (one a device)    device-hours
    tokens   of training steps; a search's are those of all its candidates
    bytes    of the artifact's files, as its manifest says

A stage that was stopped and went on, or a search that several jobs shared, tells of its last process only. A stage that
several processes shared while one worked counts them all, as they were held.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from minitron_nemo.artifact import Artifact
from minitron_nemo.report.rows import seconds_of
from minitron_nemo.report.run import Run
from minitron_nemo.report.sheet import Sheet
from minitron_nemo.report.table import UNKNOWN, count, size


@dataclass(frozen=True)
class Bill:
    sheet: Sheet
    sentences: list[str]
    hours: float
    tokens: int


def bill_of(run: Run) -> Bill:
    steps = sorted((_Step.of(run, name) for name in run.artifacts), key=lambda step: -step.hours)
    rows = [
        [step.name, step.stage, f"{step.seconds:,.1f}", step.processes, step.device, *_sums([step])] for step in steps
    ]
    devices = list(dict.fromkeys(step.device for step in steps if step.device != UNKNOWN)) or ["device"]
    kind = "CPU-hours" if devices == ["cpu"] else "GPU-hours" if "cpu" not in devices else "device-hours"
    rows.append(["sum", "", f"{sum(step.seconds for step in steps):,.1f}", "", "", *_sums(steps)])
    heads = ["step", "stage", "seconds", "processes", "on", kind, "training tokens", "on disk"]
    sheet = Sheet(
        "bill", "What it cost", heads, rows,
        ["Hours are seconds times processes, the dearest step first. A step that was stopped and went on, or a "
         "search that several jobs shared, tells of its last process only."],
    )  # fmt: skip
    hours, tokens, on_disk = (sum(getattr(step, what) for step in steps) for what in ("hours", "tokens", "bytes"))
    where = "" if devices in (["cpu"], ["device"]) else f" ({', '.join(devices)})"
    said = (
        f"{hours:.2g} {kind}{where} over {len(steps)} steps, and {count(tokens)} tokens of training in all; "
        f"{size(on_disk)} on disk."
    )
    return Bill(sheet, [said], hours, tokens)


@dataclass(frozen=True)
class _Step:
    name: str
    stage: str
    seconds: float
    processes: str
    device: str
    hours: float
    tokens: int
    bytes: int

    @classmethod
    def of(cls, run: Run, name: str) -> _Step:
        artifact = run.artifacts[name]
        hours, seconds, processes, device = _cost(artifact)
        on_disk = sum(file["bytes"] for file in artifact.manifest["files"].values())
        return cls(name, artifact.stage, seconds, processes, device, hours, _tokens(run, name), on_disk)


def _sums(steps: Sequence[_Step]) -> list[str]:
    hours, tokens, on_disk = (sum(getattr(step, what) for step in steps) for what in ("hours", "tokens", "bytes"))
    return [f"{hours:.4f}", count(tokens), size(on_disk)]


def _cost(artifact: Artifact) -> tuple[float, float, str, str]:
    """Hours, seconds, processes and device; of an artifact whose manifest does not know, as of one process."""
    cost = artifact.manifest.get("cost")
    if cost is None:
        seconds = seconds_of(artifact) or 0.0
        return seconds / 3600, seconds, UNKNOWN, UNKNOWN
    return cost["seconds"] * cost["processes"] / 3600, cost["seconds"], str(cost["processes"]), cost["device"]


def _tokens(run: Run, name: str) -> int:
    trained = run.artifacts[name].stage == "search" or run.history(name) is not None
    return (run.tokens(name) or 0) if trained else 0

"""What the run cost: of each stage its time times its processes, and the tokens it trained on.

    hours    wall time of the process that ended the stage x processes (one a device)    device-hours
    tokens   of training steps; a search's are those of all its candidates

A stage that was stopped and went on tells of its last process only. A stage that several processes shared while one
worked counts them all, as they were held.
"""

from __future__ import annotations

from dataclasses import dataclass

from minitron_nemo.artifact import Artifact
from minitron_nemo.report.rows import seconds_of
from minitron_nemo.report.run import Run
from minitron_nemo.report.sheet import Sheet
from minitron_nemo.report.table import UNKNOWN, count


@dataclass(frozen=True)
class Bill:
    sheet: Sheet
    sentences: list[str]
    hours: float
    tokens: int


def bill_of(run: Run) -> Bill:
    entries = [(name, artifact, *_cost(artifact), _tokens(run, name)) for name, artifact in run.artifacts.items()]
    entries = sorted(entries, key=lambda entry: -entry[2])
    rows = [
        [name, artifact.stage, f"{seconds:,.1f}", processes, device, f"{hours:.4f}", count(tokens) if tokens else "0"]
        for name, artifact, hours, seconds, processes, device, tokens in entries
    ]
    hours, tokens = sum(entry[2] for entry in entries), sum(entry[-1] for entry in entries)
    seconds = sum(entry[3] for entry in entries)
    devices = list(dict.fromkeys(entry[5] for entry in entries if entry[5] != UNKNOWN)) or ["device"]
    kind = "CPU-hours" if devices == ["cpu"] else "GPU-hours" if "cpu" not in devices else "device-hours"
    rows.append(["sum", "", f"{seconds:,.1f}", "", "", f"{hours:.4f}", count(tokens)])
    sheet = Sheet(
        "bill", "What it cost", ["step", "stage", "seconds", "processes", "on", kind, "training tokens"], rows,
        ["Hours are seconds times processes, the dearest step first. A step that was stopped and went on tells of its "
         "last process only."],
    )  # fmt: skip
    where = "" if devices in (["cpu"], ["device"]) else f" ({', '.join(devices)})"
    said = f"{hours:.2g} {kind}{where} over {len(entries)} steps, and {count(tokens)} tokens of training in all."
    return Bill(sheet, [said], hours, tokens)


def _cost(artifact: Artifact) -> tuple[float, float, str, str]:
    """Hours, seconds, processes and device; of an artifact whose manifest does not know, as of one process."""
    cost = artifact.manifest.get("cost")
    if cost is None:
        seconds = seconds_of(artifact) or 0.0
        return seconds / 3600, seconds, UNKNOWN, UNKNOWN
    return cost["seconds"] * cost["processes"] / 3600, cost["seconds"], str(cost["processes"]), cost["device"]


def _tokens(run: Run, name: str) -> int:
    artifact = run.artifacts[name]
    if artifact.stage == "search":
        return int(artifact.metrics.get("tokens_spent") or 0)
    return (run.tokens(name) or 0) if run.history(name) is not None else 0

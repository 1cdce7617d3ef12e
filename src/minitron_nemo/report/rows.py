"""The run in numbers: one row per model, and whether the models stand in the expected order.

    row["held_out_loss"]     nats per token on held-out text, None where not evaluated or not finite
    row["gap_to_teacher"]    row's held-out loss less the reference teacher's, nats per token
    row["tokens"]            tokens the stage itself trained on; 0 for surgery, None where unknown
    row["seconds"]           wall time of the training steps where the stage trains, else of the stage's writing

Everything is plain dicts of JSON values, so that summary.json, the terminal's table, the page and the tests share it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minitron_nemo.artifact import Artifact
from minitron_nemo.config.stages import ReportRow
from minitron_nemo.report.order import order_of
from minitron_nemo.report.run import Model, Run, read_run

NOTHING_TRAINED = "Nothing was trained in this run; pruned models are only the start of good ones."


def summary(run_dir: Path | str, rows: Sequence[ReportRow] = (), expected_order: Sequence[str] = ()) -> dict[str, Any]:
    """Rows, order and what is missing of the run in `run_dir`, as JSON values.

    Args:
        rows, expected_order: as in ReportConfig.
    Raises: NothingThere: no such directory, or no finished artifact in it.
    """
    return summarize(read_run(run_dir, rows, expected_order))


def summarize(run: Run) -> dict[str, Any]:
    """As `summary`, of a run that is already read."""
    notes = list(run.notes)
    rows = {model.name: _row(run, model, notes) for model in run.models if model.name in run.artifacts}
    teachers = [model.name for model in run.models if model.is_teacher and model.name in rows]
    reference = next((name for name in reversed(teachers) if rows[name]["held_out_loss"] is not None), None)
    teacher_loss = rows[reference]["held_out_loss"] if reference is not None else None
    for row in rows.values():
        known = teacher_loss is not None and row["held_out_loss"] is not None
        row["gap_to_teacher"] = row["held_out_loss"] - teacher_loss if known else None
    order = order_of({m.label: rows[m.name]["held_out_loss"] if m.name in rows else None for m in run.expected_order})
    if run.nothing_trained:
        order["statement"] = NOTHING_TRAINED
    return {
        "run_dir": str(run.path),
        "reference_teacher": reference,
        "rows": list(rows.values()),
        "order": order,
        "fairness": _fairness(run, rows),
        "max_relative_logit_difference": logit_difference(run, run.export) if run.export is not None else None,
        "other_evaluations": {
            model: _finite(artifact.metrics.get("held_out_loss")) for model, artifact in run.other_evaluations.items()
        },
        "missing": list(run.missing),
        "notes": notes,
    }


def seconds_of(artifact: Artifact) -> float | None:
    """Wall time of the training steps, where the stage trained and wrote it down; else of the stage; of an artifact
    that does not know that, of writing it."""
    manifest = artifact.manifest
    whole = manifest.get("cost", {}).get("seconds", manifest.get("seconds"))
    return _finite(artifact.metrics.get("training_seconds", whole))


def logit_difference(run: Run, export: str) -> float | None:
    """How far an export's logits are from Megatron's at most; None where it was not measured."""
    return _finite(run.artifacts[export].metrics.get("max_relative_logit_difference"))


def _row(run: Run, model: Model, notes: list[str]) -> dict[str, Any]:
    name = model.name
    artifact, shape = run.artifacts[name], run.shape(name)
    metrics = run.evaluations[name].metrics if name in run.evaluations else {}
    loss = metrics.get("held_out_loss")
    if loss is not None and _finite(loss) is None:
        notes.append(f"The held-out loss of {name} is {loss}, not a finite number: its training diverged.")
    history = run.history(name)
    if history and any(not math.isfinite(value) for value in history.training.values):
        notes.append(f"The training loss of {name} is not finite at some steps; the curve has holes there.")
    loss = _finite(loss)
    perplexity = _finite(metrics.get("perplexity"))
    if perplexity is None and loss is not None:
        perplexity = _finite(math.exp(min(loss, 700.0)))
    return {
        "name": name,
        "label": model.label,
        "parameters": shape.num_parameters if shape else artifact.metrics.get("parameters"),
        "held_out_loss": loss,
        "perplexity": perplexity,
        "held_out_tokens": metrics.get("tokens"),
        "tokens": run.tokens(name),
        "seconds": seconds_of(artifact),
    }


def _fairness(run: Run, rows: dict[str, dict[str, Any]]) -> list[str]:
    """Sentences on what makes the students' comparison unequal; empty where it is fair."""
    unequal = []
    for key, unit, names in (
        ("tokens", "training tokens", [name for name in run.students if rows[name]["tokens"]]),
        ("parameters", "parameters", run.students),
        ("held_out_tokens", "held-out tokens", list(rows)),
    ):
        found = {rows[name]["label"]: rows[name][key] for name in names if rows[name][key] is not None}
        if len(set(found.values())) > 1:
            listed = ", ".join(f"{label} {value:,}" for label, value in found.items())
            unequal.append(f"The models are not compared at equal {unit}: {listed}.")
    return unequal


def _finite(value: Any) -> float | None:
    return float(value) if value is not None and math.isfinite(float(value)) else None

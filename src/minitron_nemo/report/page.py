"""One HTML file from a run: what was gained and lost, numbers, curves, importance pictures, shapes, samples, cost,
provenance; and the same in Markdown.

The file asks nothing of the network: style and pictures are inside it, and there is no script. `page.html` is the
template, with every value escaped but the pictures, which `figures` draws.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from minitron_nemo.artifact import Artifact
from minitron_nemo.report import pictures
from minitron_nemo.report.bill import bill_of
from minitron_nemo.report.headline import best_student, headline, reference_teacher
from minitron_nemo.report.markdown import markdown
from minitron_nemo.report.rows import logit_difference, seconds_of, summarize
from minitron_nemo.report.run import EXPORT, Run
from minitron_nemo.report.samples import samples_of
from minitron_nemo.report.scores import Pruning, counts, importances
from minitron_nemo.report.sheets import sheets
from minitron_nemo.report.table import cells, count, headers
from minitron_nemo.runtimes import suits
from minitron_nemo.shape import ModelShape


def content_of(run: Run, values: dict[str, Any]) -> dict[str, Any]:
    """What the page is filled with, by the template's names.

    Args:
        run: the run that was read.
        values: its summary, `rows.summarize(run)`.
    """
    pruning = Pruning.read(run)
    teacher_loss = next((r["held_out_loss"] for r in values["rows"] if r["name"] == values["reference_teacher"]), None)
    versions, common = _versions(run)
    bill = bill_of(run)
    side_by_side = [row["name"] for row in (reference_teacher(run, values), best_student(run, values)) if row]
    return {
        "name": run.path.name,
        "summary": values,
        "headline": headline(run, values, bill),
        "sheets": sheets(run, values),
        "bill": bill.sheet,
        "samples": samples_of(run, side_by_side),
        "headers": headers(values),
        "rows": [cells(row) for row in values["rows"]],
        "verdict": {True: "holds", False: "fails", None: "unknown"}[values["order"]["holds"]],
        "correction_tokens": _correction_tokens(run),
        "exports": _exports(run),
        "curves": pictures.curves(run, teacher_loss),
        "no_curves": "No training history in this run directory, so no curves.",
        "origin": pruning.origin,
        "plan": run.pruned,
        "other_plans": [name for name in run.lineage.made_by("prune") if name != run.pruned],
        "counts": counts(pruning.kept, pruning.sizes),
        "pictures": pictures.scores(pruning),
        "agreements": pictures.agreements(importances(run), run.importance, pruning),
        "shapes": _shapes(run, pruning),
        "suits": _suits(run, pruning),
        "versions": versions,
        "provenance": [_provenance(name, artifact, common) for name, artifact in sorted(run.artifacts.items())],
    }


def render(content: dict[str, Any]) -> str:
    """The page as text, of `content_of`."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    package = files("minitron_nemo.report")
    template = environment.from_string(package.joinpath("page.html").read_text(encoding="utf-8"))
    return template.render(style=Markup(package.joinpath("page.css").read_text(encoding="utf-8")), **content)


def write_report(run: Run, into: Path) -> dict[str, Any]:
    """Write report.html, report.md and summary.json into a directory; returns the summary."""
    values = summarize(run)
    content = content_of(run, values)
    (into / "report.html").write_text(render(content), encoding="utf-8")
    (into / "report.md").write_text(markdown(run, content), encoding="utf-8")
    (into / "summary.json").write_text(json.dumps(values, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    return values


def _correction_tokens(run: Run) -> str | None:
    """What the corrected teachers of the table were trained on, as a count for reading."""
    corrected = [
        run.tokens(model.name) or 0
        for model in run.models
        if model.is_teacher and model.name in run.lineage.made_by("correct-teacher")
    ]
    return count(sum(corrected)) if sum(corrected) else None


def _exports(run: Run) -> list[dict[str, Any]]:
    """Those whose logits were compared, the one that the summary speaks of first."""
    names = sorted(run.lineage.made_by(EXPORT), key=lambda name: name != run.export)
    found = [(run.artifacts[name].path, logit_difference(run, name)) for name in names]
    return [{"path": str(path), "difference": difference} for path, difference in found if difference is not None]


def _student_shape(run: Run, pruning: Pruning) -> ModelShape | None:
    return pruning.target or _first_shape(run, [*([run.pruned] if run.pruned else []), *run.students])


def _suits(run: Run, pruning: Pruning) -> dict[str, str]:
    """Runtime -> how well the student's dims fit it."""
    shape = _student_shape(run, pruning)
    return {} if shape is None else suits(shape)


def _shapes(run: Run, pruning: Pruning) -> list[dict[str, Any]]:
    teachers = [model.name for model in run.models if model.is_teacher]
    before = pruning.source or _first_shape(run, [*reversed(teachers)])
    after = _student_shape(run, pruning)
    if before is None or after is None:
        return []
    measures = {name: (getattr(before, name), getattr(after, name)) for name in (*before.prunable_dims, "kv_channels")}
    measures |= {
        "padded_vocab_size": (before.padded_vocab_size, after.padded_vocab_size),
        "parameters": (before.num_parameters, after.num_parameters),
        "parameters without embeddings": (before.num_non_embedding_parameters, after.num_non_embedding_parameters),
        "FLOPs per token, forward": (_flops(before), _flops(after)),
        "KV cache, bytes per token (bf16)": (before.kv_bytes_per_token(), after.kv_bytes_per_token()),
    }
    return [{"name": name, "before": old, "after": new, "changed": old != new} for name, (old, new) in measures.items()]


def _first_shape(run: Run, names: Sequence[str]) -> ModelShape | None:
    return next((shape for name in names if (shape := run.shape(name)) is not None), None)


def _flops(shape: ModelShape) -> int:
    return shape.flops_per_token(shape.seq_length)


def _versions(run: Run) -> tuple[str, dict[str, str]]:
    """A sentence on the versions, and those that every artifact shares."""
    found = [artifact.manifest.get("versions", {}) for artifact in run.artifacts.values()]
    common = {name: version for name, version in found[0].items() if all(other.get(name) == version for other in found)}
    if any(other != common for other in found):
        return "Not every stage ran with the same versions; those that differ stand with their stage.", common
    return f"Every stage ran with {_listed(common)}.", common


def _listed(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))


def _provenance(name: str, artifact: Artifact, common: dict[str, str]) -> dict[str, Any]:
    manifest = artifact.manifest
    own = {key: version for key, version in manifest.get("versions", {}).items() if common.get(key) != version}
    return {
        "name": name,
        "stage": artifact.stage,
        "seconds": f"{seconds_of(artifact) or 0:,.1f}",
        "digest": artifact.digest,
        "inputs": manifest.get("inputs", []),
        "versions": _listed(own),
        "metrics": json.dumps(artifact.metrics, indent=2, sort_keys=True, default=str),
        "config": json.dumps(manifest.get("config", {}), indent=2, sort_keys=True, default=str),
    }

"""The run in numbers: one row per model, and whether the models stand in the expected order.

    row["held_out_loss"]     nats per token on held-out text, None where not evaluated or not finite
    row["gap_to_teacher"]    row's held-out loss less the reference teacher's, nats per token
    row["tokens"]            tokens the stage itself trained on; 0 for surgery, None where unknown
    row["seconds"]           wall time of the training steps where the stage trains, else of the stage's writing

Everything is plain dicts of JSON values, so that summary.json, the terminal's table, the page and the tests share it.
"""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from minitron_nemo.artifact import Artifact
from minitron_nemo.report.run import VARIANTS, Run, Variant, read_run

EXPECTED_ORDER = ("distilled", "pruned_ce", "from_scratch", "student_pruned")
"""From the lowest held-out loss to the highest, at equal tokens and shape (Minitron, arXiv:2407.14679, ablations)."""
CLOSE = 0.01
"""Nats per token. One seed and one held-out set cannot tell models apart that differ by less."""
UNKNOWN = "\u2013"
_LABEL = {variant.name: variant.label for variant in VARIANTS}
_TRAINED = ("distilled_calibrated", "distilled", "pruned_ce", "from_scratch")


def summary(run_dir: Path | str) -> dict[str, Any]:
    """Rows, order and what is missing of the run in `run_dir`, as JSON values.

    Raises: FileNotFoundError: no such directory, or no finished artifact in it.
    """
    return summarize(read_run(run_dir))


def summarize(run: Run) -> dict[str, Any]:
    """As `summary`, of a run that is already read."""
    notes = list(run.notes)
    rows = [_row(run, variant, notes) for variant in VARIANTS if variant.name in run.artifacts]
    losses = {row["name"]: row["held_out_loss"] for row in rows}
    reference = next((name for name in ("corrected_teacher", "teacher") if losses.get(name) is not None), None)
    for row in rows:
        known = reference is not None and row["held_out_loss"] is not None
        row["gap_to_teacher"] = row["held_out_loss"] - losses[reference] if known else None
    export = run.artifacts.get("export")
    order = order_of(losses)
    if run.only_prunes:
        order["statement"] = "Nothing was trained in this run; pruned models are only the start of good ones."
    return {
        "run_dir": str(run.path),
        "reference_teacher": reference,
        "rows": rows,
        "order": order,
        "fairness": _fairness(rows),
        "max_logit_difference": _finite(export.metrics.get("max_logit_difference")) if export else None,
        "other_evaluations": {
            model: _finite(artifact.metrics.get("held_out_loss")) for model, artifact in run.other_evaluations.items()
        },
        "missing": list(run.missing),
        "notes": notes,
    }


def order_of(losses: dict[str, float | None]) -> dict[str, Any]:
    """Whether held-out losses stand as expected, said in a sentence.

    Args:
        losses: nats per token by variant name; None where not known. Only students are compared.
    Returns:
        `holds`: True, False, or None where fewer than two are known; `complete`: all four are known;
        `statement`: the verdict in words, with each distance.
    """
    known = [name for name in EXPECTED_ORDER if losses.get(name) is not None]
    unknown = [_LABEL[name] for name in EXPECTED_ORDER if name not in known]
    expected = " < ".join(_LABEL[name] for name in EXPECTED_ORDER)
    without = f" Not compared, as no held-out loss is known: {', '.join(unknown)}." if unknown else ""
    if len(known) < 2:
        statement = f"The expected order ({expected}) cannot be checked.{without}"
        return {"holds": None, "complete": False, "statement": statement}
    value = {name: float(losses[name] or 0.0) for name in known}
    pairs = list(itertools.pairwise(known))
    wrong = [(better, worse) for better, worse in pairs if not value[better] < value[worse]]
    close = [(better, worse) for better, worse in pairs if 0 <= abs(value[worse] - value[better]) < CLOSE]
    if wrong:
        faults = "; ".join(
            f"{_LABEL[better]} ({value[better]:.3f}) was expected below {_LABEL[worse]} ({value[worse]:.3f}) and is "
            + (f"{value[better] - value[worse]:.3f} above it" if value[better] > value[worse] else "equal to it")
            for better, worse in wrong
        )
        statement = f"The expected order ({expected}) does not hold: {faults}."
    else:
        which = "The expected order" if not unknown else "As far as it can be checked, the expected order"
        steps = ", ".join(f"{value[worse] - value[better]:.3f}" for better, worse in pairs)
        found = " < ".join(f"{_LABEL[name]} {value[name]:.3f}" for name in known)
        statement = f"{which} holds: {found} (distances {steps} nats per token)."
    for better, worse in close:
        statement += f" {_LABEL[better]} and {_LABEL[worse]} are within {CLOSE}: too close to call from one run."
    return {"holds": not wrong, "complete": not unknown, "statement": statement + without}


def summary_table(run_dir: Path | str) -> Table:
    """The headline table for the terminal; the order's verdict and the missing artifacts stand beneath it."""
    return table_of(summary(run_dir))


def table_of(values: dict[str, Any]) -> Table:
    """As `summary_table`, of a summary that is already made."""
    caption = [values["order"]["statement"], *(f"Note: {note}" for note in (*values["fairness"], *values["notes"]))]
    caption += [f"Missing: {missing}" for missing in values["missing"]]
    table = Table(
        title=f"Held-out loss and gap to the {_teacher(values)} in nats per token",
        title_justify="left",
        caption_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,  # fits 80 columns
    )
    # Text, not str: a path may hold square brackets, which rich would read as markup
    table.caption = Text("\n".join(caption))
    for index, header in enumerate(("model", "parameters", "loss", "perplexity", "gap", "tokens", "seconds")):
        table.add_column(header, justify="left" if index == 0 else "right", no_wrap=index == 0)
    for row in values["rows"]:
        table.add_row(*(Text(cell) for cell in cells(row)))
    return table


def headers(values: dict[str, Any]) -> list[str]:
    return [
        "model",
        "parameters",
        "held-out loss (nats/token)",
        "perplexity",
        f"gap to {_teacher(values)}",
        "training tokens",
        "seconds",
    ]


def _teacher(values: dict[str, Any]) -> str:
    return _LABEL.get(values["reference_teacher"], "teacher")


def cells(row: dict[str, Any]) -> list[str]:
    """One row as the text of its cells, in the order of `headers`; a dash where nothing is known."""
    return [
        row["label"],
        count(row["parameters"]),
        _fixed(row["held_out_loss"], "{:.3f}"),
        _fixed(row["perplexity"], "{:.2f}" if (row["perplexity"] or 0) < 1000 else "{:.3g}"),
        _fixed(row["gap_to_teacher"], "{:+.3f}"),
        count(row["tokens"]),
        _fixed(row["seconds"], "{:,.0f}" if (row["seconds"] or 0) >= 10 else "{:.1f}"),
    ]


def count(value: int | None) -> str:
    """A count for reading: 950, 12.3k, 6.53M, 8.03B; exact below 1000."""
    if value is None:
        return UNKNOWN
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        # 999_999 would print as 1e+03k: move up where rounding to three digits reaches the next letter
        if value >= size * 0.9995:
            scaled = value / size
            return f"{scaled:.{max(0, 2 - int(math.log10(max(scaled, 1))))}f}{letter}"
    return str(value)


def seconds_of(artifact: Artifact) -> float | None:
    """Wall time of the training steps, where the stage trained and wrote it down; else of writing the artifact."""
    return _finite(artifact.metrics.get("training_seconds", artifact.manifest.get("seconds")))


def _row(run: Run, variant: Variant, notes: list[str]) -> dict[str, Any]:
    artifact, shape = run.artifacts[variant.name], run.shape(variant.name)
    evaluation = run.evaluations.get(variant.name)
    metrics = evaluation.metrics if evaluation else {}
    loss = metrics.get("held_out_loss")
    if loss is not None and _finite(loss) is None:
        notes.append(f"The held-out loss of {variant.name} is {loss}, not a finite number: its training diverged.")
    history = run.history(variant.name)
    if history and any(not math.isfinite(value) for value in history.training.values):
        notes.append(f"The training loss of {variant.name} is not finite at some steps; the curve has holes there.")
    loss = _finite(loss)
    perplexity = _finite(metrics.get("perplexity"))
    if perplexity is None and loss is not None:
        perplexity = _finite(math.exp(min(loss, 700.0)))
    return {
        "name": variant.name,
        "label": variant.label,
        "parameters": shape.num_parameters if shape else artifact.metrics.get("parameters"),
        "held_out_loss": loss,
        "perplexity": perplexity,
        "held_out_tokens": metrics.get("tokens"),
        "tokens": _tokens(run, variant),
        "seconds": seconds_of(artifact),
    }


def _tokens(run: Run, variant: Variant) -> int | None:
    """Tokens the variant's own stage trained on; an imported teacher's are not known to the run."""
    if variant.stage == "prune":
        return 0
    tokens = run.artifacts[variant.name].metrics.get("tokens")
    history = run.history(variant.name)
    if tokens is None and history and history.training.tokens:
        tokens = history.training.tokens[-1]
    return int(tokens) if tokens is not None else None


def _fairness(rows: list[dict[str, Any]]) -> list[str]:
    """Sentences on what makes the students' comparison unequal; empty where it is fair."""
    unequal = []
    for key, unit, names in (
        ("tokens", "training tokens", _TRAINED),
        ("parameters", "parameters", (*EXPECTED_ORDER, "distilled_calibrated", "student_calibrated")),
        ("held_out_tokens", "held-out tokens", tuple(_LABEL)),
    ):
        found = {row["label"]: row[key] for row in rows if row["name"] in names and row[key] is not None}
        if len(set(found.values())) > 1:
            listed = ", ".join(f"{label} {value:,}" for label, value in found.items())
            unequal.append(f"The models are not compared at equal {unit}: {listed}.")
    return unequal


def _finite(value: Any) -> float | None:
    return float(value) if value is not None and math.isfinite(float(value)) else None


def _fixed(value: float | None, form: str) -> str:
    return UNKNOWN if value is None else form.format(value)

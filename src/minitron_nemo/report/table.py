"""The rows as text: the cells that page and terminal share, and the terminal's table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from minitron_nemo.config.stages import ReportRow
from minitron_nemo.report.rows import summary

UNKNOWN = "\u2013"


def summary_table(run_dir: Path | str, rows: Sequence[ReportRow] = (), expected_order: Sequence[str] = ()) -> Table:
    """The headline table for the terminal; the order's verdict and the missing artifacts stand beneath it.

    Args:
        rows, expected_order: as in ReportConfig.
    Raises: NothingThere: no such directory, or no finished artifact in it.
    """
    return table_of(summary(run_dir, rows, expected_order))


def table_of(values: dict[str, Any]) -> Table:
    """As `summary_table`, of a summary that is already made."""
    caption = [values["order"]["statement"]] if values["order"]["statement"] else []
    caption += [f"Note: {note}" for note in (*values["fairness"], *values["notes"])]
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
    """What the reference teacher is called."""
    return next((row["label"] for row in values["rows"] if row["name"] == values["reference_teacher"]), "teacher")


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


def size(value: float, units: Sequence[str] = ("B", "kB", "MB", "GB", "TB")) -> str:
    """Bytes for reading, to three digits: 950 B, 12.3 MB."""
    unit = 0
    while value >= 999.5 and unit < len(units) - 1:
        value, unit = value / 1000, unit + 1
    return f"{value:.3g} {units[unit]}"


def _fixed(value: float | None, form: str) -> str:
    return UNKNOWN if value is None else form.format(value)

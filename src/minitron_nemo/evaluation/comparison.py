"""A model's scores beside its teacher's, as a table for the terminal and as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

_SAME = ("metric", "num_fewshot", "samples", "higher_is_better")
_NONE = "\u2013"


@dataclass(frozen=True)
class Comparison:
    headers: list[str]
    rows: list[list[str]]
    verdict: list[str]
    """Sentences below the table."""
    title: str = "Tasks"

    def table(self) -> Table:
        table = Table(title=self.title, title_justify="left", caption_justify="left", box=SIMPLE_HEAD, pad_edge=False)
        table.caption = Text("\n".join(self.verdict))
        for number, header in enumerate(self.headers):
            table.add_column(header, justify="left" if number < 2 else "right")
        for row in self.rows:
            table.add_row(*(Text(cell) for cell in row))
        return table

    def markdown(self) -> str:
        lines = [self.headers, ["---" if number < 2 else "---:" for number in range(len(self.headers))], *self.rows]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n\n" + "\n\n".join(self.verdict) + "\n"


def compare(
    scores: Mapping[str, dict[str, Any]],
    parameters: int,
    teacher: Mapping[str, dict[str, Any]] | None = None,
    teacher_parameters: int | None = None,
    notes: Sequence[str] = (),
) -> Comparison:
    """
    Args:
        scores, teacher: task -> headline, as in an evaluation's metrics.
        notes: what a person who quotes the scores must know.
    """
    rows, shares, unlike = [], [], []
    for task, score in scores.items():
        other = (teacher or {}).get(task)
        share = None
        if other is not None and all(score[key] == other[key] for key in _SAME):
            share = _share(score, other)
        elif other is not None:
            unlike.append(task)
        if share is not None:
            shares.append(share)
        shots = _NONE if score["num_fewshot"] is None else str(score["num_fewshot"])
        row = [task, score["metric"], shots, _number(score)]
        if teacher is not None:
            row += [_number(other) if other else _NONE, _NONE if share is None else f"{share:.0%}"]
        rows.append(row)
    headers = ["task", "metric", "examples", "score", *(["teacher", "kept"] if teacher is not None else [])]
    verdict = []
    if shares and teacher_parameters:
        kept, size = sum(shares) / len(shares), parameters / teacher_parameters
        verdict.append(
            f"Keeps {kept:.0%} of the teacher at {size:.0%} of its parameters (mean over "
            f"{len(shares)} task{'' if len(shares) == 1 else 's'}; chance is not taken off)."
        )
    if unlike:
        verdict.append(f"Asked otherwise of the teacher, and not compared: {', '.join(unlike)}.")
    verdict += notes
    return Comparison(headers, rows, verdict)


def _share(score: dict[str, Any], other: dict[str, Any]) -> float | None:
    above, below = (score, other) if score["higher_is_better"] else (other, score)
    return None if below["value"] == 0 else float(above["value"] / below["value"])


def _number(score: dict[str, Any]) -> str:
    stderr = score["stderr"]
    return f"{score['value']:.4f}" + (f" \u00b1 {stderr:.4f}" if stderr else "")

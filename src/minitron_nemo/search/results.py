"""What a search came to: its table for people, the same as data, and the recipe of the winner."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from rich import box
from rich.table import Table

_COLUMNS = (
    "rank",
    "candidate",
    "parameters",
    "memory",
    "first token",
    "next token",
    "after the cut",
    "KL",
    "distilled",
    "tokens",
)


def table_of(candidates: Sequence[Mapping[str, Any]]) -> Table:
    """One row a candidate, in their order; a star where none is both smaller and better after the cut."""
    table = Table(*_COLUMNS, box=box.SIMPLE)
    for row in _rows(candidates):
        table.add_row(*row)
    return table


def markdown_of(candidates: Sequence[Mapping[str, Any]]) -> str:
    lines = [_COLUMNS, ["---"] * len(_COLUMNS), *_rows(candidates)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _rows(candidates: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    return [
        [
            str(each["rank"]),
            each["id"] + (" *" if each["on_front"] else ""),
            f"{each['parameters']:,}",
            f"{each['memory_bytes'] / 2**20:,.0f} MiB",
            _milliseconds(each["time_to_first_token"]),
            _milliseconds(each["time_per_output_token"]),
            _loss(each["loss_cut"]),
            _loss(each["kl_cut"]),
            _loss(each["curve"][-1][1]) if each["curve"] else "-",
            f"{each['tokens']:,}" if each["tokens"] else "-",
        ]
        for each in candidates
    ]


def _milliseconds(value: float | None) -> str:
    return "-" if value is None else f"{1e3 * value:.3g} ms"


def _loss(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def winners_recipe(name: str, values: Mapping[str, Any]) -> str:
    """A recipe's file: the winner cut out of the teacher again, and distilled in full.

    Args:
        values: its sections.
    """
    steps = ["prune", "distill", {"stage": "evaluate", "name": "evaluate_teacher", "from": "evaluate"}, "evaluate"]
    recipe = {"name": name, **values, "compress": {"steps": [*steps, "export_hf", "report"]}}
    begins = (
        "# @package _global_\n# What a search found best, to be distilled in full: give distill.training more steps.\n"
    )
    return begins + yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)

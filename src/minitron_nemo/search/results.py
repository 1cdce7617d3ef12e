"""What a search came to: its candidates as data and as a table for people, and the recipe of the winner."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml
from rich import box
from rich.table import Table

from minitron_nemo.config.search import TIMED, ConstraintsConfig
from minitron_nemo.pruning.targets import memory_bytes
from minitron_nemo.shape import ModelShape

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


@dataclass
class Candidate:
    """One shape, and what is known of it so far."""

    name: str
    dims: dict[str, int]
    shape: ModelShape
    price: float
    loss_cut: float | None = None
    kl_cut: float | None = None
    times: dict[str, float] = field(default_factory=dict)
    """See search/latency.py; empty: it was not timed."""
    curve: list[tuple[int, float]] = field(default_factory=list)
    """(steps, held-out loss) at each rung it came to."""
    on_front: bool = False

    @property
    def order(self) -> tuple[float, ...]:
        """What ranks it: how far it came, then its loss there; before any training after the cut, and by its price."""
        steps, loss = self.curve[-1] if self.curve else (0, math.inf)
        cut = math.inf if self.loss_cut is None else self.loss_cut
        return (-steps, math.inf if math.isnan(loss) else loss, cut, self.price)


def rows_of(candidates: Sequence[Candidate], tokens_per_step: int, limits: ConstraintsConfig) -> list[dict[str, Any]]:
    """`candidates` of search.json, see docs/search.md.

    Args:
        candidates: best first.
        limits: say for which batch, context and type memory is counted.
    """
    counted = {name: getattr(limits, name) for name in ("batch_size", "seq_length", "bytes_per_value")}
    return [
        {
            "id": each.name,
            "dims": each.dims,
            "parameters": each.shape.num_parameters,
            "non_embedding_parameters": each.shape.num_non_embedding_parameters,
            "memory_bytes": memory_bytes(each.shape, **counted),
            **{name: each.times.get(name) for name in TIMED},
            "price": each.price,
            "loss_cut": each.loss_cut,
            "kl_cut": each.kl_cut,
            "curve": [[steps * tokens_per_step, loss] for steps, loss in each.curve],
            "tokens": each.curve[-1][0] * tokens_per_step if each.curve else 0,
            "rung": len(each.curve),
            "rank": rank,
            "on_front": each.on_front,
        }
        for rank, each in enumerate(candidates, start=1)
    ]


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

"""What was reckoned, as tables for a terminal and as plain data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from minitron_nemo.config.plan import PlanConfig
from minitron_nemo.shape import ModelShape
from minitron_nemo.sizing.cost import Cost
from minitron_nemo.sizing.jobs import Job
from minitron_nemo.sizing.machine import GIB, Machine
from minitron_nemo.sizing.memory import PIECES, Memory
from minitron_nemo.sizing.mends import Mend

UNKNOWN = "\u2013"


@dataclass(frozen=True)
class Reckoned:
    """A step that runs a model, and what it takes."""

    name: str
    stage: str
    job: Job
    machine: Machine
    """With the step's own ranks."""
    memory: Memory
    recomputed: Memory | None
    """With all layers formed again in the backward pass; None: it does not train."""
    cost: Cost | None
    """None: it is not known how many tokens there are."""
    fits: bool
    mends: list[Mend]
    """Where it does not fit, the cheapest first."""


def pages(reckoned: Sequence[Reckoned], plan: PlanConfig, machine: Machine) -> Iterator[Text | Table]:
    """In the order in which they are shown."""
    layouts = dict.fromkeys(_layout(each.job) for each in reckoned)
    yield Text(
        f"{machine.ranks} ranks of {plan.accelerator} ({machine.ranks // machine.ranks_per_node} nodes x "
        f"{machine.ranks_per_node}), {machine.memory_bytes / GIB:.1f} GiB and {machine.peak_flops / 1e12:,.0f} TFLOP/s "
        f"each, {machine.utilisation:.0%} of them reached; {', '.join(layouts)}"
    )
    yield _models(reckoned)
    yield _memory(reckoned, machine)
    yield _cost(reckoned)
    for each in reckoned:
        if not each.fits:
            yield Text(f"{each.name} does not fit: {_gib(each.memory.total)} of {_gib(machine.room_bytes)} GiB.")
            yield _mends(each)
    for note, names in _notes(reckoned).items():
        yield Text(f"{', '.join(names)}: {note}.")


def _table(title: str, words: Sequence[str], numbers: Sequence[str]) -> Table:
    table = Table(
        title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True, show_edge=False
    )
    for name in words:
        table.add_column(name, no_wrap=True)
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _models(reckoned: Sequence[Reckoned]) -> Table:
    numbers = ("layers", "hidden", "ffn", "heads", "groups", "experts", "parameters", "without tables", "active")
    table = _table("Models", ["first in"], numbers)
    for name, shape in distinct(reckoned):
        neurons = shape.moe_ffn_hidden_size if shape.num_moe_experts else shape.ffn_hidden_size
        dims = (shape.num_layers, shape.hidden_size, neurons, shape.num_attention_heads, shape.num_query_groups)
        counts = (shape.num_parameters, shape.num_non_embedding_parameters, shape.num_active_parameters)
        experts = UNKNOWN if shape.num_moe_experts is None else str(shape.num_moe_experts)
        table.add_row(name, *map(str, dims), experts, *(f"{count:,}" for count in counts))
    return table


def distinct(reckoned: Sequence[Reckoned]) -> list[tuple[str, ModelShape]]:
    """Every shape once, with the step it is first in."""
    found: list[tuple[str, ModelShape]] = []
    for each in reckoned:
        for model in each.job.models:
            if all(model.shape != shape for _, shape in found):
                found.append((each.name, model.shape))
    return found


def _memory(reckoned: Sequence[Reckoned], machine: Machine) -> Table:
    title = f"GiB on the fullest rank; {_gib(machine.room_bytes)} of {_gib(machine.memory_bytes)} are to be had"
    there = [piece for piece in PIECES if any(each.memory.pieces[piece] for each in reckoned)]
    table = _table(title, ["step"], [*there, "total", "recomputed"])
    for each in reckoned:
        again = UNKNOWN if each.recomputed is None else _gib(each.recomputed.total)
        pieces = (_gib(each.memory.pieces[piece]) if each.memory.pieces[piece] else UNKNOWN for piece in there)
        total = Text(_gib(each.memory.total), style="bold" if each.fits else "bold red")
        table.add_row(each.name, *pieces, total, again)
    table.caption = "recomputed: the total with trainer.recompute_granularity=full"
    table.caption_justify = "left"
    return table


def _cost(reckoned: Sequence[Reckoned]) -> Table:
    table = _table("Tokens, time and disk", ["step"], ["tokens", "FLOPs", "hours", "GPU-hours", "disk (GB)"])
    for each in reckoned:
        job, cost = each.job, each.cost
        tokens = UNKNOWN if job.tokens is None else _short(job.tokens)
        flops = UNKNOWN if job.flops is None else f"{job.flops:.2e}"
        time = [UNKNOWN] * 2 if cost is None else [f"{cost.hours:,.2f}", f"{cost.gpu_hours:,.1f}"]
        disk = ", ".join(f"{what} {size / 1e9:,.1f}" for what, size in job.disk.items()) or UNKNOWN
        table.add_row(each.name, tokens, flops, *time, disk)
    known = [each.cost for each in reckoned if each.cost is not None]
    hours, gpu_hours = sum(cost.hours for cost in known), sum(cost.gpu_hours for cost in known)
    table.add_row("in all", "", "", f"{hours:,.2f}", f"{gpu_hours:,.1f}", "", style="bold")
    return table


def _mends(each: Reckoned) -> Table:
    table = _table("What would help, the cheapest first", ["change"], ["GiB", "", "hours"])
    for mend in each.mends:
        hours = UNKNOWN if mend.hours is None else f"{mend.hours:,.2f}"
        table.add_row(Text(mend.words), _gib(mend.memory_bytes), "fits" if mend.fits else "not alone", hours)
    return table


def _notes(reckoned: Sequence[Reckoned]) -> dict[str, list[str]]:
    """Note -> the steps it is about."""
    found: dict[str, list[str]] = {}
    for each in reckoned:
        for note in each.job.notes:
            found.setdefault(note, []).append(each.name)
    return found


def _layout(job: Job) -> str:
    layout = job.layout
    sizes = {
        "TP": layout.tensor_model_parallel_size,
        "PP": layout.pipeline_model_parallel_size,
        "CP": layout.context_parallel_size,
        "EP": layout.expert_model_parallel_size,
    }
    words = [f"{name} {size}" for name, size in sizes.items() if size > 1]
    return " ".join([*words, *(["SP"] if layout.sequence_parallel else [])]) or "the whole model on every rank"


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}"


def _short(count: int) -> str:
    for unit, size in (("T", 10**12), ("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= size:
            return f"{count / size:.1f}{unit}"
    return str(count)


def as_json(reckoned: Sequence[Reckoned], plan: PlanConfig, machine: Machine) -> dict[str, Any]:
    """Bytes, FLOPs and hours, unrounded."""
    return {
        "plan": asdict(plan),
        "machine": asdict(machine),
        "models": [
            {
                "first_in": name,
                "shape": shape.to_dict(),
                "parameters": shape.num_parameters,
                "non_embedding_parameters": shape.num_non_embedding_parameters,
                "active_parameters": shape.num_active_parameters,
            }
            for name, shape in distinct(reckoned)
        ],
        "steps": [
            {
                "step": each.name,
                "stage": each.stage,
                "ranks": each.machine.ranks,
                "ranks_per_node": each.machine.ranks_per_node,
                "layout": asdict(each.job.layout),
                "memory_bytes": each.memory.pieces,
                "fullest_pipeline_stage": each.memory.stage,
                "memory_bytes_in_all": each.memory.total,
                "memory_bytes_recomputed": None if each.recomputed is None else each.recomputed.total,
                "fits": each.fits,
                "tokens": each.job.tokens,
                "flops": each.job.flops,
                "hours": None if each.cost is None else each.cost.hours,
                "gpu_hours": None if each.cost is None else each.cost.gpu_hours,
                "disk_bytes": each.job.disk,
                "notes": each.job.notes,
                "mends": [asdict(mend) for mend in each.mends],
            }
            for each in reckoned
        ],
    }

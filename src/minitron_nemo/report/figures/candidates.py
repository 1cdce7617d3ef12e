"""A search in two pictures: how much each size loses, and how the ranks of candidates move while they learn."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from minitron_nemo.report.figures.svg import INK, PAPER, SERIES, as_svg, styled
from minitron_nemo.report.table import count

_WIDTH = 4.9  # inches: a phone shows it whole


@dataclass(frozen=True)
class Tried:
    """One candidate of a search."""

    name: str
    parameters: int
    loss_cut: float
    """After the cut alone, nats per token."""
    curve: list[tuple[int, float]] = field(default_factory=list)
    """(tokens, held-out loss) at each rung it came to."""
    on_front: bool = False


def front_of_sizes(key: str, candidates: Sequence[Tried], winner: str, teacher_loss: float) -> str:
    """Parameters against loss: after the cut, with the Pareto front; beneath it, after distillation.

    Args:
        key: begins the ids.
        candidates: best first.
    """
    front = sorted((each for each in candidates if each.on_front), key=lambda each: each.parameters)
    trained = [each for each in candidates if each.curve]
    last = max(each.curve[-1][0] for each in trained)
    with styled():
        figure = Figure(figsize=(_WIDTH, 5.2), layout="constrained")
        cut, below = figure.subplots(2, 1, sharex=True)
        cut.plot(
            [each.parameters for each in front], [each.loss_cut for each in front], color=SERIES[1], linewidth=1.2,
            drawstyle="steps-post", zorder=1,
        )  # fmt: skip
        for each in candidates:
            _mark(cut, each, each.loss_cut, filled=each.on_front, wins=each.name == winner)
        for each in trained:
            _mark(below, each, each.curve[-1][1], filled=each.curve[-1][0] == last, wins=each.name == winner)
        below.axhline(teacher_loss, color=INK, linewidth=1, linestyle=(0, (4, 3)))
        below.annotate(
            "teacher", xy=(0, teacher_loss), xycoords=("axes fraction", "data"), xytext=(2, 2),
            textcoords="offset points", va="bottom", fontsize=9,
        )  # fmt: skip
        for axes, when in ((cut, "after the cut"), (below, "after distillation")):
            axes.set_ylabel(f"loss {when}")
            axes.grid(True)
            axes.margins(x=0.08, y=0.14)
        below.set_xlabel("parameters")
        below.xaxis.set_major_locator(MaxNLocator(4))
        below.xaxis.set_major_formatter(FuncFormatter(_parameters))
        best = next(each for each in trained if each.name == winner)
        _name(below, best)
        return as_svg(
            figure,
            f"{key}-pareto",
            f"Parameters against held-out loss. On the front: {', '.join(each.name for each in front)}. The winner "
            f"{winner} has {count(best.parameters)}, after the cut {best.loss_cut:.3f}, after distillation "
            f"{best.curve[-1][1]:.3f}; the teacher {teacher_loss:.3f}.",
        )


def ranks_over_tokens(key: str, candidates: Sequence[Tried], winner: str) -> str:
    """A line a distilled candidate: its rank after the cut, then at every rung among those that came to it.

    Args:
        key: begins the ids.
        candidates: best first.
    """
    trained = [each for each in candidates if each.curve]
    rungs = sorted({tokens for each in trained for tokens, _ in each.curve})
    columns = [_ranks({each.name: each.loss_cut for each in trained})]
    columns += [_ranks({each.name: dict(each.curve)[at] for each in trained if at in dict(each.curve)}) for at in rungs]
    with styled():
        figure = Figure(figsize=(_WIDTH, 1.3 + 0.3 * len(trained)), layout="constrained")
        axes = figure.subplots()
        for each, colour in zip(trained, itertools.cycle(SERIES), strict=False):
            places = [ranks[each.name] for ranks in columns if each.name in ranks]
            width = 3.0 if each.name == winner else 1.8
            axes.plot(range(len(places)), places, color=colour, linewidth=width, marker="o", markersize=5)
            axes.annotate(
                each.name, xy=(len(places) - 1, places[-1]), xytext=(7, 0), textcoords="offset points", va="center",
                fontsize=8, fontweight="bold" if each.name == winner else "normal", annotation_clip=False,
            )  # fmt: skip
        axes.set_ylim(len(trained) + 0.5, 0.5)
        axes.set_yticks(range(1, len(trained) + 1))
        axes.set_ylabel("rank")
        axes.set_xticks(range(len(columns)), ["cut", *map(count, rungs)])
        axes.set_xlabel("training tokens of a candidate")
        return as_svg(figure, f"{key}-ranks", f"Ranks: {_said_of_columns(['the cut', *map(count, rungs)], columns)}.")


def _mark(axes: Axes, candidate: Tried, loss: float, *, filled: bool, wins: bool) -> None:
    colour = SERIES[2] if wins else SERIES[1]
    axes.plot(
        [candidate.parameters], [loss], marker="*" if wins else "o", markersize=13 if wins else 6, linestyle="",
        color=colour, markerfacecolor=colour if filled else PAPER, markeredgewidth=1.3, zorder=3 if wins else 2,
    )  # fmt: skip


def _name(axes: Axes, candidate: Tried) -> None:
    """Above its mark, towards the middle."""
    left, right = axes.get_xlim()
    is_left = candidate.parameters < (left + right) / 2
    axes.annotate(
        candidate.name, xy=(candidate.parameters, candidate.curve[-1][1]), xytext=(-6 if is_left else 6, 8),
        textcoords="offset points", ha="left" if is_left else "right", fontsize=9,
    )  # fmt: skip


def _parameters(value: float, _: object) -> str:
    """Of a tick; with more digits than `count`, as candidates are of nearly one size."""
    units = ((1e9, "B"), (1e6, "M"), (1e3, "k"))
    return next((f"{value / size:.4g}{letter}" for size, letter in units if value >= size), f"{value:.0f}")


def _ranks(losses: dict[str, float]) -> dict[str, int]:
    """From 1; a loss that is not a number is the worst."""
    ordered = sorted(losses, key=lambda name: math.inf if math.isnan(losses[name]) else losses[name])
    return {name: place for place, name in enumerate(ordered, start=1)}


def _said_of_columns(titles: Sequence[str], columns: Sequence[dict[str, int]]) -> str:
    return "; ".join(f"after {title} {', '.join(ranks)}" for title, ranks in zip(titles, columns, strict=True))

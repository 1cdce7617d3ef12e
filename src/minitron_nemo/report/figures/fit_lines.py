"""What refitted weights miss, layer by layer: a panel for each kind of place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from minitron_nemo.report.figures.svg import INK, SERIES, TEACHER, as_svg, styled

_COLUMNS = 2


@dataclass(frozen=True)
class Missed:
    """Of one kind of place, ascending by layer: shares of the teacher's squares."""

    layers: Sequence[int]
    plain: Sequence[float]
    fitted: Sequence[float]
    held_out: Sequence[float] | None


def fit_lines(key: str, kinds: Mapping[str, Missed]) -> str:
    """Missed plainly (grey), on the tokens that were fitted, and on those held out (dashed).

    Args:
        key: begins the ids.
    """
    rows = -(-len(kinds) // _COLUMNS)
    with styled():
        figure = Figure(figsize=(7.6, 0.6 + 1.9 * rows), layout="constrained")
        panels = figure.subplots(rows, _COLUMNS, squeeze=False).flat
        for (name, missed), axes in zip(kinds.items(), panels, strict=False):
            axes.plot(missed.layers, missed.plain, color=TEACHER, marker=".", label="cut plainly")
            axes.plot(missed.layers, missed.fitted, color=SERIES[1], marker=".", label="refitted")
            if missed.held_out is not None:
                axes.plot(missed.layers, missed.held_out, color=INK, linestyle=(0, (4, 2)), label="refitted, held out")
            axes.set_title(name, fontsize=9, loc="left")
            axes.set_ylim(bottom=0)
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
            axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
            axes.yaxis.set_major_locator(MaxNLocator(4))
            axes.grid(True)
            axes.tick_params(labelsize=8)
        for axes in list(panels):
            axes.set_axis_off()
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False, fontsize=9)
        figure.supxlabel("layer", fontsize=10)
        return as_svg(figure, key, f"What refitted weights miss by layer: {', '.join(kinds)}")

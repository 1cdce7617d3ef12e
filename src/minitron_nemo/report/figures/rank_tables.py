"""Rank correlations as tables of coloured cells."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from minitron_nemo.report.correlation import Agreement
from minitron_nemo.report.figures.svg import COLORMAP, PAPER, as_svg, styled


def agreement_tables(tables: Sequence[Agreement], name: str) -> str:
    """Rank correlations, a panel for each table, lower halves; brighter is more alike.

    Args:
        name: of the picture, unlike the page's others.
    """
    columns = min(2, len(tables))
    rows = -(-len(tables) // columns)
    most = max(len(table.labels) for table in tables)
    with styled():
        size = 0.9 + 0.3 * most
        figure = Figure(figsize=(max(3.8, size + 0.9) * columns, (size + 0.2) * rows), layout="constrained")
        panels = figure.subplots(rows, columns, squeeze=False).flatten()
        for axes in panels[len(tables) :]:
            axes.set_visible(False)
        for axes, table in zip(panels, tables, strict=False):
            values, count = table.table.numpy(), len(table.labels)
            shown = np.where(np.tri(count, k=-1, dtype=bool), values, np.nan)[1:, :-1]  # the rest says nothing new
            axes.pcolormesh(shown, cmap=COLORMAP, vmin=-1, vmax=1, edgecolors=PAPER, linewidth=0.6)
            axes.invert_yaxis()
            axes.set_aspect("equal")
            for row, column in zip(*np.nonzero(np.isfinite(shown)), strict=True):
                value = shown[row, column]
                axes.text(
                    column + 0.5, row + 0.5, f"{value:.2f}".replace("0.", "."), ha="center", va="center", fontsize=7,
                    color="black" if value > 0 else "white", in_layout=False,
                )  # fmt: skip
            axes.set_title(table.title, fontsize=10, loc="left")
            ticks = np.arange(count - 1) + 0.5
            axes.set_xticks(ticks, table.labels[:-1], rotation=90, fontsize=8)
            axes.set_yticks(ticks, table.labels[1:], fontsize=8)
            axes.spines[:].set_visible(False)
            axes.grid(False)
            axes.tick_params(length=0)
        return as_svg(figure, name, "Rank correlations: " + ", ".join(table.title for table in tables))

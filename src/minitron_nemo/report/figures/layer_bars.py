"""Scores of layers and of blocks of layers, a panel for each size of block."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from minitron_nemo.report.figures.svg import INK, as_svg, styled
from minitron_nemo.report.scores import kept_mask

_PANELS = 4  # block sizes side by side


def layer_bars(metric: str, scores: Mapping[int, npt.NDArray[np.float64]], kept: npt.NDArray[np.int64] | None) -> str:
    """One metric's scores of single layers, and of blocks by the block's first layer, a panel for each size.

    Dropped layers are hollow; a triangle points at the lowest bar of each panel.

    Args:
        scores: block size n -> [l-n+1].
        kept: layers [k].
    """
    blocks = sorted(size for size in scores if size > 1)
    rows = ([[1] * _PANELS] if 1 in scores else []) + [
        (blocks[start : start + _PANELS] + [0] * _PANELS)[:_PANELS] for start in range(0, len(blocks), _PANELS)
    ]
    with styled():
        heights = [1.5 if 1 in row else 1.0 for row in rows]
        figure = Figure(figsize=(7.6, 0.5 + 1.35 * sum(heights)), layout="constrained")
        panels = figure.subplot_mosaic(rows, empty_sentinel=0, gridspec_kw={"height_ratios": heights})
        for size, axes in panels.items():
            values = scores[size]
            places = np.arange(len(values))
            mask = kept_mask(kept, len(values)) if size == 1 and kept is not None else np.ones(len(values), dtype=bool)
            axes.bar(places[mask], values[mask], color=INK, width=0.7, label="kept")
            if not mask.all():
                axes.bar(
                    places[~mask], values[~mask], color="none", edgecolor=INK, linewidth=1, width=0.7, label="dropped"
                )
                axes.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1, 1))
            lowest = int(np.argmin(values))
            axes.annotate(
                "\u25bc", xy=(lowest, max(0.0, float(values[lowest]))), xytext=(0, 1), textcoords="offset points",
                ha="center", va="bottom", fontsize=7, in_layout=False,
            )  # fmt: skip
            axes.set_title(f"{size} layers" if size > 1 else "single layers", fontsize=9, loc="left")
            axes.set_xlim(-0.6, len(values) - 0.4)
            axes.margins(y=0.16)
            axes.xaxis.set_major_locator(MaxNLocator(8 if size == 1 else 4, integer=True))
            axes.yaxis.set_major_locator(MaxNLocator(4 if size == 1 else 3))
            axes.tick_params(labelsize=8)
        figure.supxlabel("layer, or first layer of the block" if blocks else "layer", fontsize=10)
        figure.supylabel("score", fontsize=10)
        return as_svg(figure, f"layers-{metric}", f"Layer scores by {metric}")

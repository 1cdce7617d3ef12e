"""Importance scores with what is kept: neurons, heads and experts by layer, hidden channels as a profile."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from minitron_nemo.report.figures.svg import COLORMAP, GRID, INK, PAPER, as_svg, styled
from minitron_nemo.report.scores import kept_mask


def neuron_map(scores: npt.NDArray[np.float64], kept: int | None, name: str = "neurons") -> str:
    """Scores [l, f] or, of every expert, [l, e, f], each sorted from its highest to its lowest, log scale; a line after
    the `kept`-th. Experts of a layer are averaged after sorting. Layers without these neurons are blank.

    Args:
        name: of the picture, unlike the page's others.
    """
    layers, size = scores.shape[0], scores.shape[-1]
    with styled():
        figure = Figure(figsize=(7.6, min(6.5, 1.5 + 0.22 * layers)), layout="constrained")
        axes = figure.subplots()
        ordered = -np.sort(-scores, axis=-1)
        _image(figure, axes, ordered if ordered.ndim == 2 else ordered.mean(1), "score (log)")
        axes.set_xlabel("neurons of a layer, from its highest score to its lowest")
        axes.set_ylabel("layer")
        axes.set_xticks(sorted({0, size} | ({kept} if kept else set())))
        axes.set_xticklabels([str(round(tick)) for tick in axes.get_xticks()])
        if kept is not None and 0 < kept < size:
            _cut(axes, kept, f"{kept} kept", f"{size - kept} dropped")
        return as_svg(figure, name, "Heat map of neuron scores by layer")


def head_map(scores: npt.NDArray[np.float64], kept: npt.NDArray[np.int64] | None, heads_per_group: int) -> str:
    """Head scores [l, n], log scale; kept heads [l, k] carry a dot, and gaps stand between query groups."""
    heads = scores.shape[1]
    edges = range(heads_per_group, heads, heads_per_group)
    return _cell_map(scores, kept, "head (gaps between query groups)" if edges else "head", "heads", edges)


def expert_map(scores: npt.NDArray[np.float64], kept: npt.NDArray[np.int64] | None) -> str:
    """Expert scores [l, e], log scale; kept experts [l, k] carry a dot. Layers without experts are blank."""
    return _cell_map(scores, kept, "expert", "experts")


def hidden_profile(scores: npt.NDArray[np.float64], kept: int | None) -> str:
    """Hidden-channel scores [h] from the highest to the lowest, log scale; a line after the `kept`-th."""
    ordered, size = _positive(-np.sort(-scores)), scores.shape[0]
    with styled():
        figure = Figure(figsize=(7.6, 3.2), layout="constrained")
        axes = figure.subplots()
        axes.step(np.arange(size + 1), np.append(ordered, ordered[-1]), where="post", color=INK, linewidth=1.5)
        axes.set_yscale("log")
        _sparse_log_ticks(axes.yaxis, float(ordered.min()), float(ordered.max()))
        axes.set_xlim(0, size)
        axes.set_ylabel("score (log)")
        axes.set_xlabel("hidden channels, from the highest score to the lowest")
        axes.set_xticks(sorted({0, size} | ({kept} if kept else set())))
        axes.grid(True)
        if kept is not None and 0 < kept < size:
            axes.axvspan(kept, size, color=GRID, linewidth=0, alpha=0.6, zorder=0)
            _cut(axes, kept, f"{kept} kept", f"{size - kept} dropped")
        return as_svg(figure, "hidden", "Hidden-channel scores from the highest to the lowest")


def _cell_map(
    scores: npt.NDArray[np.float64],
    kept: npt.NDArray[np.int64] | None,
    unit: str,
    name: str,
    edges: Sequence[int] = (),
) -> str:
    """[l, c], a cell for each unit of a layer, log scale; kept ones [l, k] carry a dot.

    Args:
        edges: units before which a gap stands.
    """
    layers, units = scores.shape
    with styled():
        figure = Figure(figsize=(min(7.6, 2.4 + 0.42 * units), min(9, 1.5 + 0.3 * layers)), layout="constrained")
        axes = figure.subplots()
        _image(figure, axes, scores, "score (log)", unit_cells=True)
        for edge in edges:
            axes.axvline(edge, color=PAPER, linewidth=2.5)
        if kept is not None:
            layer, place = np.nonzero(kept_mask(kept, units) & (scores > 0).any(1, keepdims=True))
            axes.plot(
                place + 0.5, layer + 0.5, linestyle="", marker="o", markersize=min(7.0, 150 / max(units, layers)),
                markerfacecolor="white", markeredgecolor="black", markeredgewidth=0.8,
            )  # fmt: skip
        axes.set_xlabel(unit)
        axes.set_ylabel("layer")
        ticks = np.unique(np.linspace(0, units - 1, min(units, 12)).round().astype(int))
        axes.set_xticks(ticks + 0.5, [str(tick) for tick in ticks])
        return as_svg(figure, name, f"Heat map of {name}' scores by layer")


def _image(figure: Figure, axes: Axes, scores: npt.NDArray[np.float64], label: str, unit_cells: bool = False) -> None:
    """[l, x] as a heat map, layer 0 on top, on a log scale with a colour bar; rows of zeros stay blank."""
    values = _positive(scores)
    layers, size = values.shape
    low, high = float(values.min()), float(values.max())
    values[~(scores > 0).any(1)] = np.nan
    image = axes.imshow(
        values, aspect="equal" if unit_cells and size <= 40 else "auto", cmap=COLORMAP,
        norm=LogNorm(low, high if high > low else low * 1.01), extent=(0, size, layers, 0),
        interpolation="nearest" if unit_cells else "auto",
    )  # fmt: skip
    ticks = np.unique(np.linspace(0, layers - 1, min(layers, 9)).round().astype(int))
    axes.set_yticks(ticks + 0.5, [str(tick) for tick in ticks])
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    bar = figure.colorbar(image, ax=axes, label=label, pad=0.02, aspect=14)
    bar.outline.set_visible(False)
    _sparse_log_ticks(bar.ax.yaxis, low, high)


def _sparse_log_ticks(axis: Axis, low: float, high: float) -> None:
    """Few, plain labels on a log axis, also where it spans less than a decade."""
    decades = np.log10(high / low)
    steps = (1,) if decades > 2 else (1, 3) if decades > 1 else (1, 2, 5) if decades > 0.5 else tuple(range(1, 10))
    axis.set_major_locator(LogLocator(subs=steps))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _cut(axes: Axes, at: int, left: str, right: str) -> None:
    axes.axvline(at, color=INK, linewidth=2.6)
    axes.axvline(at, color=PAPER, linewidth=1.0, linestyle=(0, (3, 2)))
    for text, anchor, offset in ((left, "right", -5), (right, "left", 5)):
        axes.annotate(
            text, xy=(at, 1), xycoords=("data", "axes fraction"), xytext=(offset, 4), textcoords="offset points",
            ha=anchor, va="bottom", fontsize=9,
        )  # fmt: skip


def _positive(scores: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Scores for a log scale: zeros (dead units) and what is not finite take the lowest positive value."""
    good = np.isfinite(scores) & (scores > 0)
    floor = float(scores[good].min()) if good.any() else 1.0
    return np.where(good, scores, floor)

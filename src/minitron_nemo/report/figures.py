"""The report's pictures: NumPy in, inline SVG out.

Matplotlib draws with fixed marker colours; `_svg` then puts a CSS variable in the place of each, so that one picture
follows the page into light and dark. Text stays text. Series colours are Okabe and Ito's, safe for colour-blind
readers, and every series is also told apart by its direct label; images use cividis, made for the same purpose.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from minitron_nemo.report.correlation import Agreement
from minitron_nemo.report.rows import count
from minitron_nemo.report.run import Curve, History
from minitron_nemo.report.scores import kept_mask

INK, GRID, PAPER = "#010203", "#040506", "#070809"
SERIES = {
    "distilled_calibrated": "#9b4f96",
    "distilled": "#0072b2",
    "pruned_ce": "#d55e00",
    "from_scratch": "#009e73",
    "corrected_teacher": "#808182",
}
"""Series colour by variant; also the CSS variable's default in light mode."""
_CSS_VARIABLE = {INK: "var(--ink)", GRID: "var(--grid)", PAPER: "var(--paper)"} | {
    colour: f"var(--{name.replace('_', '-')})" for name, colour in SERIES.items()
}
_COLORMAP = "cividis"
_PANELS = 4  # block sizes side by side
_POINTS = 1200  # drawn per curve: more than a screen's pixels only makes the file larger
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "minitron_nemo",  # the same run gives the same file
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
}


def loss_curves(
    histories: Mapping[str, History], labels: Mapping[str, str], distillation: Sequence[str], teacher_loss: float | None
) -> str:
    """Cross-entropy over tokens; beneath it, on axes of their own, the distillation loss, another quantity, and the
    agreement with the teacher, where it was measured.

    Args:
        histories: by variant name.
        labels: the variants' names for reading.
        distillation: variants whose training loss is a divergence from the teacher, not cross-entropy.
        teacher_loss: held-out loss of the reference teacher, nats per token, drawn as a level.
    """
    divergent = [name for name in distillation if name in histories and histories[name].training.tokens]
    agreeing = [name for name in divergent if histories[name].validation_agreement.tokens]
    with matplotlib.rc_context(_STYLE):
        heights = [3, *([1.1] if divergent else []), *([1.0] if agreeing else [])]
        figure = Figure(figsize=(7.6, 4.2 + 1.4 * (len(heights) - 1)), layout="constrained")
        grid = figure.subplots(len(heights), 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": heights})
        top: Axes = grid[0][0]
        ends: list[tuple[float, float, str, str]] = []
        for name, history in histories.items():
            colour = SERIES[name]
            if name not in divergent:
                _training(top, history.training, colour)
            _validation(top, history.validation, colour)
            last = history.validation if history.validation.tokens else history.training
            if last.tokens and (history.validation.tokens or name not in divergent):
                ends.append((last.tokens[-1], last.values[-1], labels[name], colour))
        _limit(top, histories, divergent, teacher_loss)
        if teacher_loss is not None:
            top.axhline(teacher_loss, color=INK, linewidth=1, linestyle=(0, (4, 3)))
            ends.append((np.inf, teacher_loss, "teacher, held out", INK))
        top.set_ylabel("cross-entropy (nats/token)")
        top.grid(True)
        _label_ends(top, ends)
        top.plot([], [], color=INK, marker="o", markersize=3.5, label="validation")
        top.plot([], [], color=INK, linewidth=1.2, alpha=0.75, label="training, smoothed")
        top.plot([], [], color=INK, linewidth=0.8, alpha=0.25, label="training, raw")
        top.legend(frameon=False, loc="upper right", fontsize=9)
        if divergent:
            _distances(grid[1][0], {name: histories[name] for name in divergent})
        bottom: Axes = grid[-1][0]
        if agreeing:
            for name in agreeing:
                _validation(bottom, histories[name].validation_agreement, SERIES[name])
            bottom.set_ylabel("agreement\nwith teacher")
            bottom.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
            bottom.grid(True)
        bottom.set_xlabel("training tokens")
        bottom.set_xlim(left=0)
        bottom.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _round_count(value)))
        bottom.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
        return _svg(figure, "curves", "Loss curves over training tokens")


def neuron_map(scores: npt.NDArray[np.float64], kept: int | None, name: str = "neurons") -> str:
    """Scores [l, f] or, of every expert, [l, e, f], each sorted from its highest to its lowest, log scale; a line after
    the `kept`-th. Experts of a layer are averaged after sorting. Layers without these neurons are blank.

    Args:
        name: of the picture, unlike the page's others.
    """
    layers, size = scores.shape[0], scores.shape[-1]
    with matplotlib.rc_context(_STYLE):
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
        return _svg(figure, name, "Heat map of neuron scores by layer")


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
    with matplotlib.rc_context(_STYLE):
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
        return _svg(figure, "hidden", "Hidden-channel scores from the highest to the lowest")


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
    with matplotlib.rc_context(_STYLE):
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
        return _svg(figure, f"layers-{metric}", f"Layer scores by {metric}")


def agreement_tables(tables: Sequence[Agreement], name: str) -> str:
    """Rank correlations, a panel for each table, lower halves; brighter is more alike.

    Args:
        name: of the picture, unlike the page's others.
    """
    columns = min(2, len(tables))
    rows = -(-len(tables) // columns)
    most = max(len(table.labels) for table in tables)
    with matplotlib.rc_context(_STYLE):
        size = 0.9 + 0.3 * most
        figure = Figure(figsize=(max(3.8, size + 0.9) * columns, (size + 0.2) * rows), layout="constrained")
        panels = figure.subplots(rows, columns, squeeze=False).flatten()
        for axes in panels[len(tables) :]:
            axes.set_visible(False)
        for axes, table in zip(panels, tables, strict=False):
            values, count = table.table.numpy(), len(table.labels)
            shown = np.where(np.tri(count, k=-1, dtype=bool), values, np.nan)[1:, :-1]  # the rest says nothing new
            axes.pcolormesh(shown, cmap=_COLORMAP, vmin=-1, vmax=1, edgecolors=PAPER, linewidth=0.6)
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
        return _svg(figure, name, "Rank correlations: " + ", ".join(table.title for table in tables))


# ---- pieces ------------------------------------------------------------------------------------------------------


def _distances(axes: Axes, histories: Mapping[str, History]) -> None:
    """Distillation losses in training, and on validation text."""
    for name, history in histories.items():
        _training(axes, history.training, SERIES[name])
        _validation(axes, history.validation_divergence, SERIES[name])
    curves = [curve for each in histories.values() for curve in (each.training, each.validation_divergence)]
    finite = np.concatenate([np.asarray(curve.values) for curve in curves])
    finite = finite[np.isfinite(finite)]
    if finite.size:
        low, high = float(finite.min()), float(np.quantile(finite, 0.98))  # the first steps may lie far above
        axes.set_ylim(0 if 0 <= low < 0.5 * high else low, 1.1 * high if high > low else None)
    axes.set_ylabel("distillation\nloss")
    axes.grid(True)


def _validation(axes: Axes, curve: Curve, colour: str) -> None:
    if curve.tokens:
        axes.plot(np.asarray(curve.tokens), np.asarray(curve.values), color=colour, marker="o", markersize=3.5)


def _training(axes: Axes, curve: Curve, colour: str) -> None:
    """Raw losses faint, their running mean over a twentieth of the curve on top."""
    if not curve.tokens:
        return
    tokens, values = _thinned(np.asarray(curve.tokens, float)), _thinned(np.asarray(curve.values, float))
    axes.plot(tokens, values, color=colour, linewidth=0.8, alpha=0.25)
    axes.plot(tokens, smoothed(values, max(2, len(values) // 40)), color=colour, linewidth=1.2, alpha=0.75)


def smoothed(values: npt.NDArray[np.float64], reach: int) -> npt.NDArray[np.float64]:
    """Mean over `reach` neighbours on either side, fewer at the ends; what is not finite is left out."""
    finite = np.isfinite(values)
    window = np.ones(2 * reach + 1)
    total = np.convolve(np.where(finite, values, 0.0), window, mode="full")[reach:-reach]
    number = np.convolve(finite.astype(float), window, mode="full")[reach:-reach]
    return np.where(finite, total / np.maximum(number, 1), np.nan)


def _thinned(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Means of consecutive blocks, where there are more points than a screen shows."""
    block = -(-len(values) // _POINTS)
    if block <= 1:
        return values
    return np.array([values[start : start + block].mean() for start in range(0, len(values), block)])


def _round_count(value: float) -> str:
    """A tick's count without the zeros that say nothing: 10k, 2.5M."""
    return re.sub(r"\.(\d*?)0+(?=[kMBT]$)", lambda found: f".{found[1]}" if found[1] else "", count(round(value)))


def _limit(axes: Axes, histories: Mapping[str, History], divergent: Sequence[str], teacher_loss: float | None) -> None:
    """Upper end: the highest loss after a twentieth of the tokens; the first steps would flatten all that follows."""
    curves = [history.validation for history in histories.values()]
    curves += [history.training for name, history in histories.items() if name not in divergent]
    tokens, values = (np.concatenate([getattr(curve, name) for curve in curves]) for name in ("tokens", "values"))
    tokens, values = tokens[np.isfinite(values)], values[np.isfinite(values)]
    if not len(values):
        return
    late = values[tokens >= 0.05 * tokens.max()]
    low = min(float(values.min()), teacher_loss if teacher_loss is not None else np.inf)
    high = max(float(late.max()), low + 1e-3)
    axes.set_ylim(low - 0.06 * (high - low), high + 0.06 * (high - low))


def _label_ends(axes: Axes, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Name each curve at its right end, with a tick of its colour; pushed apart where two would overlap.

    Args:
        ends: (last tokens, last value, label, colour); a curve that ends well before the others is named where it ends.
    """
    low, high = axes.get_ylim()
    apart, last = 0.06 * (high - low), max((end[0] for end in ends if np.isfinite(end[0])), default=0.0)
    placed = -np.inf
    for tokens, value, label, colour in sorted((end for end in ends if np.isfinite(end[1])), key=lambda end: end[1]):
        if tokens < 0.8 * last:
            axes.annotate(
                label, xy=(tokens, value), xytext=(6, 3), textcoords="offset points", va="bottom", fontsize=9,
            )  # fmt: skip
            continue
        placed = min(max(value, placed + apart), high)
        for text, tint, offset in (("\u2014", colour, 5), (label, INK, 20)):
            axes.annotate(
                text, xy=(1, placed), xycoords=("axes fraction", "data"), xytext=(offset, 0), color=tint,
                textcoords="offset points", va="center", fontsize=9, annotation_clip=False,
                fontweight="bold" if text != label else "normal",
            )  # fmt: skip


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
    with matplotlib.rc_context(_STYLE):
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
        return _svg(figure, name, f"Heat map of {name}' scores by layer")


def _image(figure: Figure, axes: Axes, scores: npt.NDArray[np.float64], label: str, unit_cells: bool = False) -> None:
    """[l, x] as a heat map, layer 0 on top, on a log scale with a colour bar; rows of zeros stay blank."""
    values = _positive(scores)
    layers, size = values.shape
    low, high = float(values.min()), float(values.max())
    values[~(scores > 0).any(1)] = np.nan
    image = axes.imshow(
        values, aspect="equal" if unit_cells and size <= 40 else "auto", cmap=_COLORMAP,
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


def _svg(figure: Figure, name: str, alternative: str) -> str:
    """The figure as an <svg> element for HTML: no prolog, no namespaces, ids of its own, colours as CSS variables.

    Args:
        name: prefix of the ids, as several pictures share a page.
        alternative: what a screen reader says in its place.
    """
    buffer = io.StringIO()
    figure.savefig(
        buffer, format="svg", transparent=True, dpi=140,
        metadata={"Creator": None, "Date": None, "Format": None, "Type": None},
    )  # fmt: skip
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text)
    width = 72 * figure.get_figwidth()  # points; from 10 to 15 CSS pixels for the text's 10 points
    element = (
        rf'<svg viewBox="\1" role="img" aria-label="{html.escape(alternative)}" '
        f'style="min-width: {width:.0f}px; max-width: {1.5 * width:.0f}px">'
    )
    text = re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', element, text, count=1)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r"url\(#", f"url(#{name}-", text)
    text = re.sub(r'(xlink:href|href)="#', rf'\1="#{name}-', text)
    for colour, variable in _CSS_VARIABLE.items():
        text = text.replace(colour, variable)
    return text

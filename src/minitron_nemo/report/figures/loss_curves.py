"""Losses and agreement over training tokens, a curve for each model that was trained."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from minitron_nemo.report.figures.svg import INK, as_svg, styled
from minitron_nemo.report.histories import Curve, History
from minitron_nemo.report.table import count

_POINTS = 1200  # drawn per curve: more than a screen's pixels only makes the file larger
End = tuple[float, float, str, str]
"""Where a curve ends: tokens, value; its label and colour."""


@dataclass(frozen=True)
class Series:
    """One model's curves."""

    label: str
    history: History
    colour: str
    is_distilled: bool = False
    """Its training loss is a divergence from the teacher, not cross-entropy."""

    @property
    def diverges(self) -> bool:
        """Whether there is such a loss to draw."""
        return self.is_distilled and bool(self.history.training.tokens)

    @property
    def cross_entropies(self) -> list[Curve]:
        history = self.history
        return [history.validation] if self.diverges else [history.training, history.validation]


def loss_curves(series: Sequence[Series], teacher_loss: float | None) -> str:
    """Cross-entropy over tokens; beneath it, on axes of their own, the distillation loss, another quantity, and the
    agreement with the teacher, where it was measured.

    Args:
        series: in the order of the rows.
        teacher_loss: held-out loss of the reference teacher, nats per token, drawn as a level.
    """
    divergent = [each for each in series if each.diverges]
    agreeing = [each for each in divergent if each.history.validation_agreement.tokens]
    with styled():
        heights = [3, *([1.1] if divergent else []), *([1.0] if agreeing else [])]
        figure = Figure(figsize=(7.6, 4.2 + 1.4 * (len(heights) - 1)), layout="constrained")
        grid = figure.subplots(len(heights), 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": heights})
        _cross_entropies(grid[0][0], series, teacher_loss)
        if divergent:
            _distances(grid[1][0], divergent)
        bottom: Axes = grid[-1][0]
        if agreeing:
            for each in agreeing:
                _validation(bottom, each.history.validation_agreement, each.colour)
            bottom.set_ylabel("agreement\nwith teacher")
            bottom.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
            bottom.grid(True)
        bottom.set_xlabel("training tokens")
        _count_tokens(bottom)
        return as_svg(figure, "curves", "Loss curves over training tokens")


def source_curves(series: Sequence[Series]) -> str:
    """Validation loss over tokens, of each source of the text on axes of its own; the colours are the models'."""
    names = list(dict.fromkeys(name for each in series for name in each.history.source_losses))
    with styled():
        rows = -(-len(names) // 2)
        figure = Figure(figsize=(7.6, 0.6 + 2.3 * rows), layout="constrained")
        grid = figure.subplots(rows, 2, sharex=True, squeeze=False)
        for axes, name in itertools.zip_longest(grid.flat, names):
            if name is None:
                axes.set_axis_off()
                continue
            for each in series:
                if curve := each.history.source_losses.get(name):
                    _validation(axes, curve, each.colour)
            axes.set_title(name, fontsize=10, loc="left", parse_math=False)
            axes.grid(True)
            _count_tokens(axes)
        for each in series:
            grid[0][0].plot([], [], color=each.colour, marker="o", markersize=3.5, label=each.label)
        figure.legend(loc="outside lower left", ncols=3, frameon=False, fontsize=9)
        figure.supylabel("cross-entropy (nats/token)", fontsize=10)
        figure.supxlabel("training tokens", fontsize=10)
        return as_svg(figure, "source-curves", "Validation loss of each source over training tokens")


def _count_tokens(axes: Axes) -> None:
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _round_count(value)))
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))


def _cross_entropies(axes: Axes, series: Sequence[Series], teacher_loss: float | None) -> None:
    ends: list[End] = []
    for each in series:
        training, validation = each.history.training, each.history.validation
        if not each.diverges:
            _training(axes, training, each.colour)
        _validation(axes, validation, each.colour)
        last = validation if validation.tokens else training
        if last.tokens and (validation.tokens or not each.diverges):
            ends.append((last.tokens[-1], last.values[-1], each.label, each.colour))
    _limit(axes, series, teacher_loss)
    if teacher_loss is not None:
        axes.axhline(teacher_loss, color=INK, linewidth=1, linestyle=(0, (4, 3)))
        ends.append((np.inf, teacher_loss, "teacher, held out", INK))
    axes.set_ylabel("cross-entropy (nats/token)")
    axes.grid(True)
    _label_ends(axes, ends)
    axes.plot([], [], color=INK, marker="o", markersize=3.5, label="validation")
    axes.plot([], [], color=INK, linewidth=1.2, alpha=0.75, label="training, smoothed")
    axes.plot([], [], color=INK, linewidth=0.8, alpha=0.25, label="training, raw")
    axes.legend(frameon=False, loc="upper right", fontsize=9)


def _distances(axes: Axes, series: Sequence[Series]) -> None:
    """Distillation losses in training, and on validation text."""
    for each in series:
        _training(axes, each.history.training, each.colour)
        _validation(axes, each.history.validation_divergence, each.colour)
    curves = [curve for each in series for curve in (each.history.training, each.history.validation_divergence)]
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


def _limit(axes: Axes, series: Sequence[Series], teacher_loss: float | None) -> None:
    """Upper end: the highest loss after a twentieth of the tokens; the first steps would flatten all that follows."""
    curves = [curve for each in series for curve in each.cross_entropies]
    tokens, values = (np.concatenate([getattr(curve, name) for curve in curves]) for name in ("tokens", "values"))
    tokens, values = tokens[np.isfinite(values)], values[np.isfinite(values)]
    if not len(values):
        return
    late = values[tokens >= 0.05 * tokens.max()]
    low = min(float(values.min()), teacher_loss if teacher_loss is not None else np.inf)
    high = max(float(late.max()), low + 1e-3)
    axes.set_ylim(low - 0.06 * (high - low), high + 0.06 * (high - low))


def _label_ends(axes: Axes, ends: Sequence[End]) -> None:
    """Name each curve at its right end, with a tick of its colour; pushed apart where two would overlap.

    Args:
        ends: a curve that ends well before the others is named where it ends.
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

"""How every picture is drawn: style, colours, and from a figure to inline SVG.

Matplotlib draws with fixed marker colours; `as_svg` then puts a CSS variable in the place of each, so that one picture
follows the page into light and dark. Text stays text. Series colours are Okabe and Ito's and their like, safe for
colour-blind readers, and every series is also told apart by its direct label; images use cividis, made for the same
purpose.
"""

from __future__ import annotations

import html
import io
import re
from contextlib import AbstractContextManager

import matplotlib
from matplotlib.figure import Figure

INK, GRID, PAPER = "#010203", "#040506", "#070809"
TEACHER = "#808182"
SERIES = ("#9b4f96", "#0072b2", "#d55e00", "#009e73", "#a6761d", "#117a8b", "#c2185b", "#5b6abf")
"""Colours of the students' series in the order of their rows, from the first again after the last; also the CSS
variables' defaults in light mode."""
CSS_VARIABLES = {INK: "--ink", GRID: "--grid", PAPER: "--paper", TEACHER: "--teacher"} | {
    colour: f"--series-{number}" for number, colour in enumerate(SERIES, start=1)
}
COLORMAP = "cividis"
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


def styled() -> AbstractContextManager[None]:
    """Draw inside of it, and make the SVG there too."""
    return matplotlib.rc_context(_STYLE)


def as_svg(figure: Figure, name: str, alternative: str) -> str:
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
    for colour, variable in CSS_VARIABLES.items():
        text = text.replace(colour, f"var({variable})")
    return text

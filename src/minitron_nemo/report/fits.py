"""What calibrated surgery could not fit: tables and pictures of how much each cut's refitted weights miss."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from minitron_nemo.places import EXPERT, FINAL_NORM, INPUT_NORM, LAYER, PRE_MLP_NORM, READERS, layer_of, pattern_of
from minitron_nemo.report.figures.fit_lines import Missed, fit_lines
from minitron_nemo.report.pictures import figure
from minitron_nemo.report.run import Run
from minitron_nemo.report.sheet import Sheet
from minitron_nemo.report.table import UNKNOWN

_EXPERTS = f"mlp.{EXPERT}linear_fc2"
_KINDS = {
    INPUT_NORM.name: "what reads the norm before attention",
    READERS["head"]: "attention's output (linear_proj)",
    PRE_MLP_NORM.name: "what reads the norm before the MLP",
    READERS["ffn"]: "the MLP's output (linear_fc2)",
    _EXPERTS: "experts' output (linear_fc2)",
    READERS["shared_expert_ffn"]: "the shared expert's output",
    FINAL_NORM: "what reads the final norm",
}
"""By the place, in a layer or at the end."""
_HEADERS = ["refitted", "places", "cut plainly", "refitted", "on held-out tokens", "worst place"]


@dataclass(frozen=True)
class _Place:
    kind: str
    layer: int | None
    plain: float
    fitted: float
    held_out: float | None


def fits(run: Run) -> list[Sheet]:
    """One of each cut that refitted weights, by name."""
    found = [(name, run.artifacts[name].facts) for name in run.lineage.made_by("prune")]
    found = [(name, facts) for name, facts in found if {"sequential_refit", "compensation"} & set(facts)]
    labels = {model.name: model.label for model in run.models}
    return [
        _sheet(
            f"fits-{number}" if number else "fits",
            labels.get(name, name),
            list(_places(facts)),
            is_sequential="sequential_refit" in facts,
        )
        for number, (name, facts) in enumerate(found)
    ]


def _places(facts: dict[str, Any]) -> Iterable[_Place]:
    for each in facts.get("sequential_refit", ()):
        kind = _KINDS[pattern_of(each["name"]).removeprefix(LAYER)]
        held_out = each.get("held_out_error")
        yield _Place(kind, layer_of(each["name"]), each["plain_error"], each["error"], held_out)
    for each in facts.get("compensation", ()):
        kind = _KINDS[READERS.get(each["axis"], _EXPERTS)]
        yield _Place(kind, each["layer"], each["plain_error"], each["error"], None)


def _sheet(key: str, label: str, places: list[_Place], *, is_sequential: bool) -> Sheet:
    by_kind: dict[str, list[_Place]] = {}
    for place in places:
        by_kind.setdefault(place.kind, []).append(place)
    lines = {kind: _missed(some) for kind, some in by_kind.items()}
    drawn = {kind: missed for kind, missed in lines.items() if len(missed.layers) > 1}
    remark = (
        "The share of the teacher's sum of squares that the student misses there, mean over the places of a kind: "
        "with what was cut simply gone, and with the weights refitted, over the calibration tokens."
    )
    caption = "The same, layer by layer."
    if any(place.held_out is not None for place in places):
        remark += (
            " Where held-out tokens lie well above the fitted ones, more calibration samples or a larger ridge help."
        )
    elif is_sequential:
        remark += (
            " Fitted tokens flatter a fit by few of them: prune.surgery.sequential.held_out=0.125 shows by how much."
        )
    if is_sequential:
        caption = "The same, layer by layer: what is lost below is mended above as far as a layer's own weights can."
    pictures = [figure(fit_lines(key, drawn), caption)] if drawn else []
    return Sheet(
        key, f"What refitting left: {label}", _HEADERS, [_row(*kind) for kind in by_kind.items()], [remark], pictures
    )


def _row(kind: str, places: list[_Place]) -> list[str]:
    worst = max(places, key=lambda place: place.fitted)
    said = [place.held_out for place in places if place.held_out is not None]
    where = f"{worst.fitted:.1%}" + (f" (layer {worst.layer})" if worst.layer is not None else "")
    return [
        kind,
        f"{len(places)}",
        f"{statistics.mean(place.plain for place in places):.1%}",
        f"{statistics.mean(place.fitted for place in places):.1%}",
        f"{statistics.mean(said):.1%}" if said else UNKNOWN,
        where,
    ]


def _missed(places: list[_Place]) -> Missed:
    """By layer, the mean of what is there more than once, such as experts."""
    layers = sorted({place.layer for place in places if place.layer is not None})

    def means(of: str) -> list[float]:
        values = ([getattr(each, of) for each in places if each.layer == layer] for layer in layers)
        return [math.nan if None in some else statistics.mean(some) for some in values]

    held_out = means("held_out")
    return Missed(layers, means("plain"), means("fitted"), None if all(map(math.isnan, held_out)) else held_out)

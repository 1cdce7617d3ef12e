"""The report as Markdown: the page's numbers and words without its pictures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from minitron_nemo.report.histories import Curve
from minitron_nemo.report.run import Run
from minitron_nemo.report.sheet import Sheet

_POINTS = 5
"""Of a curve."""


def markdown(run: Run, content: dict[str, Any]) -> str:
    """
    Args:
        content: what `page.html` is filled with.
    """
    summary = content["summary"]
    parts = [f"# Compression report: {content['name']}", *_headline(content["headline"])]
    parts += ["## The models in numbers", _table(content["headers"], content["rows"])]
    parts += [sentence for sentence in (summary["order"]["statement"], *summary["fairness"]) if sentence]
    doubts = [*summary["notes"], *(f"Missing: {each}" for each in summary["missing"])]
    parts += ["## Missing or in doubt", _list(doubts)] if doubts else []
    for sheet in content["sheets"]:
        parts += _sheet(sheet)
    parts += _samples(content["samples"])
    parts += ["## Loss over training", *_curves(run)]
    if content["counts"]:
        rows = [
            [row["axis"] + (f" (in each {row['each']})" if row["each"] else ""), f"{row['of']:,}", f"{row['kept']:,}"]
            for row in content["counts"]
        ]
        parts += ["## What was kept", _table(["axis", "of", "kept"], rows)]
    if content["shapes"]:
        rows = [[row["name"], f"{row['before']:,}", f"{row['after']:,}"] for row in content["shapes"]]
        parts += ["## Shape before and after", _table(["", "before", "after"], rows)]
    parts += _sheet(content["bill"])
    parts += ["## Every step", content["versions"], *_stages(content["provenance"])]
    return "\n\n".join(parts) + "\n"


def _headline(headline: dict[str, list[str]]) -> list[str]:
    return [f"**{title}.** {' '.join(sentences)}" for title, sentences in headline.items()]


def _sheet(sheet: Sheet) -> list[str]:
    return [f"## {sheet.title}", *sheet.remarks, _table(sheet.headers, sheet.rows)]


def _table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headers, ["---", *["---:"] * (len(headers) - 1)], *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


def _cell(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")
    return " ".join(escaped.split())


def _list(sentences: Sequence[str]) -> str:
    return "\n".join(f"- {sentence}" for sentence in sentences)


def _samples(samples: Sequence[dict[str, Any]]) -> list[str]:
    parts = ["## What they write"] if samples else []
    for each in samples:
        parts += [f"After this prompt, {each['mode']}:", _fenced(each["prompt"])]
        for label, text, _ in each["texts"]:
            parts += [f"{label}:", _fenced(text)]
    return parts


def _curves(run: Run) -> list[str]:
    histories = [(model.label, history) for model in run.models if (history := run.history(model.name)) is not None]
    found = [(label, history.validation) for label, history in histories if history.validation.tokens]
    if not found:
        return ["No validation in the training histories of this run."]
    rows = [[label, _points(curve)] for label, curve in found]
    return [_table(["model", "validation loss (after tokens)"], rows)]


def _points(curve: Curve) -> str:
    last = len(curve.tokens) - 1
    places = sorted({round(last * part / (_POINTS - 1)) for part in range(_POINTS)})
    return ", ".join(f"{curve.values[place]:.3f} ({curve.tokens[place]:,})" for place in places)


def _stages(provenance: Sequence[dict[str, Any]]) -> list[str]:
    parts = []
    for stage in provenance:
        made_from = ", ".join(f"{each['path']} ({each['digest'][:12]})" for each in stage["inputs"]) or "no other"
        parts.append(f"### {stage['name']}")
        parts.append(
            f"Stage {stage['stage']}, digest {stage['digest'][:12]}, made from {made_from}."
            + (f" Versions: {stage['versions']}." if stage["versions"] else "")
        )
        parts.append(_fenced(json.dumps(json.loads(stage["config"]), sort_keys=True), "json"))
    return parts


def _fenced(text: str, language: str = "") -> str:
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}{language}\n{text}\n{fence}"

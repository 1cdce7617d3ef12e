"""The training history of an artifact as curves over tokens."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitron_nemo.checks import Mistake

HISTORY = "history.jsonl"


@dataclass(frozen=True)
class Curve:
    """One series of a training history over tokens; a step that was trained twice (resume) counts once, the last."""

    tokens: list[int]
    values: list[float]


@dataclass(frozen=True)
class History:
    training: Curve
    validation: Curve
    validation_divergence: Curve
    """From the teacher; empty where it was not measured, as the next."""
    validation_agreement: Curve
    source_losses: dict[str, Curve]
    """Of validations by source of the text, in nats per token; empty where that is of one source."""
    source_divergences: dict[str, Curve]


def read_history(file: Path) -> History:
    """Read history.jsonl: training lines hold `loss`, validation lines `validation_loss`, both nats per token, and of a
    distillation `validation_divergence` and `validation_agreement`, a share; of several sources also
    `validation_loss/<source>` and so on of each.

    Raises: Mistake: a line is not a JSON object with whole `step` and `tokens`.
    """
    keys = ("loss", "validation_loss", "validation_divergence", "validation_agreement")
    found: dict[str, dict[int, tuple[int, float]]] = {key: {} for key in keys}
    by_source: dict[str, dict[str, dict[int, tuple[int, float]]]] = {key: {} for key in keys}
    for number, line in enumerate(file.read_text().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            step, tokens = int(record["step"]), int(record["tokens"])
        except (ValueError, KeyError, TypeError) as error:
            raise Mistake(
                f"{file} line {number} is not a history record (a JSON object with step and tokens): {line[:80]!r}. "
                "Run the stage that wrote it again, or remove the line."
            ) from error
        for name, value in record.items():
            key, _, source = name.partition("/")
            if key in keys:
                points = by_source[key].setdefault(source, {}) if source else found[key]
                points[step] = tokens, _number(value)
    losses, divergences = (
        {source: _curve(points) for source, points in by_source[key].items()}
        for key in ("validation_loss", "validation_divergence")
    )
    training, validation, divergence, agreement = (_curve(found[key]) for key in keys)
    return History(training, validation, divergence, agreement, losses, divergences)


def _curve(by_step: dict[int, tuple[int, float]]) -> Curve:
    points = [by_step[step] for step in sorted(by_step)]
    return Curve([tokens for tokens, _ in points], [value for _, value in points])


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)

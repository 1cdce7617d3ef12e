"""The training history of an artifact as curves."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from minitron_nemo.report.histories import read_history


def test_a_step_trained_twice_after_a_resume_counts_once(tmp_path: Path) -> None:
    file = tmp_path / "history.jsonl"
    steps = [(1, 5.0), (2, 4.0), (3, 3.9), (2, 4.1), (3, 3.8)]
    file.write_text("".join(json.dumps({"step": s, "tokens": 10 * s, "loss": v}) + "\n" for s, v in steps))

    assert dataclasses.asdict(read_history(file).training) == {"tokens": [10, 20, 30], "values": [5.0, 4.1, 3.8]}
    assert read_history(file).validation_agreement.tokens == []


def test_sources_have_curves_of_their_own(tmp_path: Path) -> None:
    file = tmp_path / "history.jsonl"
    lines = [
        {"step": 2, "tokens": 20, "validation_loss": 4.0, "validation_loss/a/b": 5.0, "validation_divergence/a/b": 1.0},
        {"step": 4, "tokens": 40, "validation_loss": 3.0, "validation_loss/a/b": 2.0, "validation_agreement/a/b": 0.5},
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))

    found = read_history(file)
    assert dataclasses.asdict(found.source_losses["a/b"]) == {"tokens": [20, 40], "values": [5.0, 2.0]}
    assert found.source_divergences["a/b"].values == [1.0] and found.validation.values == [4.0, 3.0]


def test_a_broken_history_line_is_named(tmp_path: Path) -> None:
    file = tmp_path / "history.jsonl"
    file.write_text('{"step": 1, "tokens": 10, "loss": 5.0}\n{"step": 2, "tok')
    with pytest.raises(ValueError, match=r"history\.jsonl line 2 is not a history record"):
        read_history(file)

"""What a recipe may ask of its report."""

from __future__ import annotations

from pathlib import Path

import pytest

from minitron_nemo.config.stages import ReportConfig, ReportRow


def config(*rows: ReportRow) -> ReportConfig:
    return ReportConfig(Path("runs/q"), Path("runs/q/report"), list(rows))


def test_a_report_may_not_take_the_place_of_its_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="would take the place of run_dir"):
        ReportConfig(tmp_path / "run", tmp_path)


def test_rows_are_told_apart_and_name_a_model() -> None:
    assert config(ReportRow("runs/q/distilled")).rows[0].title == "distilled"
    with pytest.raises(ValueError, match=r"report\.rows\[1\] names no model. Give it one, such as model: \$\{distill"):
        config(ReportRow("runs/q/distilled"), ReportRow(label="distilled"))
    with pytest.raises(ValueError, match=r"2 of report\.rows are called 'distilled'\. Give each a label"):
        config(ReportRow("runs/q/distilled"), ReportRow("runs/other/distilled"))
    with pytest.raises(ValueError, match=r"report\.rows names runs/q/distilled more than once"):
        config(ReportRow("runs/q/distilled"), ReportRow("runs/q/distilled", "once more"))

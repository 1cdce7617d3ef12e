"""What the report says of weights that were refitted."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from minitron_nemo.artifact import open_artifact
from minitron_nemo.config.stages import ReportConfig
from minitron_nemo.report.figures.fit_lines import Missed, fit_lines
from minitron_nemo.stages.report import run
from support.report_runs import STUDENT, TEACHER, Page, importance_of, write_importance, write_model, write_pruned


def refitted(name: str, error: float, held_out: float | None) -> dict[str, Any]:
    return {"name": name, "plain_error": 0.5, "error": error, "held_out_error": held_out, "ridge": 0.1}


def compensated(axis: str, layer: int, error: float, expert: int | None = None) -> dict[str, Any]:
    return {"axis": axis, "layer": layer, "expert": expert, "plain_error": 0.4, "error": error}


SEQUENTIAL = [
    refitted("decoder.layers.0.input_layernorm", 0.10, 0.20),
    refitted("decoder.layers.0.mlp.experts.local_experts.0.linear_fc2", 0.01, None),
    refitted("decoder.layers.0.mlp.experts.local_experts.1.linear_fc2", 0.03, None),
    refitted("decoder.layers.2.input_layernorm", 0.30, 0.40),
    refitted("decoder.final_layernorm", 0.25, 0.35),
]


def test_no_panel_is_left_empty() -> None:
    missed = Missed([0, 1], [0.4, 0.4], [0.1, 0.2], None)
    for kinds in (1, 2, 3):
        drawn = fit_lines("fits", {f"kind {number}": missed for number in range(kinds)})
        assert drawn.count('id="fits-axes_') == 2 * -(-kinds // 2)
        assert drawn.count('id="fits-matplotlib.axis_') == 2 * kinds, "each of two axes; a panel without any has none"


COMPENSATION = [compensated("ffn", 0, 0.1), compensated("ffn", 1, 0.2), compensated("head", 1, 0.3)]


def test_each_cut_shows_what_its_weights_could_not_be_fitted_to(tmp_path: Path) -> None:
    teacher = write_model(tmp_path, "teacher", "import-hf", TEACHER)
    importance = importance_of(TEACHER)
    inputs = [teacher, write_importance(tmp_path, "importance", importance, [teacher])]
    older = [{key: value for key, value in place.items() if key != "held_out_error"} for place in SEQUENTIAL]
    write_pruned(tmp_path, "beside", importance, STUDENT, inputs, {"sequential_refit": older})
    of_older = (run(ReportConfig(str(tmp_path), str(tmp_path / "older"))).path / "report.html").read_text()
    assert "held_out=0.125 shows by how much" in Page(of_older).text
    shutil.rmtree(tmp_path / "beside")

    cuts = {"beside": {"sequential_refit": SEQUENTIAL}, "each": {"compensation": COMPENSATION}, "plain": {}}
    for name, facts in cuts.items():
        write_pruned(tmp_path, name, importance, STUDENT, inputs, facts)
    report = run(ReportConfig(str(tmp_path), str(tmp_path / "report")))
    page = Page((report.path / "report.html").read_text())

    for row in (
        ["what reads the norm before attention", "2", "50.0%", "20.0%", "30.0%", "30.0% (layer 2)"],
        ["experts' output (linear_fc2)", "2", "50.0%", "2.0%", "–", "3.0% (layer 0)"],
        ["what reads the final norm", "1", "50.0%", "25.0%", "35.0%", "25.0%"],
        ["the MLP's output (linear_fc2)", "2", "40.0%", "15.0%", "–", "20.0% (layer 1)"],
        ["attention's output (linear_proj)", "1", "40.0%", "30.0%", "–", "30.0% (layer 1)"],
    ):
        assert row in page.rows
    assert "What refitting left: beside" in page.text and "What refitting left: each" in page.text
    assert "What refitting left: plain" not in page.text
    assert "well above the fitted ones" in page.text and "held_out=0.125" not in page.text
    assert {"fits-figure_1", "fits-1-figure_1"} <= set(page.ids)
    assert "What refitting left: beside" in (open_artifact(report.path).path / "report.md").read_text()

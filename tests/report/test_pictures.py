"""Every score has its picture, every trained model its curves."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import numpy as np
import torch

from minitron_nemo.config.stages import ReportConfig
from minitron_nemo.report import read_run
from minitron_nemo.report.figures.loss_curves import smoothed
from minitron_nemo.report.pictures import curves
from support.report_runs import (
    STUDENT,
    TEACHER,
    TOKENS,
    importance_of,
    page_of,
    report_of,
    write_importance,
    write_model,
    write_pruned,
    write_run,
)

EXPERTS = dataclasses.replace(
    TEACHER, family="qwen3_moe", num_moe_experts=4, moe_ffn_hidden_size=20, moe_shared_expert_intermediate_size=12,
    moe_router_topk=2, moe_layer_freq=(1, 0, 1),
)  # fmt: skip


def test_every_score_of_an_importance_artifact_is_drawn(tmp_path: Path) -> None:
    """An importance of every axis, by several depth metrics and block sizes, and two more to compare with."""
    blocks = {n: torch.rand(4 - n, generator=torch.Generator().manual_seed(n)) for n in (1, 2)}
    depth = {
        "block_influence": blocks,
        "kl": {1: 2 * blocks[1]},
        "loss": {1: -blocks[1]},
        "greedy": {1: torch.arange(3.0)},
    }
    full = importance_of(EXPERTS)
    for axis in ("expert", "expert_ffn", "shared_expert_ffn"):
        full.moments[axis][1] = 0
    full = dataclasses.replace(full, depth=depth)
    scores = write_importance(tmp_path, "importance", full)
    write_importance(tmp_path, "importance_on_code", full)
    write_importance(tmp_path, "importance_of_another_model", dataclasses.replace(importance_of(TEACHER), depth={}))
    student = EXPERTS.pruned_to(num_moe_experts=3, moe_ffn_hidden_size=15, hidden_size=16)
    write_pruned(tmp_path, "student_pruned", full, student, [scores])
    page = page_of(ReportConfig(tmp_path, tmp_path / "report"))

    # neurons of dense layers, of shared and of routed experts; experts, heads, hidden channels; four depth metrics;
    # agreement of aggregations, of depth metrics, of artifacts
    assert page.tags.count("figure") == page.tags.count("svg") == 6 + 4 + 3
    assert ["expert (in each layer)", "4", "3", "1", "75%"] in page.rows
    assert ["expert_ffn (in each expert)", "20", "15", "5", "75%"] in page.rows
    for said in (
        "Neurons inside the routed experts.", "A dot marks a kept expert.", "Block influence: ", "KL: ", "Loss: ",
        "Greedy: ", "Between the ways to make one score", "Between the depth metrics", "layer, block_influence",
        "artifacts of one shape (3 layers, hidden size 24)", "importance_on_code",
    ):  # fmt: skip
        assert said in page.text
    figure = page.text[page.text.index("Between the depth metrics") - 400 :]
    assert "-1.00" in figure and "1.00" in figure  # loss is the opposite of kl, which is block influence
    assert len(page.ids) == len(set(page.ids))


def colours(run_dir: Path) -> dict[str, str]:
    """Label of a curve -> CSS variable of the tick beside it."""
    picture = curves(read_run(run_dir, report_of(run_dir).rows), None)
    assert picture is not None
    ticks = re.findall(r"var\((--[\w-]+)\)\"[^>]*>\u2014</text>.*?<text[^>]*>([^<]+)</text>", picture, flags=re.DOTALL)
    return {label: variable for variable, label in ticks}


def test_series_have_colours_by_the_order_of_rows_and_keep_them_while_others_are_missing(tmp_path: Path) -> None:
    expected = {
        "distilled (calibrated)": "--series-1", "distilled": "--series-2", "pruned + CE": "--series-3",
        "from scratch": "--series-4",
    }  # fmt: skip
    assert colours(write_run(tmp_path / "run")) == expected
    pruned = write_pruned(tmp_path / "half", "student_pruned", importance_of(TEACHER), STUDENT, [])
    write_model(tmp_path / "half", "distilled", "distill", STUDENT, [pruned], tokens=TOKENS)
    write_model(tmp_path / "half", "one_more", "distill", STUDENT, [pruned], tokens=TOKENS, loss=1.0)
    half = colours(tmp_path / "half")
    assert half["distilled"] == "--series-2" and half["one_more"] not in expected.values()


def test_smoothing_keeps_a_constant_and_a_hole_stays_a_hole() -> None:
    assert np.allclose(smoothed(np.array([2.0, 2.0, np.nan, 2.0]), 2), [2.0, 2.0, np.nan, 2.0], equal_nan=True)
    assert np.allclose(smoothed(np.array([1.0, 2.0, 6.0]), 1), [1.5, 3.0, 4.0])

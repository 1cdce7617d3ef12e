"""The result of an importance pass: what it merges with, what it refuses, and its files."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from minitron_nemo.scores import Importance, moment_sizes, stream_sizes
from support.megatron import TINY, TINY_EXPERTS, smaller
from support.plans import random_scores

SHAPE = smaller(TINY, num_layers=2)


def test_merged_depth_scores_weigh_each_run_by_its_own_depth_samples(tmp_path: Path) -> None:
    first, second = (
        dataclasses.replace(random_scores(SHAPE), num_samples=1024, depth={"loss": {1: scores}})
        for scores in (torch.tensor([1.0, 4.0]), torch.tensor([2.0, 1.0]))
    )
    first = dataclasses.replace(first, depth_samples={"loss": 100})
    second = dataclasses.replace(second, depth_samples={"loss": 300})
    second.save(tmp_path)
    merged = Importance.merge([first, Importance.load(tmp_path)])
    assert_close(merged.layer_scores("loss"), torch.tensor([(1 * 1.0 + 3 * 2.0) / 4, (1 * 4.0 + 3 * 1.0) / 4]))
    assert merged.depth_samples == {"loss": 400}


def test_depth_scores_that_are_no_mean_over_known_samples_do_not_merge() -> None:
    depth = {"loss": {1: torch.rand(2)}, "order": {1: torch.tensor([1.0, 2.0])}}
    part = dataclasses.replace(random_scores(SHAPE), depth=depth, depth_samples={"loss": 8})
    with pytest.raises(ValueError, match=r"Depth scores order are no mean over a known number of samples.*depth=False"):
        Importance.merge([part, part])
    other = dataclasses.replace(part, depth={}, depth_samples={})
    assert Importance.merge([part, other], depth=False).depth == {}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer_digest": "other"}, r"the tokenizer's digest is None in the first and other in another"),
        ({"origin": {"head_norm": "after"}}, r"importance.head_norm is before in the first and after in another"),
        ({"depth": {"loss": {1: torch.zeros(2)}}}, r"depth metrics and their block sizes is \{\} in the first"),
        ({"shape": dataclasses.replace(SHAPE, rotary_base=5.0)}, r"the model's rotary_base is 10000.0 in the first"),
    ],
)
def test_runs_of_different_measurements_do_not_merge(changes: dict[str, Any], message: str) -> None:
    first = dataclasses.replace(random_scores(SHAPE), depth={}, origin={"head_norm": "before"})
    with pytest.raises(ValueError, match=message):
        Importance.merge([first, dataclasses.replace(first, **changes)])


def test_importance_round_trips_through_files(tmp_path: Path) -> None:
    importance = random_scores(TINY_EXPERTS)
    importance = dataclasses.replace(importance, depth_samples={"loss": 8}, tokenizer_digest="abc")
    importance.save(tmp_path / "importance")
    again = Importance.load(tmp_path / "importance")
    for axis in importance.axes:
        assert torch.equal(again.scores(axis), importance.scores(axis)), axis
    for metric in ("block_influence", "loss"):
        assert torch.equal(again.layer_scores(metric), importance.layer_scores(metric)), metric
    for field in ("shape", "num_samples", "origin", "depth_samples", "tokenizer_digest"):
        assert getattr(again, field) == getattr(importance, field), field


def test_a_folder_without_scores_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no importance scores: importance.safetensors is missing"):
        Importance.load(tmp_path)


def test_moments_of_another_model_are_an_error() -> None:
    moments = random_scores(SHAPE).moments
    with pytest.raises(ValueError, match=r"axis ffn have shape \[2, 2, 3, 40\], but a model of this shape has"):
        Importance(smaller(SHAPE, ffn_hidden_size=48), moments, num_samples=1)
    with pytest.raises(ValueError, match=r"moments of axis fnn have no place in a model; did you mean ffn\?"):
        Importance(SHAPE, {"fnn": moments["ffn"]}, num_samples=1)
    assert not set(stream_sizes(SHAPE)) & set(moment_sizes(SHAPE))


def test_unknown_aggregation_error_names_the_near_one() -> None:
    with pytest.raises(ValueError, match=r"sequence_aggregation=means is not an aggregation; did you mean mean\?"):
        random_scores(SHAPE).scores("ffn", sequence="means")
    with pytest.raises(ValueError, match=r"axis=expert was not estimated; known: ffn, group, head, hidden\."):
        random_scores(SHAPE).scores("expert")

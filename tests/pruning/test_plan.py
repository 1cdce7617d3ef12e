"""Pruning plans: what they keep, what they refuse, and their files."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pruning_examples import SMALLER, random_plan, random_scores

from minitron_nemo.importance import Importance
from minitron_nemo.pruning import PruningPlan, plan_from_importance
from support.megatron import TINY

AXES = ("hidden", "ffn", "head", "group", "layer")


def test_a_plan_keeps_the_highest_scores_of_the_papers_aggregation() -> None:
    importance = random_scores()
    plan = plan_from_importance(importance, TINY, TINY.pruned_to(**SMALLER))
    hidden, ffn = importance.scores("hidden"), importance.scores("ffn")
    assert sorted(plan.hidden.tolist()) == sorted(sorted(range(24), key=lambda c: -hidden[c])[:14])
    for layer in range(4):
        assert plan.ffn[layer].tolist() == sorted(sorted(range(40), key=lambda f: -ffn[layer, f])[:18])
    other = plan_from_importance(importance, TINY, plan.target, batch_aggregation="variance", sequence_aggregation="l2")
    assert not torch.equal(other.ffn, plan.ffn)
    assert (other.origin["batch_aggregation"], other.origin["sequence_aggregation"]) == ("variance", "l2")


def test_every_group_keeps_equally_many_heads() -> None:
    plan = random_plan(num_attention_heads=4)
    assert plan.group.tolist() == [[0, 1]] * 4
    for layer in range(4):
        assert [head // 3 for head in plan.head[layer].tolist()] == [0, 0, 1, 1]


def test_groups_are_pruned_whole() -> None:
    plan = random_plan(num_attention_heads=3, num_query_groups=1)
    for layer in range(4):
        group = plan.group[layer].item()
        assert plan.head[layer].tolist() == [3 * group, 3 * group + 1, 3 * group + 2]


def test_full_size_plan_is_the_identity() -> None:
    plan = plan_from_importance(random_scores(), TINY, TINY)
    assert plan.is_identity
    assert plan.hidden.tolist() == list(range(24))
    assert plan.ffn.tolist() == [list(range(40))] * 4
    assert plan.head.tolist() == [list(range(6))] * 4
    assert plan.group.tolist() == [[0, 1]] * 4
    assert plan.layer.tolist() == [0, 1, 2, 3]


def test_depth_goes_by_the_named_metric_or_by_the_named_layers() -> None:
    importance, target = random_scores(), TINY.pruned_to(num_layers=2)
    scores = importance.layer_scores("loss")
    by_score = plan_from_importance(importance, TINY, target, layer_metric="loss")
    assert by_score.layer.tolist() == sorted(sorted(range(4), key=lambda i: -scores[i])[:2])
    assert plan_from_importance(importance, TINY, target, layers=[3, 0]).layer.tolist() == [0, 3]


def test_a_plan_round_trips_through_files(tmp_path: Path) -> None:
    plan = random_plan(num_layers=3, **SMALLER)
    plan.save(tmp_path / "plan")
    again = PruningPlan.load(tmp_path / "plan")
    assert (again.source, again.target, again.origin) == (plan.source, plan.target, plan.origin)
    for axis in AXES:
        assert torch.equal(getattr(again, axis), getattr(plan, axis))


def test_a_description_shows_dims_and_counts() -> None:
    text = random_plan(num_layers=3, **SMALLER).describe()
    assert "hidden_size                       24            14   58.3%" in text
    assert f"{TINY.num_parameters:,}" in text
    assert "layers dropped: 2" in text
    assert "data=text" in text


# ---- errors ----------------------------------------------------------------------------------------------------------


def planned(importance: Importance | None = None, **target: Any) -> PruningPlan:
    return plan_from_importance(importance or random_scores(), TINY, dataclasses.replace(TINY, **target))


def test_target_larger_than_source_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"target.ffn_hidden_size=44 is larger than .*=40.* to at most 40\."):
        planned(ffn_hidden_size=44)


def test_target_that_changes_what_pruning_cannot_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"target.kv_channels=4 differs from the source's kv_channels=8"):
        planned(kv_channels=4)


def test_more_heads_per_group_than_the_source_has_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"makes 6 heads per group, but the source's groups have 3.* up to 3, or keep"):
        planned(num_query_groups=1)


def test_uneven_heads_per_group_are_an_error() -> None:
    with pytest.raises(ValueError, match="num_attention_heads=5 is not a multiple of num_query_groups=2"):
        planned(num_attention_heads=5)


def test_scores_of_another_model_are_an_error() -> None:
    other = random_scores(dataclasses.replace(TINY, ffn_hidden_size=48))
    with pytest.raises(ValueError, match=r"importance is of another model: ffn_hidden_size=48 there, 40 in the model"):
        planned(other)


def test_depth_without_a_way_to_choose_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"target.num_layers=2 of 4 drops layers, but nothing says which"):
        planned(num_layers=2)
    widths_only = dataclasses.replace(random_scores(), layer={})
    with pytest.raises(ValueError, match="holds width scores only"):
        plan_from_importance(widths_only, TINY, TINY.pruned_to(num_layers=2), layer_metric="loss")
    with pytest.raises(ValueError, match=r"layers=\[0, 1, 2\] keeps 3 layers, but target.num_layers=2"):
        plan_from_importance(random_scores(), TINY, TINY.pruned_to(num_layers=2), layers=[0, 1, 2])


def edited(**indices: Any) -> PruningPlan:
    return dataclasses.replace(random_plan(num_layers=2, **SMALLER), **indices)


def test_edited_plans_are_checked() -> None:
    with pytest.raises(ValueError, match=r"plan.layer keeps index 4, outside 0 to 3 \(num_layers=4"):
        edited(layer=torch.tensor([0, 4]))
    with pytest.raises(ValueError, match=r"plan.layer must name each kept index once, .*; 2 stands after"):
        edited(layer=torch.tensor([2, 2]))
    with pytest.raises(ValueError, match=r"plan.hidden has shape \[3\] .* hidden_size=14 needs \[14\]"):
        edited(hidden=torch.arange(3))
    with pytest.raises(ValueError, match=r"plan.head of layer 0 keeps heads \[0, 1, 2, 3\].* 2 heads each"):
        edited(head=torch.tensor([[0, 1, 2, 3]] * 4))


def test_a_folder_without_a_plan_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no pruning plan: plan.safetensors is missing"):
        PruningPlan.load(tmp_path)


def test_a_misspelt_field_of_an_edited_file_is_an_error(tmp_path: Path) -> None:
    random_plan().save(tmp_path)
    text = (tmp_path / "plan.json").read_text()
    description = json.loads(text)
    description["target"]["hiden_size"] = description["target"].pop("hidden_size")
    (tmp_path / "plan.json").write_text(json.dumps(description))
    with pytest.raises(ValueError, match=r"hiden_size is not a field of ModelShape; did you mean hidden_size\?"):
        PruningPlan.load(tmp_path)

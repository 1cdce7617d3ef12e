"""From scores to plans: which indices stay on every axis."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from minitron_nemo.config.pruning import DepthChoice
from minitron_nemo.plan import PruningPlan
from minitron_nemo.pruning import kept_layers, plan_from_importance
from minitron_nemo.scores import Importance
from support.megatron import TINY
from support.plans import SMALLER, random_plan, random_scores


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
    assert plan.source == plan.target
    assert plan.hidden.tolist() == list(range(24))
    assert plan.ffn.tolist() == [list(range(40))] * 4
    assert plan.head.tolist() == [list(range(6))] * 4
    assert plan.group.tolist() == [[0, 1]] * 4
    assert plan.layer.tolist() == [0, 1, 2, 3]


def test_depth_goes_by_the_named_metric_or_by_the_named_layers() -> None:
    importance, target = random_scores(), TINY.pruned_to(num_layers=2)
    scores = importance.layer_scores("loss")
    by_score = plan_from_importance(importance, TINY, target, depth=DepthChoice(metric="loss"))
    assert by_score.layer.tolist() == sorted(sorted(range(4), key=lambda i: -scores[i])[:2])
    assert plan_from_importance(importance, TINY, target, layers=[3, 0]).layer.tolist() == [0, 3]


def with_depth(metric: str, blocks: dict[int, list[float]]) -> Importance:
    return dataclasses.replace(
        random_scores(), depth={metric: {size: torch.tensor(scores) for size, scores in blocks.items()}}
    )


def test_the_best_contiguous_block_goes_also_where_single_layers_would_be_others() -> None:
    importance = with_depth("accuracy", {1: [0.9, 0.1, 0.8, 0.2], 2: [0.5, 0.3, 0.4]})
    target = TINY.pruned_to(num_layers=2)

    def kept(**choice: Any) -> list[int]:
        depth = DepthChoice(metric="accuracy", **choice)
        return plan_from_importance(importance, TINY, target, depth=depth).layer.tolist()

    assert kept() == [0, 2]
    assert kept(contiguous=True) == [0, 3]
    assert kept(contiguous=True, keep_first=2) == [0, 1]
    assert kept(contiguous=True, keep_last=1) == [0, 3]
    assert kept(keep_last=1) == [0, 3]


def test_layers_that_must_stay_leave_enough_to_drop() -> None:
    with pytest.raises(ValueError, match=r"drops 3 of 4 layers, but depth.keep_first=1 and depth.keep_last=1 leave"):
        kept_layers(random_scores(), TINY, 1, depth=DepthChoice(metric="loss", keep_first=1, keep_last=1))
    with pytest.raises(ValueError, match="estimated for blocks of 1 layers, not of 2"):
        kept_layers(random_scores(), TINY, 2, depth=DepthChoice(metric="loss", contiguous=True))


def test_layers_go_in_the_greedy_order_as_far_as_it_reaches() -> None:
    importance = with_depth("greedy", {1: [2.0, 0.0, 2.0, 1.0]})

    def kept(keep: int, **choice: Any) -> list[int]:
        return kept_layers(importance, TINY, keep, depth=DepthChoice(metric="greedy", **choice))

    assert (kept(4), kept(3), kept(2)) == ([0, 1, 2, 3], [0, 2, 3], [0, 2])
    assert kept(3, keep_first=1, keep_last=1) == [0, 2, 3]
    with pytest.raises(ValueError, match=r"drops 3 of 4 layers, but the greedy order holds only 2. Keep at least 2"):
        kept(1)
    with pytest.raises(ValueError, match=r"drops layers \[3\], which depth.keep_first=0 and depth.keep_last=1 protect"):
        kept(2, keep_last=1)
    with pytest.raises(ValueError, match=r"depth.contiguous=true drops a block"):
        kept(2, contiguous=True)


EXPERTS = dataclasses.replace(
    TINY,
    family="mixtral",
    num_moe_experts=4,
    moe_ffn_hidden_size=10,
    moe_shared_expert_intermediate_size=8,
    moe_router_topk=2,
    moe_layer_freq=(1, 0, 1, 1),
)


def test_experts_are_ranked_in_their_layer_and_neurons_in_their_expert() -> None:
    importance = random_scores(EXPERTS)
    target = EXPERTS.pruned_to(num_moe_experts=3, moe_ffn_hidden_size=6, moe_shared_expert_intermediate_size=2)
    plan = plan_from_importance(importance, EXPERTS, target)
    neurons, experts = importance.scores("expert_ffn"), importance.scores("expert")
    for layer in (0, 2, 3):
        assert plan.expert[layer].tolist() == sorted(sorted(range(4), key=lambda e: -experts[layer, e])[:3])
        for expert in range(4):
            scores = neurons[layer, expert]
            assert plan.expert_ffn[layer, expert].tolist() == sorted(sorted(range(10), key=lambda f: -scores[f])[:6])
    assert plan.kept_in_layer(2, expert=1)["expert_ffn"].equal(plan.expert_ffn[2, 1])
    assert plan.shared_expert_ffn.shape == (4, 2)


def test_experts_that_no_token_reached_are_said(caplog: pytest.LogCaptureFixture) -> None:
    importance = random_scores(EXPERTS)
    of_experts, neurons = torch.ones(4, 4, 4, dtype=torch.float64), torch.ones(4, 4, 4, 10, dtype=torch.float64)
    of_experts[:, 0], neurons[:, :, 0] = 7, 7  # tokens, then sums over them
    for layer, expert in ((2, 1), (3, 3)):
        of_experts[layer, :, expert], neurons[layer, expert] = 0, 0
    importance = dataclasses.replace(
        importance, moments={**importance.moments, "expert": of_experts, "expert_ffn": neurons}
    )
    plan_from_importance(importance, EXPERTS, EXPERTS.pruned_to(ffn_hidden_size=20))
    assert caplog.text == ""
    plan_from_importance(importance, EXPERTS, EXPERTS.pruned_to(num_moe_experts=3))
    assert caplog.text == ""  # of four, the one that was never reached goes
    plan_from_importance(importance, EXPERTS, EXPERTS.pruned_to(moe_ffn_hidden_size=6))
    assert "2 experts that stay were reached by none of the tokens" in caplog.text
    assert "(layers 2: 1, 3: 3). The rarest of the others saw 7 tokens" in caplog.text


def test_dense_and_expert_layers_stay_what_they_are() -> None:
    target = EXPERTS.keeping_layers([0, 1, 3])
    assert target.moe_layer_freq == (1, 0, 1)
    assert plan_from_importance(random_scores(EXPERTS), EXPERTS, target, layers=[0, 1, 3]).layer.tolist() == [0, 1, 3]
    with pytest.raises(ValueError, match=r"the kept layers \[1, 2, 3\] make it \(0, 1, 1\)"):
        plan_from_importance(random_scores(EXPERTS), EXPERTS, target, layers=[1, 2, 3])


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
    widths_only = dataclasses.replace(random_scores(), depth={})
    with pytest.raises(ValueError, match="holds width scores only"):
        plan_from_importance(widths_only, TINY, TINY.pruned_to(num_layers=2), depth=DepthChoice(metric="loss"))
    with pytest.raises(ValueError, match=r"layers=\[0, 1, 2\] keeps 3 layers, but target.num_layers=2"):
        plan_from_importance(random_scores(), TINY, TINY.pruned_to(num_layers=2), layers=[0, 1, 2])

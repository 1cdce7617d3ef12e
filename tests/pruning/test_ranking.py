"""From scores to kept indices."""

from __future__ import annotations

import pytest
import torch

from minitron_nemo.pruning.ranking import head_partners, top_heads, top_k


def test_the_highest_scores_are_kept_in_ascending_order() -> None:
    scores = torch.tensor([[0.1, 5.0, 0.3, 4.0], [9.0, 1.0, 8.0, 2.0]])
    assert top_k(scores, 2).tolist() == [[1, 3], [0, 2]]
    assert top_k(scores[0], 3).tolist() == [1, 2, 3]
    assert top_k(scores, 2).dtype == torch.int64


def test_of_equal_scores_the_lower_index_is_kept() -> None:
    assert top_k(torch.tensor([1.0, 2.0, 1.0, 2.0, 1.0]), 3).tolist() == [0, 1, 3]
    assert top_k(torch.zeros(1000), 7).tolist() == list(range(7))


def test_heads_are_ranked_inside_their_group() -> None:
    scores = torch.tensor([[9.0, 8.0, 7.0, 1.0, 2.0, 3.0], [1.0, 1.0, 1.0, 5.0, 4.0, 6.0]])  # 2 groups of 3
    groups = torch.tensor([[0, 1], [0, 1]])
    kept = top_heads(scores, groups, heads_per_group=3, keep_per_group=2)
    assert kept.tolist() == [[0, 1, 4, 5], [0, 1, 3, 5]]  # every group keeps two, whatever the other group scores


def test_heads_of_dropped_groups_go_with_them() -> None:
    scores = torch.tensor([[9.0, 8.0, 1.0, 2.0, 3.0, 4.0]])  # 3 groups of 2
    kept = top_heads(scores, torch.tensor([[1, 2]]), heads_per_group=2, keep_per_group=1)
    assert kept.tolist() == [[3, 5]]


@pytest.mark.parametrize(("heads", "keep"), [(6, 3), (6, 4), (6, 5), (6, 2), (6, 1), (1, 1)])
def test_dropped_heads_pair_with_the_last_kept_ones_of_their_group(heads: int, keep: int) -> None:
    scores = torch.rand(3, 2 * heads, generator=torch.Generator().manual_seed(heads + keep))
    groups = torch.tensor([[0, 1]] * 3)
    kept = top_heads(scores, groups, heads_per_group=heads, keep_per_group=keep)
    partners = head_partners(scores, groups, heads_per_group=heads, keep_per_group=keep)
    for layer in range(3):
        for group in range(2):
            members = range(group * heads, (group + 1) * heads)
            ranked = sorted(members, key=lambda head: -scores[layer, head])  # 0-based: rank i is ranked[i - 1]
            expected = dict.fromkeys(ranked[:keep], -1)
            for i in range(max(1, 2 * keep - heads + 1), keep + 1):  # the paper's formula, ranks from 1
                expected[ranked[i - 1]] = ranked[2 * keep - i + 1 - 1]
            of_group = slice(group * keep, (group + 1) * keep)
            assert (
                dict(zip(kept[layer, of_group].tolist(), partners[layer, of_group].tolist(), strict=True)) == expected
            )


def test_impossible_numbers_are_errors_that_name_the_limit() -> None:
    with pytest.raises(ValueError, match=r"5 of 4 cannot be kept: .* Choose 1 to 4\."):
        top_k(torch.ones(4), 5)
    with pytest.raises(ValueError, match="0 of 4 cannot be kept"):
        top_k(torch.ones(4), 0)
    with pytest.raises(ValueError, match="4 heads per query group cannot be kept where a group has 3"):
        top_heads(torch.ones(1, 6), torch.tensor([[0, 1]]), heads_per_group=3, keep_per_group=4)


def test_scores_that_are_not_finite_are_an_error() -> None:
    with pytest.raises(ValueError, match="NaN or infinity"):
        top_k(torch.tensor([1.0, float("nan")]), 1)

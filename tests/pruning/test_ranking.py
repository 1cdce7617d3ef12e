"""From scores to kept indices."""

from __future__ import annotations

import pytest
import torch

from minitron_nemo.pruning.ranking import top_heads, top_k


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

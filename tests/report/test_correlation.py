"""Rank correlations of metrics."""

from __future__ import annotations

import math

import torch

from minitron_nemo.report.correlation import ranks, spearman


def test_rank_correlation_shares_places_between_ties_and_leaves_out_rows_without_order() -> None:
    first = torch.tensor([[1.0, 2.0, 2.0, 4.0], [5.0, 6.0, 7.0, 8.0], [3.0, 3.0, 3.0, 3.0]])
    second = torch.tensor([[10.0, 30.0, 20.0, 40.0], [0.4, 0.3, 0.2, 0.1], [1.0, 2.0, 3.0, 4.0]])

    assert ranks(first).tolist() == [[0, 1.5, 1.5, 3], [0, 1, 2, 3], [1.5, 1.5, 1.5, 1.5]]
    # places less their mean: (-1.5, 0, 0, 1.5) and (-1.5, .5, -.5, 1.5), so 4.5 / sqrt(4.5 * 5); the next row -1
    expected = (4.5 / math.sqrt(4.5 * 5) - 1) / 2
    torch.testing.assert_close(
        spearman(torch.stack([first, second])), torch.tensor([[1, expected], [expected, 1]], dtype=torch.float64)
    )
    assert spearman(torch.stack([first[2], second[2]])).isnan().tolist() == [[True, True], [True, False]]

"""Refitting a linear and choosing its inputs, against float64 lstsq on the inputs themselves."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from minitron_nemo.pruning import least_squares
from minitron_nemo.pruning.least_squares import eliminate, refit

OUTPUTS, INPUTS, TOKENS, RIDGE = 7, 12, 50, 1e-2
GENERATOR = torch.Generator().manual_seed(3)
WEIGHT = torch.randn(OUTPUTS, INPUTS, generator=GENERATOR, dtype=torch.float64)
MIXING = torch.randn(INPUTS, INPUTS, generator=GENERATOR, dtype=torch.float64)
SEEN = torch.randn(TOKENS, INPUTS, generator=GENERATOR, dtype=torch.float64) @ MIXING
MOMENT = SEEN.t() @ SEEN


def by_lstsq(weight: Tensor, seen: Tensor, kept: list[int], ridge: float) -> tuple[Tensor, float]:
    """The weight [h, f] and the ridge objective at it: sum |W a - W' a|^2 + lambda |W - W'|^2."""
    pull = (ridge * seen.square().sum(0).mean()).sqrt()
    identity = torch.eye(weight.shape[1], dtype=torch.float64)
    rows = torch.cat([seen, pull * identity])
    solution = torch.linalg.lstsq(rows[:, kept], rows @ weight.t()).solution
    new = torch.zeros_like(weight)
    new[:, kept] = solution.t()
    return new, float((rows @ (weight - new).t()).square().sum())


@pytest.mark.parametrize("ridge", [0.0, 1e-2, 10.0])
def test_refitted_weight_is_the_least_squares_solution(ridge: float) -> None:
    kept = [0, 3, 4, 8, 11]
    found = refit(WEIGHT, MOMENT, torch.tensor(kept), ridge)
    expected, _ = by_lstsq(WEIGHT, SEEN, kept, ridge)
    assert_close(found.weight, expected, rtol=1e-9, atol=1e-9)
    selected = torch.zeros_like(WEIGHT)
    selected[:, kept] = WEIGHT[:, kept]
    for error, weight in ((found.error, expected), (found.plain_error, selected)):
        share = (SEEN @ (WEIGHT - weight).t()).square().sum() / (SEEN @ WEIGHT.t()).square().sum()
        assert error == pytest.approx(float(share), rel=1e-9)


def test_keeping_every_input_or_seeing_none_leaves_the_kept_weights_alone() -> None:
    weight = WEIGHT.float()
    assert torch.equal(refit(weight, MOMENT, torch.arange(INPUTS), RIDGE).weight, weight)
    unseen = refit(weight, torch.zeros_like(MOMENT), torch.tensor([1, 2]), RIDGE)
    assert torch.equal(unseen.weight[:, 1:3], weight[:, 1:3]) and unseen.weight[:, 3:].abs().max() == 0
    assert (unseen.plain_error, unseen.error) == (0, 0)


@pytest.mark.parametrize("rows_at_once", [1, 3, 128])
def test_inputs_are_dropped_where_the_refitted_error_rises_least(
    monkeypatch: pytest.MonkeyPatch, rows_at_once: int
) -> None:
    monkeypatch.setattr(least_squares, "ROWS_AT_ONCE", rows_at_once)
    kept = list(range(INPUTS))
    for size in range(INPUTS - 1, 3, -1):
        dropped = min(kept, key=lambda i: by_lstsq(WEIGHT, SEEN, [j for j in kept if j != i], RIDGE)[1])
        kept.remove(dropped)
        pools, keep = torch.zeros(INPUTS, dtype=torch.int64), torch.tensor([size])
        assert eliminate(WEIGHT, MOMENT, pools, keep, RIDGE).tolist() == kept


@pytest.mark.parametrize("rows_at_once", [1, 5, 128])
def test_blocks_are_dropped_whole_and_every_pool_keeps_its_number(
    monkeypatch: pytest.MonkeyPatch, rows_at_once: int
) -> None:
    monkeypatch.setattr(least_squares, "ROWS_AT_ONCE", rows_at_once)
    pools, keep = torch.tensor([0, 0, 1, 1, 2, 2]), torch.tensor([1, 2, 0])  # six blocks of two inputs
    blocks, left = list(range(6)), [2, 2, 2]
    while left != keep.tolist():
        free = [block for block in blocks if left[pools[block]] > keep[pools[block]]]

        def objective(gone: int) -> float:
            stay = [block for block in blocks if block != gone]
            inputs = list(itertools.chain.from_iterable((2 * block, 2 * block + 1) for block in stay))
            return by_lstsq(WEIGHT, SEEN, inputs, RIDGE)[1]

        gone = min(free, key=objective)
        blocks.remove(gone)
        left[pools[gone]] -= 1
    assert eliminate(WEIGHT, MOMENT, pools, keep, RIDGE).tolist() == blocks


def test_too_few_tokens_without_a_ridge_are_refused_with_the_mend() -> None:
    few = SEEN[:4].t() @ SEEN[:4]
    few[0] = few[:, 0] = 0  # an input that is never active
    with pytest.raises(ValueError, match=r"of its 9 inputs is not positive definite with ridge=0: .*Raise ridge"):
        refit(WEIGHT, few, torch.arange(9), 0.0)
    assert refit(WEIGHT, few, torch.arange(9), 1e-6).weight.isfinite().all()

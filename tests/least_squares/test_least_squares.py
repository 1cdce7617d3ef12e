"""Refitting a linear and choosing its inputs, against float64 lstsq on the inputs themselves, and of more inputs
against dropping one at a time."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from minitron_nemo.least_squares import elimination, ridge
from minitron_nemo.least_squares.fits import Refit, eliminate, eliminate_and_refit, refit
from support import one_by_one

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
    monkeypatch.setattr(elimination, "ROWS_AT_ONCE", rows_at_once)
    kept = list(range(INPUTS))
    for size in range(INPUTS - 1, 3, -1):
        dropped = min(kept, key=lambda i: by_lstsq(WEIGHT, SEEN, [j for j in kept if j != i], RIDGE)[1])
        kept.remove(dropped)
        pools, keep = torch.zeros(INPUTS, dtype=torch.int64), torch.tensor([size])
        assert eliminate(WEIGHT, MOMENT, pools, keep, RIDGE).tolist() == kept
        assert one_by_one.eliminate(WEIGHT, MOMENT, pools, keep, RIDGE).tolist() == kept


@pytest.mark.parametrize("rows_at_once", [1, 5, 128])
def test_blocks_are_dropped_whole_and_every_pool_keeps_its_number(
    monkeypatch: pytest.MonkeyPatch, rows_at_once: int
) -> None:
    monkeypatch.setattr(elimination, "ROWS_AT_ONCE", rows_at_once)
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
    assert one_by_one.eliminate(WEIGHT, MOMENT, pools, keep, RIDGE).tolist() == blocks


def test_too_few_tokens_without_a_ridge_are_refused_with_the_mend() -> None:
    few = SEEN[:4].t() @ SEEN[:4]
    few[0] = few[:, 0] = 0  # an input that is never active
    with pytest.raises(ValueError, match=r"of its 9 inputs is not positive definite with ridge=0: .*Raise ridge"):
        refit(WEIGHT, few, torch.arange(9), 0.0)
    with pytest.raises(ValueError, match=r"of its 12 inputs is not positive definite with ridge=0: .*Raise ridge"):
        eliminate(WEIGHT, few, torch.zeros(INPUTS, dtype=torch.int64), torch.tensor([5]), 0.0)
    assert refit(WEIGHT, few, torch.arange(9), 1e-6).weight.isfinite().all()


# ---- more inputs than a pool has, so that rounds and sure inputs take part -------------------------------------------

MANY, MANY_OUTPUTS = 396, 70
SPECTRA = {  # eigenvalues by number, spread of the inputs' sizes
    "power law": (lambda i: i**-1.0, 0.5),
    "steep": (lambda i: i**-2.0, 0.1),
    "six orders, sizes apart": (lambda i: 10 ** (-6 * i / MANY), 1.5),
    "six orders, all alike": (lambda i: 10 ** (-6 * i / MANY), 0.0),
    "copies": (lambda i: i**-1.0, 0.5),
}
ASKED = {  # pool of each block, blocks that each pool keeps
    "neurons": (torch.zeros(MANY, dtype=torch.int64), torch.tensor([250])),
    "few neurons": (torch.zeros(MANY, dtype=torch.int64), torch.tensor([90])),
    "most neurons": (torch.zeros(MANY, dtype=torch.int64), torch.tensor([372])),
    "neurons in pools": (torch.arange(3).repeat_interleave(MANY // 3), torch.tensor([80, 132, 20])),
    "heads": (torch.arange(11).repeat_interleave(4), torch.tensor([3, 3, 0, 4, 1, 3, 3, 2, 3, 3, 3])),
}


@functools.cache
def linear(spectrum: str) -> tuple[Tensor, Tensor]:
    """A weight [h, f] float32, and a moment [f, f] float64 whose inputs are correlated."""
    eigenvalue, spread = SPECTRA[spectrum]
    generator = torch.Generator().manual_seed(11)
    basis = torch.linalg.qr(torch.randn(MANY, MANY, generator=generator, dtype=torch.float64)).Q
    power = torch.tensor([eigenvalue(i) for i in range(1, MANY + 1)], dtype=torch.float64)
    size = (spread * torch.randn(MANY, generator=generator, dtype=torch.float64)).exp()
    moment = (basis * power) @ basis.t() * size * size.unsqueeze(1)
    if spectrum == "copies":  # of the largest, which each alone could go for nothing
        largest, others = moment.diagonal().argsort(descending=True).split([40, MANY - 40])
        moment[others[:40]] = moment[largest]
        moment[:, others[:40]] = moment[:, largest]
    return torch.randn(MANY_OUTPUTS, MANY, generator=generator), moment


@pytest.fixture
def small_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"POOL": 24, "POOL_BLOCKS": 12, "PANEL": 16}.items():
        monkeypatch.setattr(elimination, name, value)
    monkeypatch.setattr(ridge, "STRIP", 50)
    monkeypatch.setattr(elimination, "STRIP", 50)


def kept_columns(kept: Tensor, blocks: int) -> Tensor:
    width = MANY // blocks
    return (kept.unsqueeze(1) * width + torch.arange(width)).flatten()


@pytest.mark.usefixtures("small_rounds")
@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_what_is_kept_leaves_an_error_within_one_percent_of_dropping_one_at_a_time(spectrum: str, asked: str) -> None:
    (weight, moment), (pools, keep) = linear(spectrum), ASKED[asked]
    expected = one_by_one.eliminate(weight, moment, pools, keep, RIDGE)
    kept, found = eliminate_and_refit(weight, moment, pools, keep, RIDGE)
    assert torch.bincount(pools[kept], minlength=len(keep)).tolist() == keep.tolist()
    assert torch.equal(kept, kept.unique())
    assert torch.equal(kept, eliminate(weight, moment, pools, keep, RIDGE))  # also: the same again
    best = one_by_one.refit(weight, moment, kept_columns(expected, len(pools)), RIDGE)
    mine = one_by_one.refit(weight, moment, kept_columns(kept, len(pools)), RIDGE)
    assert objective(weight, moment, mine, RIDGE) <= 1.01 * objective(weight, moment, best, RIDGE)
    assert mine.error <= 1.02 * best.error  # without the ridge's part, which dropping one at a time does not minimise
    assert found.error == pytest.approx(mine.error, rel=1e-3, abs=1e-6)
    assert found.plain_error == pytest.approx(mine.plain_error, rel=1e-3)


@pytest.mark.usefixtures("small_rounds")
@pytest.mark.parametrize("asked", ["neurons", "few neurons", "heads"])
@pytest.mark.parametrize("spectrum", ["steep", "six orders, sizes apart"])
def test_the_refit_that_elimination_knows_is_the_least_squares_solution(spectrum: str, asked: str) -> None:
    (weight, moment), (pools, keep) = linear(spectrum), ASKED[asked]
    kept, found = eliminate_and_refit(weight.double(), moment, pools, keep, RIDGE)
    columns = kept_columns(kept, len(pools))
    for expected in (one_by_one.refit, refit):
        alone = expected(weight.double(), moment, columns, RIDGE)
        assert_close(found.weight, alone.weight, rtol=1e-8, atol=1e-8)
        assert (found.error, found.plain_error) == pytest.approx((alone.error, alone.plain_error), rel=1e-8)
    in_bfloat16 = eliminate_and_refit(weight.bfloat16(), moment, pools, keep, RIDGE)
    direct = one_by_one.refit(weight.bfloat16(), moment, kept_columns(in_bfloat16[0], len(pools)), RIDGE)
    assert in_bfloat16[1].weight.dtype == torch.bfloat16
    assert in_bfloat16[1].error == pytest.approx(direct.error, rel=1e-2)


@pytest.mark.usefixtures("small_rounds")
def test_float32_loses_next_to_nothing_at_the_least_ridge_it_is_trusted_with() -> None:
    for spectrum, (pools, keep) in itertools.product(SPECTRA, (ASKED["neurons"], ASKED["heads"])):
        weight, moment = linear(spectrum)
        kept, found = eliminate_and_refit(weight, moment, pools, keep, ridge.FLOAT32_FROM)
        columns = kept_columns(kept, len(pools))
        alone = refit(weight, moment, columns, ridge.FLOAT32_FROM)
        exact = one_by_one.refit(weight.double(), moment, columns, ridge.FLOAT32_FROM)
        for mine in (found, alone):
            least, reached = (objective(weight, moment, each, ridge.FLOAT32_FROM) for each in (exact, mine))
            assert reached == pytest.approx(least, rel=1e-4)


def objective(weight: Tensor, moment: Tensor, found: Refit, strength: float) -> float:
    """sum |W a - W' a|^2 + lambda |W - W'|^2."""
    off = weight.double() - found.weight.double()
    return float(((off @ moment) * off).sum() + strength * moment.diagonal().mean() * off.square().sum())


def test_what_float32_cannot_factor_float64_does(monkeypatch: pytest.MonkeyPatch) -> None:
    (weight, moment), (pools, keep) = linear("copies"), ASKED["neurons"]
    expected = one_by_one.eliminate(weight, moment, pools, keep, 1e-9)
    monkeypatch.setattr(ridge, "FLOAT32_FROM", 0)
    assert torch.equal(eliminate(weight, moment, pools, keep, 1e-9), expected)

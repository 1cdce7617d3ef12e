"""Kernels of the CPU beside float64 and beside torch's own operations, which a GPU uses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from minitron_nemo.activations.tokens import TokenMask
from minitron_nemo.importance import cpu_kernels, statistics
from minitron_nemo.importance.statistics import sums_of_tokens

Sums = Callable[[Tensor, TokenMask], Tensor]


def by_kernel(activation: Tensor, mask: TokenMask) -> Tensor:
    return cpu_kernels.sums_of_tokens(activation, mask.counts)


def by_torch(activation: Tensor, mask: TokenMask) -> Tensor:
    return sums_of_tokens(activation, mask.positions)


both = pytest.mark.parametrize("sums_of", [by_kernel, by_torch], ids=["kernel", "torch"])
TOKENS, BATCH, CHANNELS = 300, 3, 529  # blocks of 64 tokens and 44 more, a strip of 512 channels and 17 more


def activation(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(TOKENS, BATCH, CHANNELS, generator=torch.Generator().manual_seed(0)).to(dtype)


def mask_of_unequal_samples() -> TokenMask:
    """All tokens of the first sample, one of the second, none of the third."""
    counts = torch.zeros(BATCH, TOKENS, dtype=torch.bool)
    counts[0], counts[1, TOKENS // 2] = True, True
    return TokenMask.of(counts, counts.sum(1).double())


def sums_by_hand(activation: Tensor, mask: TokenMask) -> Tensor:
    samples = [activation[row, sample].double() for sample, row in enumerate(mask.counts)]
    return torch.stack([torch.stack([a.abs().sum(0), a.sum(0), a.square().sum(0)]) for a in samples], dim=1)


def variance(sums: Tensor, tokens: int) -> Tensor:
    return sums[2] / tokens - (sums[1] / tokens).square()


@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_sums_equal_float64(sums_of: Sums, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "BLOCK_ELEMENTS", 1)
    monkeypatch.setattr(statistics, "BLOCK_TOKENS", 64)
    act, mask = activation(dtype), mask_of_unequal_samples()
    everything = TokenMask.of(torch.ones(BATCH, TOKENS, dtype=torch.bool), torch.full((BATCH,), 300.0).double())
    close: dict[str, Any] = {"rtol": 2e-6, "atol": 5e-5}  # float32 over a block; sums of a cancel
    for tokens in (mask, everything):
        assert_close(sums_of(act, tokens), sums_by_hand(act, tokens), **close)
    halves = act[..., : CHANNELS // 2], act[..., CHANNELS // 2 :]  # not contiguous
    assert_close(torch.cat([sums_of(half, mask) for half in halves], dim=-1), sums_by_hand(act, mask), **close)
    assert sums_of(act[:0], TokenMask.of(mask.counts[:, :0], mask.num_tokens)).eq(0).all()


@both
@pytest.mark.parametrize("first_token", [300.01, 1e4])
def test_variance_survives_a_large_constant_part_and_an_outlier(sums_of: Sums, first_token: float) -> None:
    """Norm outputs have such channels; first tokens are such outliers."""
    act, mask = activation() * 0.01 + 300, mask_of_unequal_samples()
    act[0] = first_token
    expected = sums_by_hand(act, mask)
    sums = sums_of(act, mask)[:, 0]
    assert_close(variance(sums, TOKENS), variance(expected[:, 0], TOKENS), rtol=1e-4, atol=0)


@both
@pytest.mark.parametrize("broken", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("token", [0, 7, TOKENS // 2, TOKENS - 1])
def test_one_value_that_is_not_finite_shows_in_its_channel_alone(sums_of: Sums, broken: float, token: int) -> None:
    act, mask = activation(), mask_of_unequal_samples()
    act[token, 0, 11] = broken
    act[1:5, 1:] = broken  # of tokens that do not count
    finite = sums_of(act, mask).sum(0).isfinite()
    assert (~finite).nonzero().tolist() == [[0, 11]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_head_norms_equal_float64(dtype: torch.dtype) -> None:
    act = activation(dtype)[..., :528]
    norms = cpu_kernels.head_norms(act, heads=6)
    assert norms.dtype == torch.float32
    assert_close(norms.double(), act.double().unflatten(-1, (6, 88)).norm(dim=-1), rtol=1e-6, atol=0)
    for broken in (float("nan"), float("inf")):
        act[3, 1, 90] = broken
        assert (~cpu_kernels.head_norms(act, heads=6).isfinite()).nonzero().tolist() == [[3, 1, 1]]


def test_kernels_need_no_folder_that_can_be_written() -> None:
    names: dict[str, Any] = {}
    exec("def double(value):\n    return value * 2", names)  # no file of its own, so none beside it
    with pytest.raises(RuntimeError, match="cannot cache"):
        numba.njit(names["double"], cache=True)
    assert cpu_kernels._compiled()(names["double"])(3) == 6


def test_threads_change_no_digit(monkeypatch: pytest.MonkeyPatch) -> None:
    act, mask, threads = activation(), mask_of_unequal_samples(), torch.get_num_threads()
    expected = by_kernel(act, mask), cpu_kernels.head_norms(act, heads=23)
    monkeypatch.setattr(cpu_kernels, "PARALLEL_ELEMENTS", 1000)
    for more in (2, 5):
        torch.set_num_threads(more)
        try:
            actual = by_kernel(act, mask), cpu_kernels.head_norms(act, heads=23)
        finally:
            torch.set_num_threads(threads)
        assert torch.equal(actual[0], expected[0]) and torch.equal(actual[1], expected[1])

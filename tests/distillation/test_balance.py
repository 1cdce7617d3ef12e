"""Claims about the weight of the hidden losses."""

from __future__ import annotations

import math

import pytest
import torch

from minitron_nemo.config.distillation import HiddenStateConfig
from minitron_nemo.distillation.balance import Balance


def weights_over(config: HiddenStateConfig, steps: int, divergence: float = 6.0, hidden: float = 1.5) -> list[float]:
    balance, weights = Balance(config), []
    for _ in range(steps):
        weights.append(balance.hidden_weight().item())
        balance.end_step(torch.tensor(divergence).double(), torch.tensor(hidden).double())
    return weights


def test_alpha_is_the_ratio_of_the_step_before_and_none_in_the_first() -> None:
    assert weights_over(HiddenStateConfig(weight=0.5), 3) == [0.0, 2.0, 2.0]


def test_a_fixed_balance_weighs_from_the_first_step() -> None:
    assert weights_over(HiddenStateConfig(balance="fixed", weight=0.25), 3) == [0.25, 0.25, 0.25]


def test_the_weight_rises_and_falls_linearly() -> None:
    config = HiddenStateConfig(balance="fixed", weight=8.0, warmup_steps=2, decay_start=3, decay_steps=4)
    assert weights_over(config, 9) == [4.0, 8.0, 8.0, 8.0, 6.0, 4.0, 2.0, 0.0, 0.0]


@pytest.mark.parametrize(("divergence", "hidden"), [(math.nan, 1.0), (math.inf, 1.0), (1.0, 0.0), (1.0, math.nan)])
def test_a_step_without_a_finite_ratio_leaves_alpha_as_it_was(divergence: float, hidden: float) -> None:
    balance = Balance(HiddenStateConfig())
    balance.end_step(torch.tensor(3.0), torch.tensor(2.0))
    balance.end_step(torch.tensor(divergence), torch.tensor(hidden))
    assert balance.hidden_weight() == 1.5
    assert balance.steps == 2


def test_a_models_conversion_to_bf16_leaves_alpha_exact() -> None:
    balance = Balance(HiddenStateConfig())
    balance.end_step(torch.tensor(1.0).double(), torch.tensor(3.0).double())
    torch.nn.ModuleList([balance]).bfloat16()
    assert balance.hidden_weight() == 1 / 3

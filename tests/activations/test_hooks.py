"""A model that is looked at stays as it was."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from minitron_nemo.activations.hooks import evaluating, hooks_until_the_end, on_input, on_output


def test_every_module_gets_its_own_mode_back() -> None:
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Linear(2, 2), nn.Dropout()))
    model.train()[1].eval()
    with evaluating(model):
        assert not any(module.training for module in model.modules())
    assert model.training and model[0].training
    assert not any(module.training for module in model[1].modules())


def test_hooks_see_what_passes_and_are_gone_afterwards_also_where_an_error_ends_it() -> None:
    linear, seen = nn.Linear(2, 3), list[Tensor]()
    entering = torch.ones(1, 2)

    def look() -> None:
        with hooks_until_the_end() as handles:
            handles.append(linear.register_forward_pre_hook(on_input(seen.append)))
            handles.append(linear.register_forward_hook(on_output(seen.append)))
            linear(entering)
            raise RuntimeError("in between")

    with pytest.raises(RuntimeError, match="in between"):
        look()
    assert seen[0] is entering and torch.equal(seen[1], linear(entering))
    assert not linear._forward_hooks and not linear._forward_pre_hooks

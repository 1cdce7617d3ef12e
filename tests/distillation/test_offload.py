"""A teacher whose layers wait on the host answers as one that is on the device."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from minitron_nemo import platform
from minitron_nemo.distillation.offload import keep_on_host
from support.megatron import TINY, bare_model, build_gpt, run_gpt, start_alone


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_kept_on_the_host_answer_to_the_bit_and_leave_nothing_behind(dtype: torch.dtype) -> None:
    start_alone()
    device = platform.device()
    tokens = torch.arange(14).reshape(2, 7).to(device)
    expected = build_gpt(TINY, dtype=dtype).to(device)
    model = build_gpt(TINY, dtype=dtype).to(device).requires_grad_(False)
    layers = model.decoder.layers
    weights = sum(parameter.numel() for parameter in layers.parameters())
    keep_on_host(layers, dtype=dtype, device=device)
    seen: list[int] = []
    for layer in layers:
        layer.mlp.register_forward_hook(lambda *_: seen.append(sum(p.numel() for p in layers.parameters())))

    with torch.no_grad():
        for batch in (tokens, tokens + 9):  # the second finds the first layer on its way already
            assert torch.equal(_logits(model, batch), _logits(expected, batch))
    assert seen == [weights // len(layers)] * 2 * len(layers)  # one layer at a time holds its weights
    assert sum(parameter.numel() for parameter in layers.parameters()) == 0


def test_a_model_converted_after_it_moved_runs_in_the_type_it_was_told() -> None:
    """As Megatron's Float16Module converts a whole model once it is built."""
    start_alone()
    device = platform.device()
    model = bare_model(TINY).to(device).eval().requires_grad_(False)
    expected = bare_model(TINY, dtype=torch.bfloat16).to(device).eval()
    expected.load_state_dict(model.state_dict())
    keep_on_host(model.decoder.layers, dtype=torch.bfloat16, device=device)
    model.bfloat16()
    tokens = torch.arange(14).reshape(2, 7).to(device)
    with torch.no_grad():
        assert torch.equal(_logits(model, tokens), _logits(expected, tokens))


def _logits(model: torch.nn.Module, tokens: Tensor) -> Tensor:
    logits = run_gpt(model, tokens)
    assert logits is not None
    return logits

"""Routing of tokens to experts, where importance and pruning would hide the case."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from minitron_nemo.activations.hooks import hooks_until_the_end
from minitron_nemo.activations.routing import Routing
from minitron_nemo.activations.tokens import AnnouncedBatch, mark_tokens_over
from minitron_nemo.parallel import Groups
from support.megatron import TINY_EXPERTS, build_gpt, run_gpt

TOKENS = torch.randint(0, 66, (2, 8), generator=torch.Generator().manual_seed(7))


def routing_of(model: torch.nn.Module, current: AnnouncedBatch) -> Routing:
    return Routing(0, model.decoder.layers[0].mlp, Groups.from_megatron(), current, sequence_parallel=False)


def announced_batch() -> AnnouncedBatch:
    return AnnouncedBatch(call="Call announce", give="Announce")


def test_every_token_that_counts_is_seen_by_the_experts_it_is_routed_to() -> None:
    model, current, mask = build_gpt(TINY_EXPERTS), announced_batch(), torch.ones(2, 8)
    mask[0, 5:], mask[1] = 0, 0
    routing, seen, routed = routing_of(model, current), dict[int, Tensor](), list[Tensor]()

    def see(expert: int, neurons: Tensor, outputs: Tensor) -> None:
        seen[expert] = routing.counted(expert, len(neurons))

    with hooks_until_the_end() as handles, torch.no_grad():
        routing.show(see, handles)
        router = model.decoder.layers[0].mlp.router
        handles.append(router.register_forward_hook(lambda _, __, output: routed.append(output[1])))
        current.announce(mark_tokens_over(mask, groups=[]))
        run_gpt(model, TOKENS)
    counts = mask.t().flatten() != 0
    for expert, of_expert in enumerate(routed[0].bool().unbind(1)):
        assert seen[expert].tolist() == counts[of_expert].tolist(), expert


def test_a_forward_pass_that_was_not_announced_is_refused() -> None:
    model, current = build_gpt(TINY_EXPERTS), announced_batch()
    routing_of(model, current).show(lambda expert, neurons, outputs: None, [])
    message = r"decoder\.layers\.0\.mlp saw forward pass 1, but 0 micro-batches were announced. Call announce once"
    with pytest.raises(RuntimeError, match=message):
        run_gpt(model, TOKENS)
    current.announce(mark_tokens_over(torch.ones(2, 7), groups=[]))
    with pytest.raises(ValueError, match=r"routes 16 tokens, but the loss mask announced 14 on this rank. Announce"):
        run_gpt(model, TOKENS)

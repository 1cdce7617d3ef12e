"""Depth importance the slow way: models built without the layers, run whole; all states kept, loops in float64."""

from __future__ import annotations

from collections.abc import Collection

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor, nn

from minitron_nemo.shape import ModelShape

from .megatron import build_gpt, run_gpt


def without_layers(shape: ModelShape, gone: Collection[int]) -> GPTModel:
    model = build_gpt(shape)
    model.decoder.layers = nn.ModuleList(layer for index, layer in enumerate(model.decoder.layers) if index not in gone)
    return model


def whole_logits(model: GPTModel, tokens: Tensor) -> Tensor:
    """[samples, s, v] float64."""
    with torch.no_grad():
        logits = run_gpt(model, tokens)
    assert logits is not None
    return logits.double()


def all_states(model: GPTModel, tokens: Tensor) -> list[Tensor]:
    """x_0 .. x_L, each [samples, s, h] float64."""
    states: list[Tensor] = []
    handles = [
        layer.register_forward_pre_hook(
            lambda _module, _args, kwargs: states.append(kwargs["hidden_states"].transpose(0, 1).double()),
            with_kwargs=True,
        )
        for layer in model.decoder.layers
    ]
    handles.append(
        model.decoder.layers[-1].register_forward_hook(
            lambda _module, _args, output: states.append(output[0].transpose(0, 1).double())
        )
    )
    whole_logits(model, tokens)
    for handle in handles:
        handle.remove()
    return states


def block_influence_by_hand(model: GPTModel, tokens: Tensor, mask: Tensor) -> dict[int, Tensor]:
    """Block size n -> [L-n+1]."""
    states = all_states(model, tokens)
    num_layers = len(states) - 1
    influence = {}
    for size in range(1, num_layers):
        values = []
        for start in range(num_layers - size + 1):
            cosines = []
            for sample, row in enumerate(mask):
                for token in range(len(row)):
                    if row[token] != 0:
                        x, y = states[start][sample, token], states[start + size][sample, token]
                        cosines.append(float(x @ y / (x @ x).sqrt() / (y @ y).sqrt()))
            values.append(1 - sum(cosines) / len(cosines))
        influence[size] = torch.tensor(values)
    return influence


def costs_by_hand(full: Tensor, removed: Tensor, labels: Tensor, mask: Tensor, vocab_size: int) -> dict[str, float]:
    """loss, kl and squared_error of one removal from both models' logits [samples, s, v] float64."""
    counts = mask != 0

    def token_loss(logits: Tensor) -> Tensor:
        return -logits.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)

    real_full, real_removed = full[..., :vocab_size], removed[..., :vocab_size]
    log_p, log_q = real_full.log_softmax(-1), real_removed.log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    return {
        "loss": float((token_loss(real_removed) - token_loss(real_full))[counts].mean()),
        "kl": float(kl[counts].mean()),
        "squared_error": float((real_full - real_removed)[counts].square().sum() / real_full[counts].square().sum()),
    }

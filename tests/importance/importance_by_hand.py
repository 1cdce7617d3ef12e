"""Importance the slow way: every activation of one process kept, then for loops in float64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from minitron_nemo.shape import ModelShape
from support.megatron import run_gpt

PAIRS = [(batch, sequence) for batch in ("mean", "l2", "variance") for sequence in ("mean", "l2", "variance")]

Activations = list[dict[str, Tensor]]
"""One dict a sample: name of the place -> [s, ...] float64."""


def record_activations(model: Any, tokens: Tensor) -> Activations:
    """Run the model sample by sample and keep the inputs of both output linears and the outputs of all norms."""
    samples: Activations = []
    handles = []

    def keep_input(name: str) -> Any:
        return lambda _module, args: samples[-1].__setitem__(name, args[0][:, 0].double())

    def keep_output(name: str) -> Any:
        return lambda _module, _args, output: samples[-1].__setitem__(name, output[:, 0].double())

    for index, layer in enumerate(model.decoder.layers):
        handles += [
            layer.mlp.linear_fc2.register_forward_pre_hook(keep_input(f"{index}.ffn")),
            layer.self_attention.linear_proj.register_forward_pre_hook(keep_input(f"{index}.heads")),
            layer.input_layernorm.register_forward_hook(keep_output(f"{index}.norm0")),
            layer.pre_mlp_layernorm.register_forward_hook(keep_output(f"{index}.norm1")),
        ]
    with torch.no_grad():
        for sample in tokens:
            samples.append({})
            run_gpt(model, sample.unsqueeze(0))
    for handle in handles:
        handle.remove()
    return samples


def along_sequence(values: Tensor, how: str) -> float:
    """One number from one channel's tokens of a sample."""
    if how == "mean":
        return sum(abs(float(v)) for v in values) / len(values)
    if how == "l2":
        return sum(float(v) ** 2 for v in values) ** 0.5
    mean = sum(float(v) for v in values) / len(values)
    return sum((float(v) - mean) ** 2 for v in values) / len(values)


def over_samples(values: list[float], how: str) -> float:
    """One number from one channel's samples."""
    if how == "mean":
        return sum(values) / len(values)
    if how == "l2":
        return (sum(v**2 for v in values) / len(values)) ** 0.5
    mean = sum(values) / len(values)
    return sum((v - mean) ** 2 for v in values) / len(values)


def score(activations: list[Tensor], batch: str, sequence: str) -> Tensor:
    """[c] from one [tokens, c] a sample."""
    channels = activations[0].shape[-1]
    return torch.tensor(
        [over_samples([along_sequence(a[:, c], sequence) for a in activations], batch) for c in range(channels)]
    )


def importance_by_hand(
    model: nn.Module, shape: ModelShape, tokens: Tensor, mask: Tensor, *, head_norm: str = "before"
) -> dict[tuple[str, str, str], Tensor]:
    """(axis, batch aggregation, sequence aggregation) -> scores; tokens whose mask is 0 are cut out first."""
    samples = record_activations(model, tokens)
    kept = [{name: a[row != 0] for name, a in sample.items()} for sample, row in zip(samples, mask, strict=True)]
    layers, d = range(shape.num_layers), shape.kv_channels
    scores = {}
    for batch, sequence in PAIRS:

        def of(name: str, batch: str = batch, sequence: str = sequence) -> Tensor:
            return score([sample[name] for sample in kept], batch, sequence)

        heads = []
        for layer in layers:
            per_head = [
                [sample[f"{layer}.heads"][:, i * d : (i + 1) * d] for sample in kept]
                for i in range(shape.num_attention_heads)
            ]
            if head_norm == "before":
                norms = [[a.square().sum(-1, keepdim=True).sqrt() for a in of_samples] for of_samples in per_head]
                heads.append(torch.cat([score(of_samples, batch, sequence) for of_samples in norms]))
            else:
                channels = [score(of_samples, batch, sequence) for of_samples in per_head]
                heads.append(torch.stack([c.square().sum().sqrt() for c in channels]))
        head = torch.stack(heads)
        scores["ffn", batch, sequence] = torch.stack([of(f"{layer}.ffn") for layer in layers])
        scores["head", batch, sequence] = head
        per_group = shape.num_attention_heads // shape.num_query_groups
        scores["group", batch, sequence] = torch.stack(
            [head[:, g * per_group : (g + 1) * per_group].sum(1) for g in range(shape.num_query_groups)], dim=1
        )
        scores["hidden", batch, sequence] = sum(of(f"{layer}.norm{place}") for layer in layers for place in (0, 1))
    return scores

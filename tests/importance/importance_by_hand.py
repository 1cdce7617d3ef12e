"""Importance the slow way: every activation of one process kept, then for loops in float64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from minitron_nemo.shape import ModelShape
from support.megatron import run_gpt

PAIRS = [(batch, sequence) for batch in ("mean", "l2", "variance") for sequence in ("mean", "l2", "variance")]

Activations = list[dict[str, Tensor]]
"""One dict a sample: name of the place -> [s, ...] float64."""


def record_activations(model: Any, tokens: Tensor) -> Activations:
    """Run the model sample by sample and keep what goes into both output linears, what comes out of the first linear of
    the MLP (bias included), and what goes into and comes out of all norms."""
    samples: Activations = []
    handles = []

    def keep_input(name: str) -> Any:
        return lambda _module, args: samples[-1].__setitem__(name, args[0][:, 0].double())

    def keep_output(name: str) -> Any:
        return lambda _module, _args, output: samples[-1].__setitem__(name, output[:, 0].double())

    def keep_linear_output(name: str) -> Any:
        def hook(_module: Any, _args: Any, output: tuple[Tensor, Tensor | None]) -> None:
            value, bias = output
            samples[-1][name] = (value if bias is None else value + bias)[:, 0].double()

        return hook

    for index, layer in enumerate(model.decoder.layers):
        handles += [
            layer.mlp.linear_fc1.register_forward_hook(keep_linear_output(f"{index}.before")),
            layer.mlp.linear_fc2.register_forward_pre_hook(keep_input(f"{index}.ffn")),
            layer.self_attention.linear_proj.register_forward_pre_hook(keep_input(f"{index}.heads")),
            layer.input_layernorm.register_forward_pre_hook(keep_input(f"{index}.stream0")),
            layer.pre_mlp_layernorm.register_forward_pre_hook(keep_input(f"{index}.stream1")),
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


@torch.no_grad()
def importance_by_hand(
    model: Any,
    shape: ModelShape,
    tokens: Tensor,
    mask: Tensor,
    *,
    head_norm: str = "before",
    neurons: str = "post_activation",
    metric: str = "activations",
) -> dict[tuple[str, str, str], Tensor]:
    """(axis, batch aggregation, sequence aggregation) -> scores; tokens whose mask is 0 are cut out first."""
    samples = record_activations(model, tokens)
    kept = [{name: a[row != 0] for name, a in sample.items()} for sample, row in zip(samples, mask, strict=True)]
    layers, d, f = range(shape.num_layers), shape.kv_channels, shape.ffn_hidden_size
    contributions = metric == "contributions"
    scores = {}

    def neurons_of(layer: int, sample: dict[str, Tensor]) -> Tensor:
        if neurons == "pre_activation":
            return sample[f"{layer}.before"][:, :f]
        if contributions:  # each neuron's activation times the length of what it writes
            return sample[f"{layer}.ffn"] * model.decoder.layers[layer].mlp.linear_fc2.weight.double().norm(dim=0)
        return sample[f"{layer}.ffn"]

    def head_of(layer: int, sample: dict[str, Tensor], head: int) -> Tensor:
        columns = slice(head * d, (head + 1) * d)
        output = sample[f"{layer}.heads"][:, columns]
        if contributions:
            output = output @ model.decoder.layers[layer].self_attention.linear_proj.weight[:, columns].double().t()
        return output

    for batch, sequence in PAIRS:
        heads = []
        for layer in layers:
            per_head = [[head_of(layer, sample, i) for sample in kept] for i in range(shape.num_attention_heads)]
            if head_norm == "before":
                norms = [[a.square().sum(-1, keepdim=True).sqrt() for a in of_samples] for of_samples in per_head]
                heads.append(torch.cat([score(of_samples, batch, sequence) for of_samples in norms]))
            else:
                channels = [score(of_samples, batch, sequence) for of_samples in per_head]
                heads.append(torch.stack([c.square().sum().sqrt() for c in channels]))
        head = torch.stack(heads)
        scores["ffn", batch, sequence] = torch.stack(
            [score([neurons_of(layer, sample) for sample in kept], batch, sequence) for layer in layers]
        )
        scores["head", batch, sequence] = head
        per_group = shape.num_attention_heads // shape.num_query_groups
        scores["group", batch, sequence] = torch.stack(
            [head[:, g * per_group : (g + 1) * per_group].sum(1) for g in range(shape.num_query_groups)], dim=1
        )
        where = "stream" if contributions else "norm"
        scores["hidden", batch, sequence] = sum(
            score([sample[f"{layer}.{where}{place}"] for sample in kept], batch, sequence)
            for layer in layers
            for place in (0, 1)
        )
    return scores

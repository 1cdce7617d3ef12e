"""Activations as they are reckoned are those that autograd saves, to the byte, for the modules a CPU has."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from minitron_nemo.config.trainer import Batch, Layout, Recomputation
from minitron_nemo.shape import ModelShape
from minitron_nemo.sizing.activations import Flow, norm_bytes, of_layer, of_layers
from minitron_nemo.sizing.parts import Part
from support.ranks import Ranks

LLAMA = ModelShape(
    family="llama",
    num_layers=3,
    hidden_size=24,
    ffn_hidden_size=40,
    num_attention_heads=6,
    num_query_groups=2,
    kv_channels=4,
    padded_vocab_size=64,
    seq_length=32,
)
SHAPES = {
    "llama": LLAMA,
    "nemotron": dataclasses.replace(
        LLAMA,
        family="nemotron",
        normalization="LayerNorm1p",
        activation="squared_relu",
        gated_linear_unit=False,
        rotary_percent=0.5,
    ),
    "qwen3": dataclasses.replace(LLAMA, family="qwen3", qk_layernorm=True),
}
BATCH = Batch(micro_batch_size=3, seq_length=16)


def saved_bytes(shape: ModelShape, layout: Layout, dtype: torch.dtype, recompute: dict[str, Any]) -> list[int]:
    """What autograd keeps of the forward pass of each layer, then of the final norm; each storage once, no weights."""
    from minitron_nemo.nemo.models import build_core, nemo_config
    from minitron_nemo.runtime.layout import use_layout

    use_layout(layout, seed=1)
    precision = {"params_dtype": dtype, "pipeline_dtype": dtype, "bf16": dtype == torch.bfloat16}
    core = build_core(nemo_config(shape, **layout.of_model, **precision, **recompute), shape).to(dtype).train()
    weights = {parameter.untyped_storage().data_ptr() for parameter in core.parameters()}
    seen: dict[int, torch.Tensor] = {}  # held: a storage that is let go may be another one's next
    found = [0] * (shape.num_layers + 1)
    place = [-1]

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if place[0] >= 0 and storage.data_ptr() not in weights and storage.data_ptr() not in seen:
            seen[storage.data_ptr()] = tensor
            found[place[0]] += storage.nbytes()
        return tensor

    modules = [*core.decoder.layers, core.decoder.final_layernorm]
    for number, module in enumerate(modules):
        module.register_forward_pre_hook(lambda *_, number=number: place.__setitem__(0, number))
    core.output_layer.register_forward_hook(lambda *_: place.__setitem__(0, -1))  # it reads what the final norm gives
    tokens = torch.randint(0, shape.padded_vocab_size, (BATCH.micro_batch_size, BATCH.seq_length))
    positions = torch.arange(BATCH.seq_length).expand_as(tokens)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        core(tokens, positions, None, labels=tokens)
    return found


def flow_of(layout: Layout, element: int) -> Flow:
    return Flow.of(layout, BATCH, element=element, fused=False)


@pytest.mark.parametrize("family", SHAPES)
@pytest.mark.parametrize(
    ("world", "layout"),
    [
        ("single", Layout()),
        ("tp2", Layout(tensor_model_parallel_size=2)),
        ("tp2", Layout(tensor_model_parallel_size=2, sequence_parallel=True)),
    ],
    ids=["one rank", "tp2", "tp2 and sequence parallel"],
)
def test_a_layer_leaves_behind_what_autograd_saves(ranks: Ranks, family: str, world: str, layout: Layout) -> None:
    shape = SHAPES[family]
    part, flow = Part(shape, layout, 0), flow_of(layout, 4)
    expected = [of_layer(part, flow, experts=False).total] * shape.num_layers + [norm_bytes(part, flow)]
    for found in ranks(world).run(saved_bytes, shape, layout, torch.float32, {}):
        assert found == expected


def test_norms_are_in_float32_where_the_model_is_not(ranks: Ranks) -> None:
    part, flow = Part(LLAMA, Layout(), 0), flow_of(Layout(), 2)
    (found,) = ranks("single").run(saved_bytes, LLAMA, Layout(), torch.bfloat16, {})
    assert found == [of_layer(part, flow, experts=False).total] * LLAMA.num_layers + [norm_bytes(part, flow)]


@pytest.mark.parametrize(("method", "number"), [("uniform", 1), ("uniform", 3), ("block", 2)])
def test_recomputed_layers_leave_their_input(ranks: Ranks, method: str, number: int) -> None:
    recompute = {"recompute_granularity": "full", "recompute_method": method, "recompute_num_layers": number}
    kept, again = of_layers(Part(LLAMA, Layout(), 0), flow_of(Layout(), 4), Recomputation(**recompute))
    (found,) = ranks("single").run(saved_bytes, LLAMA, Layout(), torch.float32, recompute)
    assert sum(found[:-1]) == kept
    assert again > 0

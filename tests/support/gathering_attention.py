"""A Megatron-core GPT model that runs under context parallelism without transformer-engine.

Megatron-core's own attention refuses context parallelism; `GatheringAttention` stands in its place in the layer spec:
it gathers keys and values over the group and masks by the tokens' true positions.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor, nn

from minitron_nemo.layer_spec import plain_block_spec
from minitron_nemo.parallel import Groups
from minitron_nemo.shape import ModelShape
from minitron_nemo.text.documents import indices_on_rank
from minitron_nemo.weights import load_full_parameters

from .megatron import random_parameter, transformer_config


class GatheringAttention(nn.Module):
    """Causal attention of [s/cp, b, heads, d] queries over the keys of every rank."""

    def __init__(self, config: Any, layer_number: int, **_: Any) -> None:
        super().__init__()
        self.scale = config.kv_channels**-0.5

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, *_: Any, packed_seq_params: Any = None, **__: Any
    ) -> Tensor:
        group = parallel_state.get_context_parallel_group()
        length = len(query) * group.size()
        boundaries = torch.tensor([0, length])
        if packed_seq_params is not None:  # documents of one sample; no batch dimension
            boundaries = packed_seq_params.cu_seqlens_q
            query, key, value = (tensor.unsqueeze(1) for tensor in (query, key, value))
        keys, values = (gather_from_sequence_parallel_region(x, group=group) for x in (key, value))
        positions = [indices_on_rank(boundaries, rank, group.size()) for rank in range(group.size())]
        mine, all_positions = positions[group.rank()], torch.cat(positions)
        document = torch.bucketize(torch.arange(length), boundaries, right=True)
        others = document[all_positions][None, :] != document[mine][:, None]
        hidden = others | (all_positions[None, :] > mine[:, None])
        repeat = query.shape[2] // keys.shape[2]
        keys, values = keys.repeat_interleave(repeat, dim=2), values.repeat_interleave(repeat, dim=2)
        logits = torch.einsum("qbnd,kbnd->bnqk", query, keys) * self.scale
        logits = logits.masked_fill(hidden, float("-inf"))
        return torch.einsum("bnqk,kbnd->qbnd", logits.softmax(-1), values).flatten(2)


def positions_on(rank: int, size: int, length: int) -> Tensor:
    """Positions of a context-parallel rank's `length` tokens of a sample that is one document."""
    return indices_on_rank(torch.tensor([0, length * size]), rank, size)


def build_context_parallel_gpt(shape: ModelShape, *, seed: int = 0, **overrides: Any) -> GPTModel:
    """As `support.megatron.build_gpt`, with `GatheringAttention`."""
    config = transformer_config(shape, **overrides)
    spec = plain_block_spec(config)
    for layer in spec.layer_specs:
        layer.submodules.self_attention.submodules.core_attention = GatheringAttention
    model = GPTModel(
        config,
        spec,
        vocab_size=shape.padded_vocab_size,
        max_sequence_length=shape.seq_length,
        share_embeddings_and_output_weights=shape.share_embeddings_and_output_weights,
        position_embedding_type="rope",
        rotary_percent=shape.rotary_percent,
        rotary_base=shape.rotary_base,
    )
    load_full_parameters(model, shape, Groups.from_megatron(), lambda name: random_parameter(name, shape, seed=seed))
    return model.eval()

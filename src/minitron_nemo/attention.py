"""Causal self-attention without transformer-engine, on torch's fused scaled_dot_product_attention.

Megatron-core's local spec writes out the [b, n, s, s] scores, casts them to float32 and back, and keeps them for the
backward pass; on a CPU that is half of a training step. This is the same function with nothing of that size.

    query            [s, b, n/tp, d]
    key, value       [s, b, g/tp, d]
    context          [s, b, (n/tp) * d]

While text is generated the query is one token, and keys and values are those of all before it too, from a cache.

Of several documents in one sample (`PackedSeqParams`, layout thd) the b is missing, and each attends to itself alone.

Communication: none; heads are split over tp and every rank holds the whole sequence.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.dot_product_attention import DotProductAttention
from torch import Tensor


class FusedCausalAttention(DotProductAttention):
    """Drop-in core attention for causal models without dropout; has no parameters."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        assert attention_bias is None
        if packed_seq_params is not None:
            lengths = packed_seq_params.cu_seqlens_q.diff().tolist()
            documents = zip(*(tensor.unsqueeze(1).split(lengths) for tensor in (query, key, value)), strict=True)
            return torch.cat([self._attend(*document) for document in documents]).squeeze(1)
        return self._attend(query, key, value)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        is_causal = len(query) == len(key)
        assert is_causal or len(query) == 1, "a cache is read a token at a time"
        query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))  # [b, heads, s, d]
        context = F.scaled_dot_product_attention(
            query, key, value, is_causal=is_causal, scale=self.softmax_scale, enable_gqa=query.shape[1] != key.shape[1]
        )
        return context.permute(2, 0, 1, 3).flatten(2)

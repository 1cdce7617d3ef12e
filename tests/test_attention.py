"""The fused attention of machines without transformer-engine, against Megatron-core's own, written out."""

from __future__ import annotations

import pytest
import torch
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from minitron_nemo.attention import FusedCausalAttention
from minitron_nemo.shape import ModelShape
from support.megatron import TINY, causal_mask, smaller, start_alone, transformer_config

SEQUENCE, BATCH = 11, 3
# float32: two orders of summation. bf16: 8 bits of mantissa in scores, probabilities and context of order 1.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}


def run(attention: type[DotProductAttention], shape: ModelShape, dtype: torch.dtype) -> dict[str, Tensor]:
    """Context [s, b, n * d] and the gradients of query, key and value, for inputs that depend on the shape alone."""
    start_alone()
    config = transformer_config(shape, dtype=dtype, attention_softmax_in_fp32=True)
    core = attention(config, layer_number=3, attn_mask_type=AttnMaskType.causal, attention_type="self")
    assert not list(core.parameters())
    generator = torch.Generator().manual_seed(0)
    sizes = {"query": shape.num_attention_heads, "key": shape.num_query_groups, "value": shape.num_query_groups}
    inputs = {
        name: torch.randn(SEQUENCE, BATCH, heads, shape.kv_channels, generator=generator).to(dtype).requires_grad_()
        for name, heads in sizes.items()
    }
    context = core(*inputs.values(), attention_mask=causal_mask(SEQUENCE), attn_mask_type=AttnMaskType.causal)
    context.backward(torch.randn(context.shape, generator=generator).to(dtype))
    gradients: dict[str, Tensor] = {}
    for name, tensor in inputs.items():
        assert tensor.grad is not None
        gradients[f"gradient of {name}"] = tensor.grad
    return {"context": context.detach()} | gradients


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("groups", [1, 2, 6])
def test_context_and_gradients_are_those_of_megatron(groups: int, dtype: torch.dtype) -> None:
    """One group is multi-query attention, two are grouped queries, six are plain heads."""
    shape = smaller(TINY, num_query_groups=groups)
    expected = run(DotProductAttention, shape, torch.float32)
    for name, found in run(FusedCausalAttention, shape, dtype).items():
        assert found.dtype is dtype
        # relative to the largest: a gradient sums over the sequence and over the heads of a group
        limit = TOLERANCE[dtype] * max(1.0, float(expected[name].abs().max()))
        torch.testing.assert_close(found.float(), expected[name], rtol=0, atol=limit, msg=lambda text, n=name: n + text)


def test_no_position_sees_a_later_one() -> None:
    start_alone()
    config = transformer_config(TINY)
    core = FusedCausalAttention(config, layer_number=1, attn_mask_type=AttnMaskType.causal, attention_type="self")
    query = torch.randn(SEQUENCE, BATCH, TINY.num_attention_heads, TINY.kv_channels)
    key, value = torch.randn(2, SEQUENCE, BATCH, TINY.num_query_groups, TINY.kv_channels)
    before = core(query, key, value, None)
    key[7:], value[7:] = 5.0, -3.0
    after = core(query, key, value, None)
    assert torch.equal(before[:7], after[:7])
    assert not torch.equal(before[7:], after[7:])

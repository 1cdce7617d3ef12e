"""Bytes of activations on one rank: what a micro-batch leaves behind for the backward pass, and what it needs.

    residual stream, norms     [s/cp, b, h], over tp too with sequence parallelism
    queries, keys, values      [s/cp, b, (n + 2g)/tp x d]
    neurons                    [s/cp, b, f/tp], twice where gated
    of experts                 tokens x top k of them, as many on every rank: a balanced router is assumed

Counted is what autograd saves, tensor by tensor, with attention in one kernel (nothing of size s x s). There are two
sets of modules: transformer-engine's (`fused`), counted from its and Megatron-core's sources, and Megatron-core's own
without it, which tests/sizing/test_activations.py holds to what autograd saves there, to the byte.
Compare arXiv:2205.05198, which counts the same for an older layer: GELU, dropout, unfused attention.
"""

from __future__ import annotations

from dataclasses import dataclass

from minitron_nemo.config.trainer import Batch, Layout, Recomputation
from minitron_nemo.sizing.parts import Part

FLOAT32 = 4


@dataclass(frozen=True)
class Flow:
    """The tokens of a micro-batch as a rank sees them, and in which numbers."""

    tokens: int
    """b x s/cp"""
    local_tokens: int
    """Where sequence parallelism splits the residual stream: b x s/(cp x tp)."""
    seq_length: int
    """s/cp"""
    element: int
    """Bytes of a number: 2 in bf16, 4 in fp32."""
    fused: bool
    """As `Machine.fused`."""

    @classmethod
    def of(cls, layout: Layout, batch: Batch, *, element: int, fused: bool) -> Flow:
        length = batch.seq_length // layout.context_parallel_size
        tokens = batch.micro_batch_size * length
        over = layout.tensor_model_parallel_size if layout.sequence_parallel else 1
        return cls(tokens, tokens // over, length, element, fused)

    def stream(self, part: Part) -> int:
        """The residual stream, and whatever else is [s, b, h]."""
        return self.local_tokens * part.hidden_size * self.element


@dataclass(frozen=True)
class OfLayer:
    """What one layer leaves behind, in bytes, by what can be formed again alone."""

    norms: int
    attention: int
    attention_sums: int
    """Of the softmax, one a head and token; its output and inputs are kept by others."""
    mlp: int

    @property
    def total(self) -> int:
        return self.norms + self.attention + self.attention_sums + self.mlp


def norm_bytes(part: Part, flow: Flow) -> int:
    """Of one norm: its input, its output, which the next product reads, and its statistics."""
    channels = part.hidden_size
    statistics = 1 if part.normalization == "RMSNorm" else 2
    kept = 2 * channels * flow.element + statistics * FLOAT32
    if not flow.fused and part.normalization == "RMSNorm":
        kept = channels * (2 * FLOAT32 + flow.element) + FLOAT32  # input and normalised input in float32, output
    stored_less_one = part.normalization == "LayerNorm1p" and not flow.fused  # then gamma itself is formed, and kept
    return flow.local_tokens * kept + (channels * flow.element if stored_less_one else 0)


def of_layer(part: Part, flow: Flow, *, experts: bool) -> OfLayer:
    heads, groups, channels = part.num_attention_heads, part.num_query_groups, part.kv_channels
    # Keys and queries turned, the fused product that values are a view of, and attention's output, which the output
    # projection reads too.
    attention = flow.tokens * channels * ((heads + groups) + (heads + 2 * groups) + heads) * flow.element
    if part.qk_layernorm:
        numbers = (heads + groups) * channels
        kept = numbers * flow.element
        if not flow.fused:
            # In float32: what goes in, where it is no view of the product that is kept anyway, and what comes out.
            copied = heads * channels if groups > 1 else 0
            kept = FLOAT32 * (numbers + (copied if flow.element == FLOAT32 else numbers))
        attention += flow.tokens * (kept + (heads + groups) * FLOAT32)
    if not flow.fused:
        attention += 4 * flow.seq_length * _rotated(part) * flow.element  # cos and sin, of queries and of keys
    return OfLayer(
        norms=2 * norm_bytes(part, flow),
        attention=attention,
        attention_sums=flow.tokens * heads * FLOAT32,
        mlp=_of_experts(part, flow) if experts else flow.tokens * _neurons(part, flow) * part.ffn_hidden_size,
    )


def _rotated(part: Part) -> int:
    """Channels of a head that the rotary embedding turns."""
    return int(part.kv_channels * part.whole.rotary_percent)


def _neurons(part: Part, flow: Flow) -> int:
    """Bytes a token and neuron: what the activation and the product after it read. Without fusion a gate's activation
    and its partner, to which an offset is added, are kept too."""
    gated = 3 if flow.fused else 5
    return (gated if part.gated_linear_unit else 2) * flow.element


def _of_experts(part: Part, flow: Flow) -> int:
    """Tokens as they are sent to experts, their neurons, the router's scores."""
    experts, top_k, neurons = part.whole.num_moe_experts, part.moe_router_topk, part.moe_ffn_hidden_size
    assert experts is not None and top_k is not None and neurons is not None
    routed = flow.tokens * top_k * (part.hidden_size * flow.element + _neurons(part, flow) * neurons)
    shared = flow.tokens * _neurons(part, flow) * (part.moe_shared_expert_intermediate_size or 0)
    return routed + shared + flow.local_tokens * experts * 2 * FLOAT32


def of_layers(part: Part, flow: Flow, recomputation: Recomputation | None = None) -> tuple[int, int]:
    """Of all layers here: bytes left behind, and of these layers' what is formed again at once in the backward pass."""
    layers = [of_layer(part, flow, experts=part.whole.has_experts(layer)) for layer in part.layers]
    if recomputation is None or recomputation.recompute_granularity is None:
        return sum(layer.total for layer in layers), 0
    largest = max(layers, key=lambda layer: layer.total)
    if recomputation.recompute_granularity == "full":
        number, entry = recomputation.recompute_num_layers, flow.stream(part)
        angles = flow.seq_length * _rotated(part) * FLOAT32  # of the rotary embedding, an input of all
        if recomputation.recompute_method == "uniform":
            return angles + -(-len(layers) // number) * entry, number * largest.total
        return angles + number * entry + sum(layer.total for layer in layers[number:]), largest.total
    kept, again = 0, [0]
    for number, layer in enumerate(layers):
        dropped = dropped_of_layer(layer, recomputation, experts=part.whole.has_experts(part.layers[number]), flow=flow)
        kept += layer.total - dropped
        again.append(dropped)
    return kept, max(again)


def dropped_of_layer(layer: OfLayer, recomputation: Recomputation, *, experts: bool, flow: Flow) -> int:
    """Bytes that selective recomputation does not keep. With transformer-engine a norm is part of the product after it,
    and is not formed again by itself."""
    modules = set(recomputation.recompute_modules)
    dropped = layer.attention_sums if "core_attn" in modules else 0
    if ("moe" if experts else "mlp") in modules:
        dropped += layer.mlp
    if "layernorm" in modules and not flow.fused:
        dropped += layer.norms // 2
    return dropped


def at_work_forward(part: Part, flow: Flow) -> int:
    """The most that a pass without a backward one holds of a layer at once: the stream and its norm, and neurons, or
    queries, keys and values before and after they are turned."""
    neurons = max((_neurons(part, flow) * size for size in _sizes(part)), default=0)
    attention = (part.qkv_projection_size + 2 * part.query_projection_size) * flow.element
    return 2 * flow.stream(part) + flow.tokens * max(neurons, attention)


def at_work_backward(part: Part, flow: Flow) -> int:
    """Gradients of a layer's activations that stand at once: of the neurons, before and after the activation, and of
    the stream."""
    halves = 3 if part.gated_linear_unit else 2
    neurons = max((halves * size * flow.element for size in _sizes(part)), default=0)
    return 2 * flow.stream(part) + flow.tokens * neurons


def _sizes(part: Part) -> list[int]:
    """Neurons a token meets in a layer of each kind."""
    found = [part.ffn_hidden_size] if part.num_expert_layers < part.num_layers else []
    if part.num_expert_layers and part.moe_ffn_hidden_size and part.moe_router_topk:
        found.append(part.moe_ffn_hidden_size * part.moe_router_topk + (part.moe_shared_expert_intermediate_size or 0))
    return found

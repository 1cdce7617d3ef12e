"""A shape's layers on Megatron-core: their sizes, how many a pipeline stage has, and of what they are made.

    with transformer-engine     NeMo's own spec, which makes every layer alike; where only some have experts,
                                `FUSED_BLOCK_SPEC`
    without                     `plain_block_spec`

The latter is Megatron-core's local spec with a norm that fits every model. Megatron-core's own stand-in for the fused
norms refuses sequence parallelism and LayerNorm1p (gamma stored minus one); `PlainNorm` takes both, under the same
parameter names.

    hidden_states   [s/tp where sequence-parallel, b, h]   any float dtype

Communication: none; Megatron-core sums the norms' gradients over tp where they are marked `sequence_parallel`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_layer_local_spec
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor, nn

from minitron_nemo import platform
from minitron_nemo.attention import FusedCausalAttention
from minitron_nemo.places import NORMS_OF_LAYER, PRE_MLP_NORM
from minitron_nemo.shape import ModelShape

if not hasattr(moe_utils, "te_general_gemm"):
    moe_utils.te_general_gemm = None  # the router asks whether it is None, yet only transformer-engine defines it


def squared_relu(x: Tensor) -> Tensor:
    return F.relu(x).pow(2)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "gelu": F.gelu, "squared_relu": squared_relu}


def transformer_fields(shape: ModelShape, *, plain: bool = False) -> dict[str, Any]:
    """Fields of Megatron's TransformerConfig that the shape decides; nothing is dropped out.

    Args:
        plain: for plain torch modules, also on a machine with transformer-engine.
    """
    fields = {
        "num_layers": shape.num_layers,
        "hidden_size": shape.hidden_size,
        "ffn_hidden_size": shape.ffn_hidden_size,
        "num_attention_heads": shape.num_attention_heads,
        "num_query_groups": shape.num_query_groups,
        "kv_channels": shape.kv_channels,
        "normalization": "RMSNorm" if shape.normalization == "RMSNorm" else "LayerNorm",
        "layernorm_zero_centered_gamma": shape.normalization == "LayerNorm1p",
        "layernorm_epsilon": shape.layernorm_epsilon,
        "activation_func": ACTIVATIONS[shape.activation],
        "gated_linear_unit": shape.gated_linear_unit,
        "add_bias_linear": shape.add_bias_linear,
        "add_qkv_bias": shape.add_qkv_bias,
        "qk_layernorm": shape.qk_layernorm,
        "init_method_std": shape.init_method_std,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
    }
    return fields if shape.num_moe_experts is None else fields | _expert_fields(shape, plain=plain)


def _expert_fields(shape: ModelShape, *, plain: bool) -> dict[str, Any]:
    """Those of a mixture that routes as the family does in transformers: softmax, top k, no token dropped."""
    fused = platform.has_transformer_engine() and not plain
    return {
        "num_moe_experts": shape.num_moe_experts,
        "moe_ffn_hidden_size": shape.moe_ffn_hidden_size,
        "moe_shared_expert_intermediate_size": shape.moe_shared_expert_intermediate_size,
        "moe_router_topk": shape.moe_router_topk,
        "moe_router_pre_softmax": shape.moe_router_pre_softmax,
        "moe_router_score_function": "softmax",
        "moe_layer_freq": 1 if shape.moe_layer_freq is None else list(shape.moe_layer_freq),
        "moe_expert_capacity_factor": None,
        "moe_grouped_gemm": fused,
        "moe_permute_fusion": fused,
        # Megatron-core's all-to-all hands torch sizes as tensors, which only NCCL's path turns into numbers
        "moe_token_dispatcher_type": "alltoall" if platform.has_accelerator() else "allgather",
    }


class PlainNorm(nn.Module):
    """RMSNorm or LayerNorm over the last dim, as the config says; `weight` [h], and `bias` [h] for LayerNorm."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: object) -> None:
        super().__init__()
        self.eps = eps
        self.rms = config.normalization == "RMSNorm"
        self.gamma_offset = 1.0 if config.layernorm_zero_centered_gamma else 0.0
        self.weight = nn.Parameter(torch.full((hidden_size,), 1.0 - self.gamma_offset, dtype=config.params_dtype))
        self.bias = None if self.rms else nn.Parameter(torch.zeros(hidden_size, dtype=config.params_dtype))
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden_states: Tensor) -> Tensor:
        gamma = self.weight + self.gamma_offset if self.gamma_offset else self.weight
        if self.rms:
            return F.rms_norm(hidden_states, gamma.shape, gamma, self.eps)
        return F.layer_norm(hidden_states, gamma.shape, gamma, self.bias, self.eps)


def uneven_stages(num_layers: int, stages: int) -> dict[str, int]:
    """TransformerConfig's fields that split `num_layers` over `stages` pipeline stages; none where they divide evenly.

    Megatron-core lets the first and the last stage differ from the equal ones between them; of such splits, the one
    whose largest stage is smallest, then the one with the fullest middle, as the ends also hold embedding and output.
    """
    assert 1 <= stages <= num_layers
    if num_layers % stages == 0:
        return {}
    between = stages - 2
    splits = []
    for middle in range(1, num_layers // between + 1) if between else (0,):
        ends = num_layers - middle * between
        if ends >= 2:
            splits.append((max(middle, ends - ends // 2), -middle, ends - ends // 2, ends // 2))
    _, _, first, last = min(splits)
    return {"num_layers_in_first_pipeline_stage": first, "num_layers_in_last_pipeline_stage": last}


def layers_by_stage(num_layers: int, stages: int) -> list[int]:
    """Layers of each pipeline stage, in their order."""
    ends = list(uneven_stages(num_layers, stages).values())
    between = stages - len(ends)
    middle = [(num_layers - sum(ends)) // between] * between if between else []
    return [*ends[:1], *middle, *ends[1:]]


FUSED_BLOCK_SPEC = partial(get_gpt_decoder_block_spec, use_transformer_engine=True)
"""This pipeline stage's layers in transformer-engine's modules, with experts where the config's moe_layer_freq says; a
`partial` of a function that every installation has, so that a NeMo context can name it."""


def plain_block_spec(config: TransformerConfig, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """This pipeline stage's layers in Megatron-core's own modules, every norm a `PlainNorm`; experts one by one."""
    first = get_transformer_layer_offset(config, vp_stage=vp_stage)
    layers = range(first, first + get_num_layers_to_build(config, vp_stage=vp_stage))
    frequency = config.moe_layer_freq
    if isinstance(frequency, int):
        frequency = [int(layer % frequency == 0) for layer in range(config.num_layers)]
    dense = _layer_spec(config, experts=None)
    expert = _layer_spec(config, experts=config.num_moe_experts)
    return TransformerBlockSubmodules(
        layer_specs=[expert if frequency[layer] else dense for layer in layers], layer_norm=PlainNorm
    )


def _layer_spec(config: TransformerConfig, *, experts: int | None) -> ModuleSpec:
    layer = get_gpt_layer_local_spec(
        num_experts=experts, normalization=config.normalization, qk_layernorm=config.qk_layernorm
    )
    if experts is not None:
        # a checkpoint's names are those of transformer-engine's layers, which keep an expert layer's second norm apart
        layer.submodules.sharded_state_dict_keys_map = {
            ours: theirs
            for ours, theirs in layer.submodules.sharded_state_dict_keys_map.items()
            if not ours.startswith(PRE_MLP_NORM.name)
        }
    layer.submodules.self_attention.submodules.core_attention = FusedCausalAttention
    for norm in NORMS_OF_LAYER:
        setattr(layer.submodules, norm.name, PlainNorm)
    if config.qk_layernorm:
        layer.submodules.self_attention.submodules.q_layernorm = PlainNorm
        layer.submodules.self_attention.submodules.k_layernorm = PlainNorm
    return layer

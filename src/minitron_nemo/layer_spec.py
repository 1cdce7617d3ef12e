"""The layers of a pipeline stage: how many, and of what they are made on a machine without transformer-engine.

The latter is Megatron-core's local spec with a norm that fits every model. Megatron-core's own stand-in for the fused
norms refuses sequence parallelism and LayerNorm1p (gamma stored minus one); `PlainNorm` takes both, under the same
parameter names.

    hidden_states   [s/tp where sequence-parallel, b, h]   any float dtype

Communication: none; Megatron-core sums the norms' gradients over tp where they are marked `sequence_parallel`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor, nn

from minitron_nemo.attention import FusedCausalAttention

if not hasattr(moe_utils, "te_general_gemm"):
    moe_utils.te_general_gemm = None  # the router asks whether it is None, yet only transformer-engine defines it


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
            if not ours.startswith("pre_mlp_layernorm")
        }
    layer.submodules.self_attention.submodules.core_attention = FusedCausalAttention
    layer.submodules.input_layernorm = PlainNorm
    layer.submodules.pre_mlp_layernorm = PlainNorm
    if config.qk_layernorm:
        layer.submodules.self_attention.submodules.q_layernorm = PlainNorm
        layer.submodules.self_attention.submodules.k_layernorm = PlainNorm
    return layer

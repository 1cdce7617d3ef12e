"""The layer spec of a machine without transformer-engine: Megatron-core's local spec with a norm that fits every model.

Megatron-core's own stand-in for the fused norms refuses sequence parallelism and LayerNorm1p (gamma stored minus one);
`PlainNorm` takes both, under the same parameter names.

    hidden_states   [s/tp where sequence-parallel, b, h]   any float dtype

Communication: none; Megatron-core sums the norms' gradients over tp where they are marked `sequence_parallel`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from minitron_nemo.attention import FusedCausalAttention


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


def plain_block_spec(config: TransformerConfig, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """This pipeline stage's layers in Megatron-core's own modules, every norm a `PlainNorm`."""
    layer = get_gpt_layer_local_spec(normalization=config.normalization, qk_layernorm=config.qk_layernorm)
    layer.submodules.self_attention.submodules.core_attention = FusedCausalAttention
    layer.submodules.input_layernorm = PlainNorm
    layer.submodules.pre_mlp_layernorm = PlainNorm
    if config.qk_layernorm:
        layer.submodules.self_attention.submodules.q_layernorm = PlainNorm
        layer.submodules.self_attention.submodules.k_layernorm = PlainNorm
    return TransformerBlockSubmodules(
        layer_specs=[layer] * get_num_layers_to_build(config, vp_stage=vp_stage), layer_norm=PlainNorm
    )

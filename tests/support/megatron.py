"""Tiny real Megatron-core GPT models from a ModelShape, with the same weights on every layout."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from minitron_nemo import platform
from minitron_nemo.axes import full_shape
from minitron_nemo.layer_spec import plain_block_spec, transformer_fields, uneven_stages
from minitron_nemo.parallel import Groups
from minitron_nemo.rope import apply_rope_scaling
from minitron_nemo.shape import ModelShape
from minitron_nemo.weights import load_full_parameters

from .ranks import current_layout

TINY = ModelShape(
    family="llama",
    num_layers=4,
    hidden_size=24,
    ffn_hidden_size=40,
    num_attention_heads=6,
    num_query_groups=2,
    kv_channels=8,
    padded_vocab_size=66,
    seq_length=32,
    init_method_std=0.2,
)
"""Odd, unequal sizes that split over two ranks; 6 heads x 8 channels = 48 is not the hidden size."""

TINY_EXPERTS = dataclasses.replace(
    TINY,
    family="qwen3_moe",
    num_layers=3,
    num_moe_experts=4,
    moe_ffn_hidden_size=20,
    moe_shared_expert_intermediate_size=12,
    moe_router_topk=2,
    moe_layer_freq=(1, 0, 1),
)
"""A mixture of experts with a dense layer among its three, and a shared expert, which no supported HF family has."""


def start_alone() -> None:
    """torch.distributed and Megatron's parallel state of a single process, where nothing is set up yet.

    Call it before entering `torch.device(...)`: the CPU platform is a torch function mode too, and modes are a stack.
    """
    platform.activate()
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel()
        tensor_parallel.model_parallel_cuda_manual_seed(1234)


def transformer_config(shape: ModelShape, *, dtype: torch.dtype = torch.float32, **overrides: Any) -> TransformerConfig:
    """Megatron-core's config of this shape on the current layout; nothing fused, no dropout."""
    values = transformer_fields(shape) | {
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype is torch.bfloat16,
        "tensor_model_parallel_size": parallel_state.get_tensor_model_parallel_world_size(),
        "pipeline_model_parallel_size": parallel_state.get_pipeline_model_parallel_world_size(),
        "context_parallel_size": parallel_state.get_context_parallel_world_size(),
        "sequence_parallel": current_layout().sequence_parallel,
        **uneven_stages(shape.num_layers, parallel_state.get_pipeline_model_parallel_world_size()),
    }
    if shape.num_moe_experts is not None:
        values |= {
            "moe_router_load_balancing_type": "none",
            "expert_model_parallel_size": parallel_state.get_expert_model_parallel_world_size(),
            "expert_tensor_parallel_size": parallel_state.get_expert_tensor_parallel_world_size(),
        }
    return TransformerConfig(**values | platform.transformer_config_overrides() | overrides)


def bare_model(shape: ModelShape, *, dtype: torch.dtype = torch.float32, **overrides: Any) -> GPTModel:
    """This rank's part of the model as Megatron-core initialises it."""
    start_alone()
    config = transformer_config(shape, dtype=dtype, **overrides)
    model = GPTModel(
        config,
        plain_block_spec(config),
        vocab_size=shape.padded_vocab_size,
        max_sequence_length=shape.seq_length,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=shape.share_embeddings_and_output_weights,
        position_embedding_type="rope",
        rotary_percent=shape.rotary_percent,
        rotary_base=shape.rotary_base,  # type: ignore[arg-type]
    )
    apply_rope_scaling(model, shape)
    return model


def random_parameter(name: str, shape: ModelShape, *, seed: int = 0) -> Tensor:
    """The full parameter a test model has under this name: drawn from its name and the seed, whatever the layout.

    Norms near their neutral value, biases small, the rest with `shape.init_method_std`.
    """
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    noise = torch.randn(full_shape(name, shape), generator=torch.Generator().manual_seed(int.from_bytes(digest[:7])))
    if "layernorm.weight" in name:
        return (0.0 if shape.normalization == "LayerNorm1p" else 1.0) + 0.1 * noise
    return (0.1 if name.endswith(".bias") else shape.init_method_std) * noise


def build_gpt(
    shape: ModelShape = TINY, *, dtype: torch.dtype = torch.float32, seed: int = 0, **overrides: Any
) -> GPTModel:
    """A bare Megatron-core GPTModel (local spec) on the current layout, with the same full weights on every layout.

    Pipeline stages get their embedding, layers and output layer by their place; a plain process holds all of it.
    `overrides` go to TransformerConfig.
    """
    model = bare_model(shape, dtype=dtype, **overrides)
    load_full_parameters(model, shape, Groups.from_megatron(), lambda name: random_parameter(name, shape, seed=seed))
    return model.eval()


def fuse_norms(model: GPTModel) -> GPTModel:
    """The same model with its norms inside the linears that follow, under transformer-engine's names."""
    for layer in model.decoder.layers:
        for name, linear in (
            ("input_layernorm", layer.self_attention.linear_qkv),
            ("pre_mlp_layernorm", layer.mlp.linear_fc1),
        ):
            norm, plain_forward = getattr(layer, name), linear.forward
            linear.register_parameter("layer_norm_weight", norm.weight)
            if norm.bias is not None:
                linear.register_parameter("layer_norm_bias", norm.bias)
            linear.forward = lambda x, norm=norm, forward=plain_forward: forward(norm(x))
            setattr(layer, name, IdentityOp())
    return model


def causal_mask(seq_length: int) -> Tensor:
    """[1, 1, s, s] bool, True where attention is forbidden: the local layer spec wants it explicitly."""
    return torch.ones(seq_length, seq_length, dtype=torch.bool).triu(1)[None, None]


def run_gpt(model: GPTModel, tokens: Tensor, *, labels: Tensor | None = None) -> Tensor | None:
    """Forward pass of [b, s] tokens through every pipeline stage, one stage after the other.

    Returns:
        on the last stage: logits [b, s, v/tp] of the model's dtype, or with `labels` [b, s] the loss of each token
        [b, s]; None on other stages.
    Communicates: pp, one send and one receive of [s/tp, b, h]; context parallelism is the caller's.
    """
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    group = parallel_state.get_pipeline_model_parallel_group()
    first, last = parallel_state.is_pipeline_first_stage(), parallel_state.is_pipeline_last_stage()
    if not first:
        config = model.config
        length = tokens.shape[1] // (config.tensor_model_parallel_size if config.sequence_parallel else 1)
        received = torch.empty(length, tokens.shape[0], config.hidden_size, dtype=config.params_dtype)
        torch.distributed.recv(received, src=parallel_state.get_pipeline_model_parallel_prev_rank(), group=group)
        model.set_input_tensor(received)
    output = model(tokens, positions, causal_mask(tokens.shape[1]), labels=labels)
    if not last:
        torch.distributed.send(
            output.detach().contiguous(), dst=parallel_state.get_pipeline_model_parallel_next_rank(), group=group
        )
        return None
    return output


def smaller(shape: ModelShape, **changes: Any) -> ModelShape:
    """`shape` with some fields replaced."""
    return dataclasses.replace(shape, **changes)

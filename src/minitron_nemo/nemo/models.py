"""NeMo model classes: from a `ModelShape` to a Megatron-core model, and to a `GPTModel` of NeMo's that trains.

The NeMo config class of the family is used as it is (LlamaConfig, MistralConfig7B, ...), so that a checkpoint's context
names classes every NeMo installation has; none of ours adds parameters.
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from pathlib import Path
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel as MCoreGPTModel
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from nemo.collections import llm
from nemo.collections.llm.fn.activation import squared_relu
from nemo.collections.llm.gpt.model.base import GPTConfig, default_layer_spec
from nemo.collections.llm.gpt.model.llama import Llama31Config
from nemo.collections.llm.gpt.model.mistral import MistralConfig7B
from nemo.collections.llm.gpt.model.mixtral import MixtralConfig
from nemo.collections.llm.gpt.model.qwen3 import Qwen3MoEConfig
from nemo.lightning.megatron_parallel import MaskedTokenLossReduction

from minitron_nemo import platform
from minitron_nemo.by_source import SOURCE, SourceSums
from minitron_nemo.checks import require
from minitron_nemo.config.trainer import Layout
from minitron_nemo.distillation.loss import LOSS
from minitron_nemo.divergence.cross_entropy import leave_out_padding
from minitron_nemo.layer_spec import FUSED_BLOCK_SPEC, plain_block_spec, transformer_fields, uneven_stages
from minitron_nemo.rope import apply_rope_scaling, require_known_scaling
from minitron_nemo.runtime.distributed_checkpoint import load_weights
from minitron_nemo.runtime.step import data_step, forward_step
from minitron_nemo.shape import ModelShape
from minitron_nemo.weights import bare_gpt

FAMILIES: dict[str, tuple[type[llm.GPTModel], type[GPTConfig]]] = {
    "llama": (llm.LlamaModel, llm.LlamaConfig),
    "mistral": (llm.MistralModel, MistralConfig7B),
    "nemotron": (llm.NemotronModel, llm.NemotronConfig),
    "qwen2": (llm.Qwen2Model, llm.Qwen2Config),
    "qwen3": (llm.Qwen3Model, llm.Qwen3Config),
    "mixtral": (llm.MixtralModel, MixtralConfig),
    "qwen3_moe": (llm.Qwen3Model, Qwen3MoEConfig),
}

ROPE_SCALING_FIELDS = {
    "scale_factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "old_context_len": "original_max_position_embeddings",
}
"""Field of NeMo's Llama31Config -> key of HF `rope_scaling` of type llama3."""


def nemo_config(shape: ModelShape, *, plain: bool = False, **overrides: Any) -> GPTConfig:
    """The family's NeMo config with this shape, fused where the machine can.

    Args:
        plain: nothing is fused, and every module is torch's or Megatron-core's own, on any machine.
        overrides: fields of the config.
    """
    require(
        shape.family in FAMILIES,
        f"family={shape.family} has no NeMo model class here; supported: {', '.join(sorted(FAMILIES))}.",
    )
    _, config_class = FAMILIES[shape.family]
    values = transformer_fields(shape, plain=plain) | {
        "vocab_size": shape.padded_vocab_size,
        "seq_length": shape.seq_length,
        "share_embeddings_and_output_weights": shape.share_embeddings_and_output_weights,
        "position_embedding_type": "rope",
        "rotary_base": shape.rotary_base,
        "rotary_percent": shape.rotary_percent,
        "params_dtype": torch.float32,
        "calculate_per_token_loss": True,  # gradients are sum/count over the global batch on every layout
    }
    if shape.activation == "squared_relu":
        values["activation_func"] = squared_relu  # NeMo's own, whose name a context can tell plain NeMo
    if shape.num_moe_experts is not None:
        values["bf16"] = False  # MixtralConfig says True; the trainer's precision or `overrides` say it
    if plain or not platform.has_transformer_engine():
        values["transformer_layer_spec"] = plain_block_spec
    elif _has_layers_of_both_kinds(shape):
        values["transformer_layer_spec"] = FUSED_BLOCK_SPEC
    if plain and shape.num_moe_experts is not None:
        # where transformer-engine is there, Megatron-core's router takes its products from it, and those are TF32
        values["moe_router_dtype"] = "fp64"
    require_known_scaling(shape.rope_scaling)
    if shape.rope_scaling is not None and config_class is llm.LlamaConfig:
        config_class = Llama31Config  # NeMo's only class with fields for it, so that a context says it too
        values |= {field: shape.rope_scaling[key] for field, key in ROPE_SCALING_FIELDS.items()}
    if config_class is MistralConfig7B:
        values["window_size"] = None  # full attention: sliding windows need transformer-engine and change no weight
    return config_class(**values | platform.transformer_config_overrides(plain=plain) | overrides)


def _has_layers_of_both_kinds(shape: ModelShape) -> bool:
    """Layers with experts and dense ones: NeMo's own layer spec would put experts into all of them."""
    return shape.num_moe_experts is not None and shape.has_dense_layers


class CountedTokens(MaskedTokenLossReduction):
    """NeMo's own, where a token whose mask is 0 does not exist: infinity times 0 would be NaN."""

    by_source: SourceSums | None = None
    """What to add each source's losses to, in a validation; None: they are not asked for."""

    def forward(
        self, batch: dict[str, torch.Tensor], forward_out: Any
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        if self.by_source is not None:
            self.by_source.add({LOSS: forward_out}, batch["loss_mask"], batch[SOURCE])
        return super().forward(batch, torch.where(batch["loss_mask"] != 0, forward_out, 0.0))


class EngineModel(llm.GPTModel):
    """What our NeMo models share: `shape` is the whole trained model's, `core` its bare Megatron-core part here, and
    `vocab_size` the real entries of its padded vocabulary (None: all are real).

    A subclass says in `build` what this rank holds.
    """

    shape: ModelShape
    vocab_size: int | None
    reduction_class: type[CountedTokens] = CountedTokens
    """How a micro-batch's output becomes the loss that is trained on."""
    _training_loss_reduction: CountedTokens | None
    _validation_loss_reduction: CountedTokens | None

    def configure_model(self, vp_stage: int | None = None) -> None:
        if not hasattr(self, "module"):
            self.module = self.build(vp_stage)

    @abstractmethod
    def build(self, vp_stage: int | None) -> torch.nn.Module: ...

    @property
    def core(self) -> MCoreGPTModel:
        return bare_gpt(self.module)

    @property
    def training_loss_reduction(self) -> CountedTokens:
        if self._training_loss_reduction is None:
            self._training_loss_reduction = self.reduction_class()
        return self._training_loss_reduction

    @property
    def validation_loss_reduction(self) -> CountedTokens:
        if self._validation_loss_reduction is None:
            self._validation_loss_reduction = CountedTokens(validation_step=True)
        return self._validation_loss_reduction

    def training_flops_per_token(self, seq_length: int) -> int:
        """What a step has to compute of each token, on all ranks together; what is computed twice counts once."""
        return self.shape.flops_per_token(seq_length, training=True)


class CrossEntropyGPTModel(EngineModel):
    """Trained on the next token; its weights come from the model artifact `initial`, or are random."""

    def __init__(
        self,
        shape: ModelShape,
        *,
        initial: Path | None = None,
        vocab_size: int | None = None,
        optim: Any = None,
        **overrides: Any,
    ) -> None:
        super().__init__(
            nemo_config(shape, forward_step_fn=forward_step, data_step_fn=data_step, **overrides), optim=optim
        )
        self.shape, self.vocab_size = shape, vocab_size
        self.initial = initial

    def build(self, vp_stage: int | None) -> torch.nn.Module:
        if self.initial is not None:
            to_be_loaded(self.config)
        core = build_core(self.config, self.shape, vp_stage=vp_stage)
        leave_out_padding(core, self.vocab_size)
        if self.initial is not None:
            load_weights(core, self.initial)
        return core


_LAYOUT_FIELDS = (*Layout().of_model, "pipeline_dtype", "params_dtype", "bf16", "perform_initialization")
"""What a second model on the same ranks takes over from the first one's config."""


def plain_nemo_model(shape: ModelShape, tokenizer: Any) -> llm.GPTModel:
    """NeMo's own class for this shape, without weights: what a checkpoint's context describes."""
    if shape.rope_scaling is not None and shape.family == "mistral":
        shape = dataclasses.replace(shape, family="llama")  # the same model; NeMo has fields for scaling there alone
    model_class, _ = FAMILIES[shape.family]
    spec = FUSED_BLOCK_SPEC if _has_layers_of_both_kinds(shape) else default_layer_spec
    return model_class(nemo_config(shape, transformer_layer_spec=spec), tokenizer=tokenizer)


def new_core(shape: ModelShape, layout: Layout, dtype: torch.dtype, *, plain: bool = False) -> MCoreGPTModel:
    """This rank's part of a model of `shape` on `layout`: random weights, ready for forward passes."""
    precision = {"pipeline_dtype": dtype, "params_dtype": dtype, "bf16": dtype == torch.bfloat16}
    config = nemo_config(shape, plain=plain, **layout.of_model, **precision)
    return build_core(config, shape).to(device=platform.device(), dtype=dtype).eval()


def meta_core(shape: ModelShape) -> MCoreGPTModel:
    """A whole model of `shape` without memory; for what its parameters are called and where they lie."""
    return nemo_config(shape, init_model_with_meta_device=True).configure_model(None)


def build_core(config: GPTConfig, shape: ModelShape, *, vp_stage: int | None = None) -> MCoreGPTModel:
    """This rank's part of the model on Megatron-core, with RoPE scaled as the shape says.

    Pipeline stages differ by a layer or so where the layers do not divide evenly over them (`uneven_stages`).
    """
    for field, layers in uneven_stages(shape.num_layers, config.pipeline_model_parallel_size).items():
        setattr(config, field, layers)
    core = config.configure_model(None, vp_stage=vp_stage)
    if not config.perform_initialization:
        _mark_what_is_split(core)
    apply_rope_scaling(core, shape)
    return core


def _mark_what_is_split(core: MCoreGPTModel) -> None:
    """Say of each weight that tensor parallelism splits that it is.

    Megatron-core 0.15.3 says so where it draws a weight, and what is not said to be split counts in the norm of the
    gradient on the first tensor-parallel rank alone.
    """
    for module in core.modules():
        axis = next((axis for kind, axis in _SPLIT_AXES.items() if isinstance(module, kind)), None)
        weight = getattr(module, "weight", None)
        if axis is not None and weight is not None and not hasattr(weight, "tensor_model_parallel"):
            set_tensor_model_parallel_attributes(weight, True, axis, 1)


_SPLIT_AXES = {VocabParallelEmbedding: 0, ColumnParallelLinear: 0, RowParallelLinear: 1}
"""Megatron-core's own modules; transformer-engine's mark their weights themselves."""


def to_be_loaded(config: GPTConfig) -> None:
    """Have a model built in the dtype of its forward pass, into which NeMo would convert it once it is whole, and with
    weights that are memory as it comes: a checkpoint fills all of them."""
    config.params_dtype = torch.bfloat16 if config.bf16 else torch.float32
    config.perform_initialization = False


def build_beside(
    config: GPTConfig, shape: ModelShape, *, vp_stage: int | None = None, on_host: bool = False
) -> MCoreGPTModel:
    """This rank's part of a second model, laid out and in the precision as the one of `config`; on the device, or in
    host memory."""
    values = {name: getattr(config, name) for name in _LAYOUT_FIELDS}
    if shape.num_moe_experts is not None:
        values["moe_aux_loss_coeff"] = 0.0  # a teacher's own balance is nobody's goal here
    if on_host:
        values["use_cpu_initialization"] = True
    return build_core(nemo_config(shape, **values), shape, vp_stage=vp_stage)

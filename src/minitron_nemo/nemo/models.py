"""NeMo model classes: from a `ModelShape` to a `GPTModel` that trains, is scored and is pruned.

The NeMo config class of the family is used as it is (LlamaConfig, MistralConfig7B, ...), so that a checkpoint's context
names classes every NeMo installation has; `PrunableGPTModel` adds no parameters.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel as MCoreGPTModel
from megatron.core.utils import get_batch_on_this_cp_rank
from nemo.collections import llm
from nemo.collections.llm.fn.activation import squared_relu
from nemo.collections.llm.gpt.model.base import GPTConfig, default_layer_spec
from nemo.collections.llm.gpt.model.llama import Llama31Config
from nemo.collections.llm.gpt.model.mistral import MistralConfig7B
from nemo.collections.llm.gpt.model.mixtral import MixtralConfig
from nemo.collections.llm.gpt.model.qwen3 import Qwen3MoEConfig

from minitron_nemo import platform
from minitron_nemo.checks import require
from minitron_nemo.config.importance import ImportanceConfig
from minitron_nemo.distillation.stored_teacher import STORED
from minitron_nemo.importance import Importance
from minitron_nemo.layer_spec import plain_block_spec, uneven_stages
from minitron_nemo.parallel import Groups
from minitron_nemo.plan import PruningPlan
from minitron_nemo.pruning import prune_into
from minitron_nemo.rope import apply_rope_scaling, require_known_scaling
from minitron_nemo.runtime.distributed_checkpoint import load_weights
from minitron_nemo.shape import ModelShape
from minitron_nemo.text.documents import DOCUMENT_STARTS, documents_of, documents_on_this_cp_rank
from minitron_nemo.weights import bare_gpt

ACTIVATIONS: dict[str, Callable] = {"silu": F.silu, "gelu": F.gelu, "squared_relu": squared_relu}

_FAMILIES: dict[str, tuple[type[llm.GPTModel], type[GPTConfig]]] = {
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


def nemo_config(shape: ModelShape, **overrides: Any) -> GPTConfig:
    """The family's NeMo config with this shape, fused where the machine can."""
    require(
        shape.family in _FAMILIES,
        f"family={shape.family} has no NeMo model class here; supported: {', '.join(sorted(_FAMILIES))}.",
    )
    _, config_class = _FAMILIES[shape.family]
    values: dict[str, Any] = {
        "num_layers": shape.num_layers,
        "hidden_size": shape.hidden_size,
        "ffn_hidden_size": shape.ffn_hidden_size,
        "num_attention_heads": shape.num_attention_heads,
        "num_query_groups": shape.num_query_groups,
        "kv_channels": shape.kv_channels,
        "vocab_size": shape.padded_vocab_size,
        "seq_length": shape.seq_length,
        "normalization": "RMSNorm" if shape.normalization == "RMSNorm" else "LayerNorm",
        "layernorm_zero_centered_gamma": shape.normalization == "LayerNorm1p",
        "layernorm_epsilon": shape.layernorm_epsilon,
        "activation_func": ACTIVATIONS[shape.activation],
        "gated_linear_unit": shape.gated_linear_unit,
        "share_embeddings_and_output_weights": shape.share_embeddings_and_output_weights,
        "add_bias_linear": shape.add_bias_linear,
        "add_qkv_bias": shape.add_qkv_bias,
        "qk_layernorm": shape.qk_layernorm,
        "position_embedding_type": "rope",
        "rotary_base": shape.rotary_base,
        "rotary_percent": shape.rotary_percent,
        "init_method_std": shape.init_method_std,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "params_dtype": torch.float32,
        "calculate_per_token_loss": True,  # gradients are sum/count over the global batch on every layout
    }
    if shape.num_moe_experts is not None:
        values |= _expert_values(shape)
    if not platform.has_transformer_engine():
        values["transformer_layer_spec"] = plain_block_spec
    require_known_scaling(shape.rope_scaling)
    if shape.rope_scaling is not None and config_class is llm.LlamaConfig:
        config_class = Llama31Config  # NeMo's only class with fields for it, so that a context says it too
        values |= {field: shape.rope_scaling[key] for field, key in ROPE_SCALING_FIELDS.items()}
    if config_class is MistralConfig7B:
        values["window_size"] = None  # full attention: sliding windows need transformer-engine and change no weight
    return config_class(**values | platform.transformer_config_overrides() | overrides)


def _expert_values(shape: ModelShape) -> dict[str, Any]:
    """Config of a mixture that routes as the family does in transformers: softmax, top k, no token dropped."""
    fused = platform.has_transformer_engine()
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
        "bf16": False,  # MixtralConfig's own default; the trainer's precision or `overrides` say it
    }


@lru_cache(maxsize=4)
def causal_mask(seq_length: int, device: torch.device) -> torch.Tensor:
    """[1, 1, s, s] bool, True where attention is forbidden. The local layer spec asks for it explicitly."""
    return torch.ones(seq_length, seq_length, dtype=torch.bool, device=device).triu(1)[None, None]


def data_step(dataloader_iter: Any) -> dict[str, Any]:
    """One micro-batch on this rank's device: tokens, labels, loss_mask, position_ids, each [b, s/cp].

    Where the teacher's answers are stored, these too, [b, s/cp, ...]; where samples hold several documents that do not
    see each other, also packed_seq_params.
    """
    batch = next(dataloader_iter)
    batch = batch[0] if isinstance(batch, tuple) else batch
    wanted = {"tokens", "position_ids", "labels", "loss_mask", *STORED}
    on_device = {key: value.cuda(non_blocking=True) for key, value in batch.items() if key in wanted}
    if DOCUMENT_STARTS not in batch:
        return get_batch_on_this_cp_rank(on_device)
    return documents_on_this_cp_rank(on_device, documents_of(batch[DOCUMENT_STARTS]))


def forward_step(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    """Per-token loss [b, s] on the last stage (logits without labels), the passing activation on the others."""
    return model(**model_inputs(batch))


def model_inputs(batch: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a Megatron-core model's forward pass."""
    tokens = batch["tokens"]
    # transformer-engine and the local spec's causal softmax both accept it; context parallelism builds its own
    mask = None if platform.has_transformer_engine() else causal_mask(tokens.shape[1], tokens.device)
    return {
        "input_ids": tokens,
        "position_ids": batch["position_ids"],
        "attention_mask": mask,
        "labels": batch.get("labels"),
        **({"packed_seq_params": batch["packed_seq_params"]} if "packed_seq_params" in batch else {}),
    }


class EngineModel(llm.GPTModel):
    """What our NeMo models share: `shape` is the whole trained model's, `core` its bare Megatron-core part here.

    A subclass says in `build` what this rank holds.
    """

    shape: ModelShape

    def configure_model(self, vp_stage: int | None = None) -> None:
        if not hasattr(self, "module"):
            self.module = self.build(vp_stage)

    @abstractmethod
    def build(self, vp_stage: int | None) -> torch.nn.Module: ...

    @property
    def core(self) -> MCoreGPTModel:
        return bare_gpt(self.module)

    def training_flops_per_token(self, seq_length: int) -> int:
        """What a step has to compute of each token, on all ranks together; what is computed twice counts once."""
        return self.shape.flops_per_token(seq_length, training=True)


class PrunableGPTModel(EngineModel):
    """A NeMo GPT model that knows its named dimensions, can be scored and pruned.

    Weights come from the model artifact `initial`, or are random. Adds no parameters: its checkpoints are plain.
    """

    def __init__(self, shape: ModelShape, *, initial: Path | None = None, optim: Any = None, **overrides: Any) -> None:
        super().__init__(
            nemo_config(shape, forward_step_fn=forward_step, data_step_fn=data_step, **overrides), optim=optim
        )
        self.shape = shape
        self.initial = initial

    def build(self, vp_stage: int | None) -> torch.nn.Module:
        core = build_core(self.config, self.shape, vp_stage=vp_stage)
        if self.initial is not None:
            load_weights(core, self.initial)
        return core

    def estimate_importance(self, batches: Iterable[dict[str, torch.Tensor]], config: ImportanceConfig) -> Importance:
        """Width scores of this model over `batches`; see `engine.forward.estimate_importance`."""
        from minitron_nemo.runtime.forward import estimate_importance

        return estimate_importance(self.core, self.shape, batches, config)

    def prune(self, plan: PruningPlan) -> PrunableGPTModel:
        """A new model with what `plan` keeps of this one, on the same layout; this one is unchanged.

        Communicates: tp and pp, once per parameter.
        """
        student = PrunableGPTModel(plan.target)
        student.config = nemo_config(plan.target, **{name: getattr(self.config, name) for name in _LAYOUT_FIELDS})
        student.module = build_core(student.config, plan.target).to(next(self.core.parameters()).dtype)
        prune_into(self.core, student.module, plan, Groups.from_megatron())
        return student


_LAYOUT_FIELDS = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "context_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
    "sequence_parallel",
    "pipeline_dtype",
    "params_dtype",
    "bf16",
)
"""What a second model on the same ranks takes over from the first one's config."""


def plain_nemo_model(shape: ModelShape, tokenizer: Any) -> llm.GPTModel:
    """NeMo's own class for this shape, without weights: what a checkpoint's context describes."""
    model_class, _ = _FAMILIES[shape.family]
    return model_class(nemo_config(shape, transformer_layer_spec=default_layer_spec), tokenizer=tokenizer)


def build_core(config: GPTConfig, shape: ModelShape, *, vp_stage: int | None = None) -> MCoreGPTModel:
    """This rank's part of the model on Megatron-core, with RoPE scaled as the shape says.

    Pipeline stages differ by a layer or so where the layers do not divide evenly over them (`uneven_stages`).
    """
    for field, layers in uneven_stages(shape.num_layers, config.pipeline_model_parallel_size).items():
        setattr(config, field, layers)
    core = config.configure_model(None, vp_stage=vp_stage)
    apply_rope_scaling(core, shape)
    return core


def build_beside(config: GPTConfig, shape: ModelShape, *, vp_stage: int | None = None) -> MCoreGPTModel:
    """This rank's part of a second model, laid out and in the precision as the one of `config`."""
    return build_core(
        nemo_config(shape, **{name: getattr(config, name) for name in _LAYOUT_FIELDS}), shape, vp_stage=vp_stage
    )

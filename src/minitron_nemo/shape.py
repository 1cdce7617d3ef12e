"""The dimensions of a model: those pruning can change and those it cannot, and what they cost.

Pure arithmetic. Names are Megatron-core's. `padded_vocab_size` is what the embedding table really holds; the
tokenizer may know fewer tokens.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from minitron_nemo.checks import did_you_mean, nearest_multiples, require, require_divisible

PRUNABLE_DIMS = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
)


@dataclass(frozen=True)
class ModelShape:
    """Shape of a dense Megatron-core GPT model.

    Source of the counts: arXiv:2407.14679 (tables of architectures) and the published model configurations.
    """

    family: str
    """HF `model_type`: llama, mistral, nemotron, qwen2 or qwen3. Picks the name map and the NeMo config class."""
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    """Channels of one head; kept by pruning, so it need not be hidden_size / num_attention_heads."""
    padded_vocab_size: int
    """Rows of the embedding table, padding included."""
    seq_length: int = 4096
    """Longest sequence in tokens (HF `max_position_embeddings`)."""
    normalization: str = "RMSNorm"
    """RMSNorm, LayerNorm, or LayerNorm1p (LayerNorm whose stored weight is gamma - 1, Nemotron)."""
    layernorm_epsilon: float = 1e-5
    activation: str = "silu"
    """silu, gelu or squared_relu."""
    gated_linear_unit: bool = True
    share_embeddings_and_output_weights: bool = False
    add_bias_linear: bool = False
    add_qkv_bias: bool = False
    qk_layernorm: bool = False
    rotary_base: float = 10000.0
    rotary_percent: float = 1.0
    rope_scaling: dict[str, Any] | None = None
    """HF `rope_scaling` as it stands in config.json (llama3 scaling), or None."""
    init_method_std: float = 0.02

    def __post_init__(self) -> None:
        for dim in (*PRUNABLE_DIMS, "kv_channels", "padded_vocab_size", "seq_length"):
            value = getattr(self, dim)
            require(isinstance(value, int) and value >= 1, f"{dim}={value!r} must be a whole number of at least 1.")
        heads, groups = self.num_attention_heads, self.num_query_groups
        divisors = [str(g) for g in range(1, heads + 1) if heads % g == 0]
        require(
            heads % groups == 0,
            f"num_attention_heads={heads} is not a multiple of num_query_groups={groups}: each group needs equally "
            f"many heads. With {heads} heads the groups can be {', '.join(divisors)}; with {groups} groups the nearest "
            f"heads are {nearest_multiples(heads, groups)}.",
        )
        require(
            self.normalization in ("RMSNorm", "LayerNorm", "LayerNorm1p"),
            f"normalization={self.normalization} is not known; use RMSNorm, LayerNorm or LayerNorm1p.",
        )

    # ---- derived sizes -------------------------------------------------------------------------------------------

    @property
    def heads_per_group(self) -> int:
        return self.num_attention_heads // self.num_query_groups

    @property
    def query_projection_size(self) -> int:
        """Columns of the output projection: heads x kv_channels."""
        return self.num_attention_heads * self.kv_channels

    @property
    def qkv_projection_size(self) -> int:
        """Rows of the fused QKV weight: groups x (heads per group + 2) x kv_channels."""
        return self.num_query_groups * (self.heads_per_group + 2) * self.kv_channels

    @property
    def fc1_size(self) -> int:
        """Rows of linear_fc1: gate and up together where gated."""
        return self.ffn_hidden_size * (2 if self.gated_linear_unit else 1)

    # ---- counts --------------------------------------------------------------------------------------------------

    @property
    def num_embedding_parameters(self) -> int:
        """Input embedding and, unless tied, output layer."""
        tables = 1 if self.share_embeddings_and_output_weights else 2
        return tables * self.padded_vocab_size * self.hidden_size

    @property
    def num_parameters_per_layer(self) -> int:
        h, f = self.hidden_size, self.ffn_hidden_size
        tensors_per_norm = 1 if self.normalization == "RMSNorm" else 2  # LayerNorm has a bias
        matrices = self.qkv_projection_size * h + h * self.query_projection_size + self.fc1_size * h + h * f
        biases = 0
        if self.add_bias_linear:
            biases += h + self.fc1_size + h  # proj, fc1, fc2
        if self.add_bias_linear or self.add_qkv_bias:
            biases += self.qkv_projection_size
        qk_norms = 2 * self.kv_channels if self.qk_layernorm else 0
        return matrices + biases + (2 * h + qk_norms) * tensors_per_norm

    @property
    def num_non_embedding_parameters(self) -> int:
        """Layers and final norm: what the papers print as non-embedding parameters."""
        final_norm = self.hidden_size if self.normalization == "RMSNorm" else 2 * self.hidden_size
        return self.num_layers * self.num_parameters_per_layer + final_norm

    @property
    def num_parameters(self) -> int:
        return self.num_embedding_parameters + self.num_non_embedding_parameters

    def flops_per_token(self, seq_length: int, *, training: bool = False) -> int:
        """Matrix-multiply FLOPs of one token in a causal sequence of `seq_length` (2 per multiply-add); the output
        layer counts, the embedding look-up does not. Training is three times the forward pass."""
        h = self.hidden_size
        attention_weights = (self.qkv_projection_size + self.query_projection_size) * h
        matrices = attention_weights + (self.fc1_size + self.ffn_hidden_size) * h
        attention = self.query_projection_size * seq_length  # QK^T and AV, half of each by causality
        forward = 2 * (self.num_layers * (matrices + attention) + self.padded_vocab_size * h)
        return 3 * forward if training else forward

    def kv_bytes_per_token(self, bytes_per_value: int = 2) -> int:
        """Bytes one token adds to the key-value cache, all layers."""
        return 2 * self.num_layers * self.num_query_groups * self.kv_channels * bytes_per_value

    # ---- checks --------------------------------------------------------------------------------------------------

    def require_splits_over(self, tensor_model_parallel_size: int, pipeline_model_parallel_size: int = 1) -> None:
        """ValueError naming the dim, the size and the nearest sizes that work."""
        tp, pp = tensor_model_parallel_size, pipeline_model_parallel_size
        for dim in ("ffn_hidden_size", "num_attention_heads", "num_query_groups", "padded_vocab_size"):
            require_divisible(dim, getattr(self, dim), "trainer.tensor_model_parallel_size", tp)
        require_divisible("num_layers", self.num_layers, "trainer.pipeline_model_parallel_size", pp)

    def pruned_to(self, **dims: int) -> ModelShape:
        """This shape with smaller prunable dims.

        Raises: ValueError where a dim is unknown, larger than here, or heads do not fit their groups.
        """
        for dim, value in dims.items():
            require(dim in PRUNABLE_DIMS, f"target.{dim} is not a prunable dim; {did_you_mean(dim, PRUNABLE_DIMS)}")
            have = getattr(self, dim)
            require(
                value <= have,
                f"target.{dim}={value} is larger than the source's {dim}={have}; pruning only makes models smaller. "
                f"Set target.{dim} to at most {have}.",
            )
        changes: dict[str, Any] = dict(dims)
        return dataclasses.replace(self, **changes)

    # ---- files ---------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelShape:
        known = {field.name for field in dataclasses.fields(cls)}
        for key in values:
            require(key in known, f"{key} is not a field of ModelShape; {did_you_mean(key, known)}")
        return cls(**values)

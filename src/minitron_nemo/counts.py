"""What a model of given dims costs: parameters, FLOPs, bytes of cache.

Arithmetic alone, of whole numbers or of arrays of them, so that one formula counts one model (`shape.ModelShape`) and
every candidate of a search (`search.space`).
Source: arXiv:2407.14679 (tables of architectures) and the published model configurations.
"""

from __future__ import annotations


class Counts:
    """Sizes and costs that follow from dims. Written for numbers; where dims are arrays [n], so are the counts."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    padded_vocab_size: int
    normalization: str
    gated_linear_unit: bool
    share_embeddings_and_output_weights: bool
    add_bias_linear: bool
    add_qkv_bias: bool
    qk_layernorm: bool
    num_moe_experts: int | None
    moe_ffn_hidden_size: int | None
    moe_shared_expert_intermediate_size: int | None
    moe_router_topk: int | None
    moe_layer_freq: tuple[int, ...] | None

    @property
    def num_expert_layers(self) -> int:
        if self.num_moe_experts is None:
            return 0
        return self.num_layers if self.moe_layer_freq is None else sum(self.moe_layer_freq)

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
    def num_non_embedding_parameters(self) -> int:
        """Layers and final norm: what the papers print as non-embedding parameters."""
        return self._num_outside_embeddings(self.num_moe_experts)

    @property
    def num_parameters(self) -> int:
        return self.num_embedding_parameters + self.num_non_embedding_parameters

    @property
    def num_active_parameters(self) -> int:
        """Parameters one token meets: all but the experts it is not routed to."""
        return self.num_embedding_parameters + self._num_outside_embeddings(self.moe_router_topk)

    def _num_outside_embeddings(self, experts: int | None) -> int:
        """Parameters of layers and final norm, with `experts` experts counted in an expert layer."""
        h = self.hidden_size
        tensors_per_norm = 1 if self.normalization == "RMSNorm" else 2  # LayerNorm has a bias
        attention = self.qkv_projection_size * h + h * self.query_projection_size
        dense_biases = 0
        if self.add_bias_linear:
            attention += h
            dense_biases = self.fc1_size + h
        if self.add_bias_linear or self.add_qkv_bias:
            attention += self.qkv_projection_size
        qk_norms = 2 * self.kv_channels if self.qk_layernorm else 0
        every_layer = attention + (2 * h + qk_norms) * tensors_per_norm
        dense_layers = self.num_layers - self.num_expert_layers
        return (
            self.num_layers * every_layer
            + dense_layers * (self._mlp_weights(self.ffn_hidden_size) + dense_biases)
            + self.num_expert_layers * self._expert_weights(experts)
            + h * tensors_per_norm
        )

    def _mlp_weights(self, neurons: int | None) -> int:
        """Weights of an MLP: up (and gate), down; none where it is not there."""
        return 0 if neurons is None else neurons * self.hidden_size * (3 if self.gated_linear_unit else 2)

    def _expert_weights(self, experts: int | None) -> int:
        """Router, `experts` experts and the shared expert of an expert layer."""
        if self.num_moe_experts is None or experts is None:
            return 0
        routed = experts * self._mlp_weights(self.moe_ffn_hidden_size)
        shared = self._mlp_weights(self.moe_shared_expert_intermediate_size)
        return self.num_moe_experts * self.hidden_size + routed + shared

    def flops_per_token(self, seq_length: int, *, training: bool = False) -> int:
        """Matrix-multiply FLOPs of one token in a causal sequence of `seq_length` (2 per multiply-add); the output
        layer counts, the embedding look-up does not; of the experts, those the token is routed to. Training is three
        times the forward pass."""
        h = self.hidden_size
        attention = (self.qkv_projection_size + self.query_projection_size) * h
        attention += self.query_projection_size * seq_length  # QK^T and AV, half of each by causality
        dense_layers = self.num_layers - self.num_expert_layers
        mlps = dense_layers * self._mlp_weights(self.ffn_hidden_size)
        mlps += self.num_expert_layers * self._expert_weights(self.moe_router_topk)
        forward = 2 * (self.num_layers * attention + mlps + self.padded_vocab_size * h)
        return 3 * forward if training else forward

    def kv_bytes_per_token(self, bytes_per_value: int = 2) -> int:
        """Bytes one token adds to the key-value cache, all layers."""
        return 2 * self.num_layers * self.num_query_groups * self.kv_channels * bytes_per_value

"""The dimensions of a model: those pruning can change and those it cannot. What they cost is in `counts`.

Pure arithmetic. Names are Megatron-core's. `padded_vocab_size` is what the embedding table really holds; the
tokenizer may know fewer tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from minitron_nemo.checks import did_you_mean, nearest_multiples, require, require_divisible
from minitron_nemo.counts import Counts

PRUNABLE_DIMS = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "num_moe_experts",
    "moe_ffn_hidden_size",
    "moe_shared_expert_intermediate_size",
)
"""Every dim that pruning can change; `ModelShape.prunable_dims` are those a model has."""

SPLIT_DIMS = tuple(dim for dim in PRUNABLE_DIMS if dim not in ("num_layers", "hidden_size", "num_moe_experts"))
"""Those that tensor-parallel ranks share out."""

DIM_OF_AXIS = {
    "hidden": "hidden_size",
    "ffn": "ffn_hidden_size",
    "head": "num_attention_heads",
    "group": "num_query_groups",
    "layer": "num_layers",
    "expert": "num_moe_experts",
    "expert_ffn": "moe_ffn_hidden_size",
    "shared_expert_ffn": "moe_shared_expert_intermediate_size",
    "vocab": "padded_vocab_size",
    "kv_channels": "kv_channels",
}
"""Named axis -> the dim that is its size."""
PRUNABLE_AXES = tuple(axis for axis, dim in DIM_OF_AXIS.items() if dim in PRUNABLE_DIMS)

_EXPERT_FIELDS = (
    "moe_ffn_hidden_size",
    "moe_shared_expert_intermediate_size",
    "moe_router_topk",
    "moe_layer_freq",
)


@dataclass(frozen=True)
class ModelShape(Counts):
    """Shape of a Megatron-core GPT model, dense or with a mixture of experts.

    Source of the counts: arXiv:2407.14679 (tables of architectures) and the published model configurations.
    """

    family: str
    """HF `model_type`, such as llama or qwen3_moe. Picks the name map and the NeMo config class."""
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    """Neurons of a dense layer; means nothing where every layer has experts."""
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
    num_moe_experts: int | None = None
    """Routed experts of an expert layer; None: a dense model, whose other moe_ fields are None too."""
    moe_ffn_hidden_size: int | None = None
    """Neurons of one expert; None with experts: ffn_hidden_size, resolved here, before pruning changes either."""
    moe_shared_expert_intermediate_size: int | None = None
    """Neurons of the expert that sees every token; None: there is none."""
    moe_router_topk: int | None = None
    """Experts a token is routed to."""
    moe_router_pre_softmax: bool = False
    """Whether a token's weights are taken from the softmax over all experts, or normalised over its own (default)."""
    moe_layer_freq: tuple[int, ...] | None = None
    """1 for an expert layer, 0 for a dense one, an entry a layer; None with experts: every layer has them."""

    def __post_init__(self) -> None:
        self._resolve_experts()
        for dim in (*self.prunable_dims, "ffn_hidden_size", "kv_channels", "padded_vocab_size", "seq_length"):
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

    def _resolve_experts(self) -> None:
        """Fill in what None stands for, so that equal models have equal shapes."""
        experts, topk = self.num_moe_experts, self.moe_router_topk
        if experts is None:
            given = [name for name in _EXPERT_FIELDS if getattr(self, name) is not None]
            require(not given, f"{', '.join(given)} is set, but num_moe_experts is not. Set num_moe_experts too.")
            return
        require(
            isinstance(topk, int) and 1 <= topk <= experts,
            f"moe_router_topk={topk} must be between 1 and num_moe_experts={experts}: so many see a token. "
            f"Keep at least {topk} experts.",
        )
        require(
            topk != 1 or self.moe_router_pre_softmax,
            "moe_router_topk=1 with weights normalised over one expert would make every weight 1, which Megatron-core "
            "cannot route. Use a model with moe_router_pre_softmax=true, or with at least 2 experts a token.",
        )
        require(not self.add_bias_linear, "add_bias_linear=true is not supported in a model with experts.")
        resolved: dict[str, Any] = {}
        if self.moe_ffn_hidden_size is None:
            resolved["moe_ffn_hidden_size"] = self.ffn_hidden_size
        if self.moe_layer_freq is not None:
            freq = tuple(int(entry) for entry in self.moe_layer_freq)
            require(
                len(freq) == self.num_layers and set(freq) <= {0, 1} and any(freq),
                f"moe_layer_freq={list(freq)} must have one entry, 0 or 1, for each of num_layers={self.num_layers} "
                "layers, and at least one 1.",
            )
            resolved["moe_layer_freq"] = None if all(freq) else freq
        for name, value in resolved.items():
            object.__setattr__(self, name, value)  # frozen: this is still construction

    # ---- derived sizes -------------------------------------------------------------------------------------------

    @property
    def prunable_dims(self) -> tuple[str, ...]:
        """The prunable dims this model has."""
        absent = set() if self.has_dense_layers else {"ffn_hidden_size"}
        return tuple(dim for dim in PRUNABLE_DIMS if getattr(self, dim) is not None and dim not in absent)

    def has_experts(self, layer: int) -> bool:
        """Whether a layer, counted from 0, has experts instead of a dense MLP."""
        return self.num_moe_experts is not None and (self.moe_layer_freq is None or self.moe_layer_freq[layer] == 1)

    @property
    def has_dense_layers(self) -> bool:
        return self.num_expert_layers < self.num_layers

    # ---- checks --------------------------------------------------------------------------------------------------

    def require_splits_over(
        self,
        tensor_model_parallel_size: int,
        pipeline_model_parallel_size: int = 1,
        expert_model_parallel_size: int = 1,
    ) -> None:
        """ValueError naming the dim, the size and the nearest sizes that work. Pipeline stages need at least a layer
        each, not equally many; experts are split over tensor-parallel ranks as dense neurons are."""
        tp, pp, ep = tensor_model_parallel_size, pipeline_model_parallel_size, expert_model_parallel_size
        for dim in (*(dim for dim in self.prunable_dims if dim in SPLIT_DIMS), "padded_vocab_size"):
            require_divisible(dim, getattr(self, dim), "trainer.tensor_model_parallel_size", tp)
        require(
            self.num_layers >= pp,
            f"num_layers={self.num_layers} cannot be split over trainer.pipeline_model_parallel_size={pp}: each stage "
            f"needs a layer. Set trainer.pipeline_model_parallel_size to at most {self.num_layers}.",
        )
        require(
            ep == 1 or self.num_moe_experts is not None,
            f"trainer.expert_model_parallel_size={ep} spreads experts, and this model has none. "
            "Set trainer.expert_model_parallel_size=1.",
        )
        if self.num_moe_experts is not None:
            require_divisible("num_moe_experts", self.num_moe_experts, "trainer.expert_model_parallel_size", ep)

    def pruned_to(self, **dims: int) -> ModelShape:
        """This shape with smaller prunable dims.

        Where dense and expert layers are mixed, which layers stay decides the shape: `keeping_layers` says it.
        Raises: ValueError where a dim is unknown, not this model's or larger than here, or heads do not fit their
            groups.
        """
        for dim, value in dims.items():
            require(dim in PRUNABLE_DIMS, f"target.{dim} is not a prunable dim; {did_you_mean(dim, PRUNABLE_DIMS)}")
            require(
                dim in self.prunable_dims,
                f"target.{dim}={value} is a dim this {self.family} model does not have; it has "
                f"{', '.join(self.prunable_dims)}. Leave target.{dim} out.",
            )
            have = getattr(self, dim)
            require(
                value <= have,
                f"target.{dim}={value} is larger than the source's {dim}={have}; pruning only makes models smaller. "
                f"Set target.{dim} to at most {have}.",
            )
        require(
            self.moe_layer_freq is None or dims.get("num_layers", self.num_layers) == self.num_layers,
            f"target.num_layers={dims.get('num_layers')} does not say which of the dense and expert layers "
            f"(moe_layer_freq={self.moe_layer_freq}) stay. Give the kept layers.",
        )
        changes: dict[str, Any] = dict(dims)
        return dataclasses.replace(self, **changes)

    def keeping_layers(self, layers: Sequence[int]) -> ModelShape:
        """This shape with these layers only, from 0, ascending: what is said layer by layer goes with them."""
        freq = self.moe_layer_freq
        return dataclasses.replace(
            self,
            num_layers=len(layers),
            moe_layer_freq=None if freq is None else tuple(freq[layer] for layer in layers),
        )

    # ---- files ---------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelShape:
        known = {field.name for field in dataclasses.fields(cls)}
        for key in values:
            require(key in known, f"{key} is not a field of ModelShape; {did_you_mean(key, known)}")
        return cls(**values)

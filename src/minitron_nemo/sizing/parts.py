"""What one rank holds of a model: its dims, divided as the layout divides them, and so its parameters.

A rank of pipeline stage i holds `layers_by_stage(...)[i]` layers, each with 1/tp of its heads, groups, neurons and rows
of the vocabulary, and 1/ep of its experts. That is a smaller model, and `counts` counts it. Norms, the router and the
biases of row-parallel layers are whole on every rank. All ranks of a stage hold equally many.

Pure arithmetic, held to Megatron-core's own objects by tests/sizing/test_parts.py. Communicates nothing.
"""

from __future__ import annotations

import dataclasses

from minitron_nemo.config.trainer import Layout
from minitron_nemo.counts import Counts
from minitron_nemo.layer_spec import layers_by_stage
from minitron_nemo.shape import ModelShape


class Part(Counts):
    """The dims that a rank of one pipeline stage has, under their own names: `ffn_hidden_size` is ffn/tp here."""

    def __init__(self, shape: ModelShape, layout: Layout, stage: int) -> None:
        for field in dataclasses.fields(shape):
            setattr(self, field.name, getattr(shape, field.name))
        tp, stages = layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size
        layers = layers_by_stage(shape.num_layers, stages)
        first = sum(layers[:stage])
        self.whole = shape
        self.layers = range(first, first + layers[stage])
        self.is_first, self.is_last = stage == 0, stage == stages - 1
        self.num_layers = layers[stage]
        self.ffn_hidden_size = shape.ffn_hidden_size // tp
        self.num_attention_heads = shape.num_attention_heads // tp
        self.num_query_groups = shape.num_query_groups // tp
        self.padded_vocab_size = shape.padded_vocab_size // tp
        if shape.num_moe_experts is not None:
            self.num_moe_experts = shape.num_moe_experts // layout.expert_model_parallel_size
            self.moe_ffn_hidden_size = _split(shape.moe_ffn_hidden_size, tp)
            self.moe_shared_expert_intermediate_size = _split(shape.moe_shared_expert_intermediate_size, tp)
            if shape.moe_layer_freq is not None:
                self.moe_layer_freq = shape.moe_layer_freq[first : first + layers[stage]]

    @property
    def num_table_parameters(self) -> int:
        """Embedding on the first stage, output layer on the last; a tied one is there on both, once where they are
        one."""
        tables = 1 if self.whole.share_embeddings_and_output_weights and self.is_first else self.is_first + self.is_last
        return tables * self.padded_vocab_size * self.hidden_size

    @property
    def num_expert_parameters(self) -> int:
        """Those of routed experts, which other ranks are replicas of than of everything else."""
        if self.num_moe_experts is None:
            return 0
        return self.num_expert_layers * self.num_moe_experts * self._mlp_weights(self.moe_ffn_hidden_size)

    @property
    def num_held_parameters(self) -> int:
        """All of this rank's."""
        held = self.num_non_embedding_parameters + self.num_table_parameters
        if self.num_moe_experts is not None and self.whole.num_moe_experts is not None:  # the router scores them all
            held += self.num_expert_layers * (self.whole.num_moe_experts - self.num_moe_experts) * self.hidden_size
        return held if self.is_last else held - self._norm

    @property
    def num_layer_parameters(self) -> int:
        """Of this rank's largest layer."""
        layers = self.num_held_parameters - self.num_table_parameters - (self._norm if self.is_last else 0)
        return -(-layers // self.num_layers)

    @property
    def _norm(self) -> int:
        return self.hidden_size * (1 if self.normalization == "RMSNorm" else 2)


def _split(neurons: int | None, over: int) -> int | None:
    return None if neurons is None else neurons // over

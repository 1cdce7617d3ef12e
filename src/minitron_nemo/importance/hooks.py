"""Where the width scores are read in a Megatron-core GPT model, by hooks that leave its outputs untouched.

    axis     what is read                                            shape                     split over
    ffn      input of mlp.linear_fc2 (after the activation)          [s/cp, b, f/tp]           cp
    head     input of self_attention.linear_proj, L2 over d          [s/cp, b, (n/tp)*d]       cp
    hidden   outputs of input_layernorm and pre_mlp_layernorm        [s/(cp*tp), b, h]         cp, and tp if sequence
                                                                     or [s/cp, b, h]           parallel

The linears' inputs hold the full sequence of the tensor-parallel group also under sequence parallelism; the norms'
outputs do not. A norm fused into a transformer-engine linear (`linear_qkv.layer_norm_weight`) is computed once more
from the linear's input, as its output never leaves the kernel.

Communication per micro-batch and hook: cp (and, for norms under sequence parallelism, tp) one all-reduce of [3, b, c]
float64, since a sample's tokens lie on several ranks and L2 and variance need the whole sample. Neurons and heads are
split over tp and stay so. No hook reads a value to the host.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.utils.hooks import RemovableHandle

from minitron_nemo.checks import require
from minitron_nemo.importance.statistics import SampleMoments, TokenMask, aggregate_sequence, partial_sums_over
from minitron_nemo.parallel import Groups, group_rank, group_size
from minitron_nemo.shape import ModelShape


@dataclass
class MicroBatch:
    """The micro-batch whose forward pass comes next; `number` counts from 1, 0 means none was announced."""

    mask: TokenMask | None = None
    number: int = 0


class Watch:
    """One hooked place: reads an activation per micro-batch, keeps its moments."""

    def __init__(
        self,
        place: str,
        channels: int,
        device: torch.device,
        current: MicroBatch,
        *,
        sequence_groups: Sequence[ProcessGroup | None],
        sequence_parallel_group: ProcessGroup | None = None,
        measure: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """
        Args:
            place: name of the hooked module, for messages.
            channels: c, what this rank scores here.
            sequence_groups: the groups that split a sample's tokens at this place.
            sequence_parallel_group: the one of them that splits the tokens of the announced mask once more (tp).
            measure: [s, b, ...] -> [s, b, c], where the activation is not yet what is scored.
        """
        self.place = place
        self.moments = SampleMoments(channels, device)
        self.num_seen = 0
        self._current = current
        self._groups = sequence_groups
        self._shard = (group_rank(sequence_parallel_group), group_size(sequence_parallel_group))
        self._measure = measure

    @torch.no_grad()
    def see(self, activation: Tensor) -> None:
        """Add one micro-batch. Communicates: over the groups that split the sequence, one all-reduce each."""
        mask = self._current.mask
        require(
            mask is not None and self.num_seen + 1 == self._current.number,
            f"{self.place} saw forward pass {self.num_seen + 1}, but {self._current.number} micro-batches were "
            "announced. "
            "Call estimator.sample(loss_mask) once before each forward pass, on every pipeline stage.",
            RuntimeError,
        )
        assert mask is not None
        mask = mask.shard(*self._shard)
        require(
            activation.dim() == 3 and tuple(activation.shape[:2]) == (mask.seq_length, mask.num_tokens.numel()),
            f"{self.place} has activations of shape {list(activation.shape)} [s, b, ...], but the loss mask announced "
            f"{mask.num_tokens.numel()} samples of {mask.seq_length} tokens on this rank. "
            "Give estimator.sample the mask [b, s] of the micro-batch that is run next.",
        )
        measured = activation if self._measure is None else self._measure(activation)
        sums = partial_sums_over(measured, mask, groups=self._groups)
        self.moments.add(aggregate_sequence(sums, mask.num_tokens), mask.is_sample)
        self.num_seen += 1


@dataclass
class LayerWatches:
    """The places of one layer; `index` is global, from 0."""

    index: int
    ffn: Watch
    head: Watch
    norms: tuple[Watch, Watch]

    def all(self) -> tuple[Watch, ...]:
        return (self.ffn, self.head, *self.norms)


def watch_layers(
    model: Any,
    shape: ModelShape,
    groups: Groups,
    current: MicroBatch,
    handles: list[RemovableHandle],
    *,
    norm_of_heads_per_token: bool,
) -> list[LayerWatches]:
    """Hook every layer of this rank's pipeline stage.

    Args:
        model: the bare megatron.core GPTModel; `decoder.layers[i].layer_number` is global, from 1.
        handles: gets the hooks, also where an error ends the call half-way.
        norm_of_heads_per_token: True scores heads by each token's L2 norm over kv_channels (the paper); False keeps
            every channel [(n/tp)*d], for a norm taken after the aggregation (the reference implementation).
    """
    watched: list[LayerWatches] = []
    heads, head_dim = shape.num_attention_heads // group_size(groups.tp), shape.kv_channels
    norm_sharded_over = groups.tp if model.config.sequence_parallel else None

    def token_norms(activation: Tensor) -> Tensor:
        """[s, b, (n/tp)*d] -> [s, b, n/tp] float32."""
        return torch.linalg.vector_norm(activation.float().unflatten(-1, (heads, head_dim)), dim=-1)

    for layer in model.decoder.layers:
        index = layer.layer_number - 1
        name = f"decoder.layers.{index}"
        require(
            hasattr(layer.mlp, "linear_fc2"),
            f"{name}.mlp is a {type(layer.mlp).__name__} without linear_fc2; importance is estimated for dense models. "
            "Use a model without experts.",
        )
        device = layer.mlp.linear_fc2.weight.device
        ffn = Watch(
            f"{name}.mlp.linear_fc2",
            shape.ffn_hidden_size // group_size(groups.tp),
            device,
            current,
            sequence_groups=[groups.cp],
        )
        head = Watch(
            f"{name}.self_attention.linear_proj",
            heads if norm_of_heads_per_token else heads * head_dim,
            device,
            current,
            sequence_groups=[groups.cp],
            measure=token_norms if norm_of_heads_per_token else None,
        )
        handles.append(layer.mlp.linear_fc2.register_forward_pre_hook(_see_input(ffn)))
        handles.append(layer.self_attention.linear_proj.register_forward_pre_hook(_see_input(head)))
        norms = []
        for norm, linear in (("input_layernorm", "self_attention.linear_qkv"), ("pre_mlp_layernorm", "mlp.linear_fc1")):
            norm_module, fused_into = getattr(layer, norm), layer.get_submodule(linear)
            fused = getattr(norm_module, "weight", None) is None
            watch = Watch(
                f"{name}.{linear if fused else norm}",
                shape.hidden_size,
                device,
                current,
                sequence_groups=[groups.cp, norm_sharded_over],
                sequence_parallel_group=norm_sharded_over,
                measure=_fused_norm(fused_into, model.config, f"{name}.{linear}") if fused else None,
            )
            if fused:
                handles.append(fused_into.register_forward_pre_hook(_see_input(watch)))
            else:
                handles.append(norm_module.register_forward_hook(_see_output(watch)))
            norms.append(watch)
        watched.append(LayerWatches(index, ffn, head, (norms[0], norms[1])))
    return watched


def _see_input(watch: Watch) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        watch.see(args[0])

    return hook


def _see_output(watch: Watch) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
    def hook(_module: nn.Module, _args: tuple[Tensor, ...], output: Tensor) -> None:
        watch.see(output)

    return hook


def _fused_norm(linear: Any, config: Any, name: str) -> Callable[[Tensor], Tensor]:
    """The norm inside a transformer-engine linear, in float32: [s, b, h] -> [s, b, h]."""
    require(
        getattr(linear, "layer_norm_weight", None) is not None,
        f"{name} has no norm before it and none inside (no layer_norm_weight); the score of hidden channels reads "
        "norm outputs. Use Megatron's local or transformer-engine GPT layer spec.",
    )

    def norm(activation: Tensor) -> Tensor:
        weight = linear.layer_norm_weight.float()
        if config.layernorm_zero_centered_gamma:
            weight = weight + 1
        size, epsilon = weight.shape, config.layernorm_epsilon
        if config.normalization == "RMSNorm":
            return nn.functional.rms_norm(activation.float(), size, weight, epsilon)
        return nn.functional.layer_norm(activation.float(), size, weight, linear.layer_norm_bias.float(), epsilon)

    return norm

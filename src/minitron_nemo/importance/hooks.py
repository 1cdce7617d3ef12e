"""Where the width scores are read in a Megatron-core GPT model, by hooks that leave its outputs untouched.

    axis     what is read                                            shape                     split over
    ffn      input of mlp.linear_fc2 (after the activation), or      [s/cp, b, f/tp]           cp
             the gate half of linear_fc1's output (before it)
    head     input of self_attention.linear_proj, L2 over d          [s/cp, b, (n/tp)*d]       cp
    hidden   outputs of input_layernorm and pre_mlp_layernorm        [s/(cp*tp), b, h]         cp, and tp if sequence
                                                                     or [s/cp, b, h]           parallel

The linears' inputs hold the full sequence of the tensor-parallel group also under sequence parallelism; the norms'
outputs do not. A norm fused into a transformer-engine linear (`linear_qkv.layer_norm_weight`) is computed once more
from the linear's input, as its output never leaves the kernel.

A hook sums over this rank's tokens and no more: [3, b, c]. What follows is small, and done for all layers at once when
the micro-batch is over (`AxisWatches.close`).

Communication per micro-batch and axis, all layers together: cp (and, for norms under sequence parallelism, tp) one
all-reduce of [rows, 3, b, c] float64, since a sample's tokens lie on several ranks and L2 and variance need the whole
sample. Neurons and heads are split over tp and stay so. Hooks communicate nothing and read no value to the host.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.utils.hooks import RemovableHandle

from minitron_nemo.checks import require
from minitron_nemo.importance.statistics import (
    TokenMask,
    add_over,
    add_samples,
    head_norms,
    partial_sums,
)
from minitron_nemo.parallel import Groups, group_rank, group_size
from minitron_nemo.shape import ModelShape


class MicroBatch:
    """The micro-batch whose forward pass comes next; `number` counts from 1, 0 means none was announced."""

    def __init__(self) -> None:
        self.number = 0
        self._masks: dict[tuple[int, int], TokenMask] = {}

    def announce(self, mask: TokenMask) -> None:
        self.number += 1
        self._masks = {(0, 1): mask}

    def mask(self, index: int, size: int) -> TokenMask:
        """The mask of the `index`-th of `size` parts of this rank's tokens."""
        if (index, size) not in self._masks:
            self._masks[index, size] = self._masks[0, 1].shard(index, size)
        return self._masks[index, size]


class Watch:
    """One hooked place: sums an activation over the tokens of the current micro-batch."""

    def __init__(
        self,
        name: str,
        row: int,
        place: int,
        current: MicroBatch,
        *,
        shard: tuple[int, int] = (0, 1),
        measure: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """
        Args:
            name: of the hooked module, for messages.
            row: of the axis' moments, over all pipeline stages.
            place: in the order in which a forward pass comes by: layer x len(PLACES) + index in `PLACES`.
            shard: which part of the announced mask's tokens lies here, of how many.
            measure: [s, b, ...] -> [s, b, c], where the activation is not yet what is scored.
        """
        self.name, self.row, self.place = name, row, place
        self.num_seen = 0
        self.sums: Tensor | None = None
        """`partial_sums` [3, b, c] of the micro-batch that is not closed yet."""
        self._current = current
        self._shard = shard
        self._measure = measure

    def see(self, activation: Tensor) -> None:
        """Sum one micro-batch."""
        # The CPU platform's function mode costs as much per call as a small op, and nothing here names a device.
        with torch._C.DisableTorchFunction(), torch.no_grad():
            mask = self._mask_of(activation)
            measured = activation if self._measure is None else self._measure(activation)
            self.sums = partial_sums(measured, mask)
        self.num_seen += 1

    def _mask_of(self, activation: Tensor) -> TokenMask:
        number = self._current.number
        if self.num_seen + 1 != number:  # no `require` in a hook: it would make the message at every layer
            raise RuntimeError(
                f"{self.name} saw forward pass {self.num_seen + 1}, but {number} micro-batches were announced. "
                "Call estimator.sample(loss_mask) once before each forward pass, on every pipeline stage."
            )
        mask = self._current.mask(*self._shard)
        if activation.dim() != 3 or activation.shape[:2] != mask.counts.shape[::-1]:
            raise ValueError(
                f"{self.name} has activations of shape {list(activation.shape)} [s, b, ...], but the loss mask "
                f"announced {mask.num_tokens.numel()} samples of {mask.seq_length} tokens on this rank. "
                "Give estimator.sample the mask [b, s] of the micro-batch that is run next."
            )
        return mask


PLACES = ("hidden (input norm)", "head", "hidden (pre-MLP norm)", "ffn", "shared_expert_ffn")
"""What is read in a layer, by axis, in the order of the forward pass."""


class AxisWatches:
    """The places of one axis on this pipeline stage and their moments over the samples so far."""

    def __init__(
        self,
        channels: int,
        device: torch.device,
        current: MicroBatch,
        groups: Sequence[ProcessGroup | None],
        *,
        shard: tuple[int, int] = (0, 1),
    ) -> None:
        """
        Args:
            channels: c, what this rank scores at each place.
            groups: those that split a sample's tokens at these places.
            shard: see `Watch`.
        """
        self.watches: list[Watch] = []
        self.channels = channels
        self._device = device
        self._current, self._groups, self._shard = current, groups, shard
        self._moments: Tensor | None = None

    def add(self, name: str, row: int, place: int, measure: Callable[[Tensor], Tensor] | None = None) -> Watch:
        """A place more; the hook that shows it its activation is the caller's."""
        self.watches.append(Watch(name, row, place, self._current, shard=self._shard, measure=measure))
        return self.watches[-1]

    @property
    def moments(self) -> Tensor:
        """Sum and sum of squares over samples of each place, [places, 2, 3, c] float64."""
        if self._moments is None:
            size = (len(self.watches), 2, 3, self.channels)
            self._moments = torch.zeros(size, dtype=torch.float64, device=self._device)
        return self._moments

    def close(self) -> Tensor:
        """Add the micro-batch that every place has seen.

        Communicates: over the groups that split the sequence, one all-reduce each.
        Returns: [places, b] bool, where an activation was not finite.
        Raises: RuntimeError: a place saw no forward pass since the micro-batch was announced.
        """
        sums = []
        for watch in self.watches:
            require(
                watch.sums is not None,
                f"{self._current.number} micro-batches were announced, but {watch.name} saw {watch.num_seen} forward "
                "passes. Run the model once after each estimator.sample(loss_mask).",
                RuntimeError,
            )
            assert watch.sums is not None
            sums.append(watch.sums)
            watch.sums = None
        num_tokens = self._current.mask(0, 1).num_tokens
        if not sums:
            return torch.zeros(0, num_tokens.numel(), dtype=torch.bool, device=self._device)
        with torch._C.DisableTorchFunction():  # as in `Watch.see`
            if any(group_size(group) > 1 for group in self._groups):
                sums = list(add_over(torch.stack(sums), groups=self._groups).unbind())
            return ~add_samples(sums, num_tokens, self.moments)


def watch_layers(
    model: Any,
    shape: ModelShape,
    groups: Groups,
    current: MicroBatch,
    handles: list[RemovableHandle],
    *,
    head_norm: str,
    neurons: str,
    contributions: bool,
) -> dict[str, AxisWatches]:
    """Hook every layer of this rank's pipeline stage: axis -> its places, one a layer, for hidden two.

    Args:
        model: the bare megatron.core GPTModel; `decoder.layers[i].layer_number` is global, from 1.
        handles: gets the hooks, also where an error ends the call half-way.
        head_norm, neurons: as in ImportanceConfig.
        contributions: see ImportanceConfig.metric.
    """
    tp, device = group_size(groups.tp), next(model.parameters()).device
    heads = shape.num_attention_heads // tp
    per_head = 1 if head_norm == "before" else shape.kv_channels
    split, norm_groups = (0, 1), [groups.cp]
    if model.config.sequence_parallel:
        split, norm_groups = (group_rank(groups.tp), tp), [groups.cp, groups.tp]
    axes = {
        "hidden": AxisWatches(shape.hidden_size, device, current, norm_groups, shard=split),
        "head": AxisWatches(heads * per_head, device, current, [groups.cp]),
    }
    if shape.has_dense_layers:
        axes["ffn"] = AxisWatches(shape.ffn_hidden_size // tp, device, current, [groups.cp])
    if shape.moe_shared_expert_intermediate_size is not None:
        shared = shape.moe_shared_expert_intermediate_size // tp
        axes["shared_expert_ffn"] = AxisWatches(shared, device, current, [groups.cp])

    def token_norms(activation: Tensor) -> Tensor:
        return head_norms(activation, heads)

    for layer in model.decoder.layers:
        index = layer.layer_number - 1
        name, first = f"decoder.layers.{index}", index * len(PLACES)

        projection = layer.self_attention.linear_proj
        measure = (
            None if head_norm == "after" else _written_by_heads(projection, heads) if contributions else token_norms
        )
        head = axes["head"].add(f"{name}.self_attention.linear_proj", index, first + 1, measure)
        handles.append(projection.register_forward_pre_hook(_see_input(head)))

        for number, (norm_name, linear_name) in enumerate(NORMS):
            norm = getattr(layer, norm_name)
            fused = getattr(norm, "weight", None) is None
            module = layer.get_submodule(linear_name) if fused else norm
            place = f"{name}.{linear_name if fused else norm_name}"
            normalise = fused_norm(module, model.config, place) if fused and not contributions else None
            watch = axes["hidden"].add(place, 2 * index + number, first + 2 * number, normalise)
            if fused or contributions:
                handles.append(module.register_forward_pre_hook(_see_input(watch)))
            else:
                handles.append(module.register_forward_hook(_see_output(watch)))

        axis, mlp, mlp_name = "ffn", layer.mlp, f"{name}.mlp"
        if shape.has_experts(index):
            if "shared_expert_ffn" not in axes:
                continue
            axis, mlp, mlp_name = "shared_expert_ffn", layer.mlp.shared_experts, f"{name}.mlp.shared_experts"
        require(
            hasattr(mlp, "linear_fc2"),
            f"{mlp_name} is a {type(mlp).__name__} without linear_fc2, whose input scores its neurons. Use Megatron's "
            "local or transformer-engine GPT layer spec.",
        )
        if neurons == "pre_activation":
            watch = axes[axis].add(f"{mlp_name}.linear_fc1", index, first + PLACES.index(axis))
            handles.append(mlp.linear_fc1.register_forward_hook(_see_gate(watch, axes[axis].channels)))
        else:
            written = _written_by_neurons(mlp.linear_fc2) if contributions else None
            watch = axes[axis].add(f"{mlp_name}.linear_fc2", index, first + PLACES.index(axis), written)
            handles.append(mlp.linear_fc2.register_forward_pre_hook(_see_input(watch)))
    return axes


NORMS = (("input_layernorm", "self_attention.linear_qkv"), ("pre_mlp_layernorm", "mlp.linear_fc1"))
"""The norms of a layer, each with the linear that holds it where transformer-engine has fused the two."""


def _see_input(watch: Watch) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        watch.see(args[0])

    return hook


def _see_output(watch: Watch) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
    def hook(_module: nn.Module, _args: tuple[Tensor, ...], output: Tensor) -> None:
        watch.see(output)

    return hook


def _see_gate(watch: Watch, neurons: int) -> Callable[[nn.Module, tuple[Tensor, ...], Any], None]:
    """Sees what linear_fc1 gives the activation function: its first half where gated, plus the bias it holds back."""

    def hook(_module: nn.Module, _args: tuple[Tensor, ...], output: tuple[Tensor, Tensor | None]) -> None:
        value, bias = output
        watch.see(value[..., :neurons] if bias is None else value[..., :neurons] + bias[:neurons])

    return hook


def _written_by_neurons(linear_fc2: Any) -> Callable[[Tensor], Tensor]:
    """[s, b, f/tp] -> |what each neuron adds to the stream|, with the sign of its activation."""
    column_norms = linear_fc2.weight.detach().float().norm(dim=0)  # [f/tp], over all of h: row-parallel keeps it whole
    return lambda activation: activation.float() * column_norms


def _written_by_heads(linear_proj: Any, heads: int) -> Callable[[Tensor], Tensor]:
    """[s, b, (n/tp)*d] -> L2 norm of what each head adds to the stream [s, b, n/tp], float32.

    ||W_i a|| = ||R_i a|| with W_i = Q_i R_i, so that a token costs d^2 a head, not d h.
    """
    columns = linear_proj.weight.detach().float().unflatten(1, (heads, -1)).movedim(1, 0)  # [n/tp, h, d]
    triangles = torch.linalg.qr(columns, mode="r").R  # [n/tp, d, d]

    def norms(activation: Tensor) -> Tensor:
        by_head = activation.float().unflatten(-1, (heads, -1))
        return torch.einsum("sbnd,nkd->sbnk", by_head, triangles).norm(dim=-1)

    return norms


def fused_norm(linear: Any, config: Any, name: str) -> Callable[[Tensor], Tensor]:
    """The norm inside a transformer-engine linear, in float32: [s, b, h] -> [s, b, h]."""
    require(
        getattr(linear, "layer_norm_weight", None) is not None,
        f"{name} has no norm before it and none inside (no layer_norm_weight), and hidden channels are read at "
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

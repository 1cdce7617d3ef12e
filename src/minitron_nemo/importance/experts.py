"""Importance of routed experts and of their neurons, read where Megatron-core computes them.

    axis        what is read of each token routed to the expert                        shape
    expert      L2 norm of the expert's output, which carries the router's weight      [t]
    expert_ffn  input of the expert's linear_fc2, which carries the router's weight;   [t, f/etp]
                for metric=contributions times the norm of its column of linear_fc2

An expert's tokens, of the whole calibration set, make one sequence: its score is by default their mean, over routed
tokens only, as in the published reference implementation (the papers prune dense models). An expert that no token was
routed to scores 0. Tokens whose loss mask is 0 are routed, and contribute nothing. What stays are sums over those
tokens, which add where runs merge; see `scores.py`.

Communication per micro-batch and expert layer: that of routing.py; with expert tensor parallelism, one all-reduce of
each expert's output [t, h]. At the end, in `expert_moments`: tp, cp, dp and pp, two sums. No hook reads a value to the
host.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from minitron_nemo.activations.routing import Routing
from minitron_nemo.activations.tokens import AnnouncedBatch, TokenMask
from minitron_nemo.checks import Mistake
from minitron_nemo.config.importance import ImportanceConfig
from minitron_nemo.importance.statistics import partial_sums
from minitron_nemo.parallel import Groups, all_reduce_sum, group_rank, group_size
from minitron_nemo.shape import ModelShape


class ExpertWatch:
    """The routed experts of one layer on this rank: sums over the tokens that counted."""

    def __init__(self, routing: Routing, shape: ModelShape, groups: Groups, config: ImportanceConfig) -> None:
        self.index, self.experts = routing.index, routing.experts
        count, neurons = len(self.experts), (shape.moe_ffn_hidden_size or 0) // group_size(groups.etp)
        self.num_tokens = torch.zeros(count, dtype=torch.float64, device=routing.device)
        self.output_sums = torch.zeros(3, count, dtype=torch.float64, device=routing.device)
        self.neuron_sums = torch.zeros(3, count, neurons, dtype=torch.float64, device=routing.device)
        self._routing, self._etp = routing, groups.etp
        self._contributions = config.metric == "contributions"

    @torch.no_grad()
    def see(self, expert: int, neurons: Tensor, outputs: Tensor) -> None:
        """Add what local expert `expert` made of its tokens: [t, f/etp] and [t, h], both times the router's weight.

        Communicates: expert tensor parallelism, one all-reduce of [t, h].
        """
        rows = neurons.shape[0]
        counts = self._routing.counted(expert, rows)
        self.num_tokens[expert] += counts.sum()
        whole = outputs if group_size(self._etp) == 1 else all_reduce_sum(outputs.float(), group=self._etp)
        # where, not a product: a token that does not count brings in nothing, not even its NaN
        norms = torch.linalg.vector_norm(whole.float(), dim=-1).where(counts, 0).double()
        self.output_sums[:, expert] += torch.stack([norms.sum(), norms.sum(), norms.square().sum()])
        counted = neurons.where(counts.unsqueeze(1), 0).unsqueeze(1)  # [t, 1, f/etp]
        everything = TokenMask(torch.ones(1, rows, dtype=torch.bool), self.num_tokens, None)
        self.neuron_sums[:, expert] += partial_sums(counted, everything)[:, 0]

    def neurons(self) -> Tensor:
        """Sum |a|, sum a and sum a^2 of each neuron over its tokens [3, e/ep, f/etp]."""
        if not self._contributions:
            return self.neuron_sums
        columns = [
            self._routing.written_by(expert).detach().double().norm(dim=0) for expert in range(len(self.experts))
        ]
        norms = torch.stack(columns)  # [e/ep, f/etp], over all of h: row-parallel keeps it whole
        return self.neuron_sums * torch.stack([norms, norms, norms.square()])

    def running(self) -> dict[str, Tensor]:
        """By name, every tensor that is added to."""
        return {"num_tokens": self.num_tokens, "output_sums": self.output_sums, "neuron_sums": self.neuron_sums}

    def require_finite(self) -> None:
        """Raises: ValueError: an activation of an expert of this rank was not finite. Waits for the device."""
        totals = {"expert_ffn": self.neuron_sums.sum((0, 2)), "expert": self.output_sums.sum(0)}
        _require_finite({axis: total.unsqueeze(0) for axis, total in totals.items()}, [self.index], self.experts)


def watch_experts(
    model: Any,
    shape: ModelShape,
    groups: Groups,
    current: AnnouncedBatch,
    handles: list[RemovableHandle],
    config: ImportanceConfig,
) -> list[ExpertWatch]:
    """Hook every expert layer of this rank's pipeline stage.

    Args:
        model: the bare megatron.core GPTModel.
        handles: gets the hooks, also where an error ends the call half-way.
    """
    watches = []
    for layer in model.decoder.layers:
        index = layer.layer_number - 1
        if not shape.has_experts(index):
            continue
        routing = Routing(index, layer.mlp, groups, current, sequence_parallel=model.config.sequence_parallel)
        watches.append(ExpertWatch(routing, shape, groups, config))
        routing.show(watches[-1].see, handles)
    return watches


def expert_moments(
    watches: Sequence[ExpertWatch], shape: ModelShape, groups: Groups, device: torch.device
) -> dict[str, Tensor]:
    """Number of tokens, sum |a|, sum a and sum a^2 of each expert [l, 4, e] and of each of its neurons [l, e, 4, f].

    By axis, `expert` and `expert_ffn`, float64, equal on every rank; rows of dense layers are 0.
    Communicates: tp, cp, dp and pp, sums of two tensors of that size.
    Raises: ValueError: an expert's activations were not finite (names layer, axis and expert), on every rank.
    """
    layers, experts, neurons = shape.num_layers, shape.num_moe_experts or 0, shape.moe_ffn_hidden_size or 0
    outputs = torch.zeros(layers, 4, experts, dtype=torch.float64, device=device)
    inside = outputs.new_zeros(layers, experts, 4, neurons)
    part = group_rank(groups.etp)
    for watch in watches:
        here, width = slice(watch.experts[0], watch.experts[-1] + 1), watch.neuron_sums.shape[-1]
        mine = inside[watch.index, here, :, part * width : (part + 1) * width]
        mine[:, 0], mine[:, 1:] = watch.num_tokens.unsqueeze(-1), watch.neurons().movedim(0, 1)
        if part == 0:  # the ranks one expert is split over saw the same tokens and the same whole outputs
            outputs[watch.index, :, here] = torch.cat([watch.num_tokens.unsqueeze(0), watch.output_sums])
    for group in (groups.tp, groups.cp, groups.dp, groups.pp):
        outputs, inside = (all_reduce_sum(local, group=group) for local in (outputs, inside))
    _require_finite({"expert_ffn": inside.sum((2, 3)), "expert": outputs.sum(1)}, range(layers), range(experts))
    return {"expert": outputs, "expert_ffn": inside}


def _require_finite(totals: dict[str, Tensor], layers: Sequence[int], experts: Sequence[int]) -> None:
    """Name the first expert, in the order of the forward pass, whose activations are not finite.

    Args:
        totals: by axis [l, e], not finite where a sum of the expert is not.
        layers, experts: which they are.
    """
    # Reading the values waits for the device; the pass is over.
    broken = [
        (layer, place, expert)
        for place, total in enumerate(totals.values())
        for layer, expert in (~total.isfinite()).nonzero().tolist()
    ]
    if broken:
        layer, place, expert = min(broken)
        raise Mistake(
            f"Activations of axis {list(totals)[place]} in decoder.layers.{layers[layer]} are not finite (NaN or "
            f"infinity) in expert {experts[expert]}; scores from them rank nothing. Check the checkpoint and its dtype "
            "with the evaluate stage."
        )

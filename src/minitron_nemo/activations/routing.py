"""Which of the tokens that a layer's experts are handed count.

    routed      which experts a token of this rank goes to                             [s*b/(cp*tp if sp), e]
    code        the same over every rank that sends tokens here: 0 not routed,
                1 routed and masked out, 2 routed                                      [e/ep, tokens of those ranks]
    neurons     input of an expert's linear_fc2, times the router's weight             [t, f/etp]
    outputs     what the expert adds, times the router's weight                        [t, h]

Experts receive tokens expert by expert, within one rank by rank, within that in the order of [s, b]: so the places of
`code` that are not 0 are the rows an expert sees.

Communication per micro-batch and expert layer: one all-gather of `code` over the ranks that exchange tokens (expert
model and expert tensor parallelism). No hook reads a value to the host.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from minitron_nemo.activations.tokens import AnnouncedBatch
from minitron_nemo.checks import require
from minitron_nemo.parallel import Groups, ProcessGroup, all_gather_shards, group_rank, group_size

SeeExpert = Callable[[int, Tensor, Tensor], None]
"""(local expert, its neurons [t, f/etp], its outputs [t, h]), both of the tokens it was handed."""


class Routing:
    """The routing of one layer's tokens to the experts on this rank."""

    def __init__(
        self, index: int, mlp: Any, groups: Groups, current: AnnouncedBatch, *, sequence_parallel: bool
    ) -> None:
        """
        Args:
            index: global layer index, from 0.
            mlp: the layer's megatron.core MoELayer.
        """
        self.index, self.place = index, f"decoder.layers.{index}.mlp"
        self.experts: list[int] = mlp.local_expert_indices
        """Global indices of those on this rank."""
        self.device: torch.device = mlp.router.weight.device
        self.num_seen = 0
        self._mlp, self._current = mlp, current
        self._exchange = _groups_in_order_of_arrival(mlp)
        self._shard = (group_rank(groups.tp), group_size(groups.tp)) if sequence_parallel else (0, 1)
        self._is_copy = not sequence_parallel and group_rank(groups.tp) > 0  # every tp rank routes the same tokens
        self._code = torch.zeros(len(self.experts), 0, dtype=torch.uint8, device=self.device)

    def show(self, see: SeeExpert, handles: list[RemovableHandle]) -> None:
        """Hook the layer so that its routing is kept here and `see` sees every local expert's tokens."""
        handles.append(self._mlp.router.register_forward_hook(lambda _module, _args, output: self.route(output[1])))
        experts = self._mlp.experts
        if hasattr(experts, "local_experts"):
            for expert, module in enumerate(experts.local_experts):
                handles.append(module.linear_fc2.register_forward_hook(_on_expert(expert, see)))
            return
        require(
            hasattr(experts, "linear_fc2"),
            f"{self.place}.experts is a {type(experts).__name__} whose linear_fc2 cannot be watched. "
            "Use experts one by one or transformer-engine's grouped linears (moe_use_legacy_grouped_gemm=false).",
        )
        handles.append(experts.linear_fc2.register_forward_hook(_on_grouped_experts(see)))

    def written_by(self, expert: int) -> Tensor:
        """Weight [h, f/etp] through which the neurons of local expert `expert` write to the stream."""
        experts = self._mlp.experts
        if hasattr(experts, "local_experts"):
            weight: Tensor = experts.local_experts[expert].linear_fc2.weight
            return weight
        grouped: Tensor = getattr(experts.linear_fc2, f"weight{expert}")  # transformer-engine's name
        return grouped

    @torch.no_grad()
    def route(self, routed: Tensor) -> None:
        """A micro-batch's routing on this rank, [s*b, e] bool. Communicates: one all-gather a group that exchanges."""
        self._current.require_is_next(self.place, self.num_seen)
        counts = self._current.mask(*self._shard).counts.t().flatten().to(routed.device)  # [s*b], Megatron's order
        require(
            routed.shape[0] == counts.numel(),
            f"{self.place} routes {routed.shape[0]} tokens, but the loss mask announced {counts.numel()} on this rank. "
            f"{self._current.mend_of_mask}",
        )
        if self._is_copy:
            counts = torch.zeros_like(counts)
        code = routed.to(torch.uint8) * (1 + counts.to(torch.uint8)).unsqueeze(1)
        for group in self._exchange:
            code = torch.cat(all_gather_shards(code, group=group))
        self._code = code[:, self.experts[0] : self.experts[-1] + 1].t().contiguous()
        self.num_seen += 1

    def counted(self, expert: int, rows: int) -> Tensor:
        """Which of the `rows` tokens that local expert `expert` was handed count: [rows] bool."""
        code = self._code[expert]
        arrived = (code == 0).to(torch.uint8).argsort(stable=True)[:rows]  # no host value: the rows say how many
        return code[arrived] == 2


def _groups_in_order_of_arrival(mlp: Any) -> list[ProcessGroup]:
    """The groups over which one gathers tokens to get them in the order in which the dispatcher hands them out."""
    kind, dispatcher = mlp.config.moe_token_dispatcher_type, mlp.token_dispatcher
    orders = {
        "allgather": [dispatcher.tp_ep_group],
        "alltoall": [dispatcher.ep_group, dispatcher.tp_group],
    }
    require(
        kind in orders,
        f"moe_token_dispatcher_type={kind} hands out tokens in an order that is not known here; importance of experts "
        f"can be estimated with {' or '.join(orders)}.",
    )
    return orders[kind]


def _on_expert(expert: int, see: SeeExpert) -> Callable[[nn.Module, tuple[Tensor, ...], tuple[Tensor, Any]], None]:
    def hook(_module: nn.Module, args: tuple[Tensor, ...], output: tuple[Tensor, Any]) -> None:
        see(expert, args[0], output[0])

    return hook


def _on_grouped_experts(see: SeeExpert) -> Callable[[nn.Module, tuple[Tensor, list[int]], tuple[Tensor, Any]], None]:
    """transformer-engine's grouped linear takes all experts' tokens and how many each has, as host numbers."""

    def hook(_module: nn.Module, args: tuple[Tensor, list[int]], output: tuple[Tensor, Any]) -> None:
        parts = zip(args[0].split(args[1]), output[0].split(args[1]), strict=True)
        for expert, (neurons, outputs) in enumerate(parts):
            see(expert, neurons, outputs)

    return hook

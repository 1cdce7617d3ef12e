"""Importance of routed experts and of their neurons, read where Megatron-core computes them.

    axis        what is read of each token routed to the expert                        shape
    expert      L2 norm of the expert's output, which carries the router's weight      [t]
    expert_ffn  input of the expert's linear_fc2, which carries the router's weight    [t, f/etp]

An expert's tokens, of the whole calibration set, make one sequence: its score is by default their mean, over routed
tokens only, as in the published reference implementation (the papers prune dense models). An expert that no token was
routed to scores 0. Tokens whose loss mask is 0 are routed, and contribute nothing. Kept are sums over those tokens,
which add where runs merge; see `scores.py`.

    routed      which experts a token of this rank goes to                             [s*b/(cp*tp if sp), e]
    code        the same over every rank that sends tokens here: 0 not routed,
                1 routed and masked out, 2 routed                                      [e/ep, tokens of those ranks]

Experts receive tokens expert by expert, within one rank by rank, within that in the order of [s, b]: so the places of
`code` that are not 0 are the rows an expert sees.

Communication per micro-batch and expert layer: one all-gather of `code` over the ranks that exchange tokens (expert
model and expert tensor parallelism); with expert tensor parallelism, one all-reduce of each expert's output [t, h]. At
the end, in `expert_moments`: tp, cp, dp and pp, two sums. No hook reads a value to the host.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.utils.hooks import RemovableHandle

from minitron_nemo.checks import require
from minitron_nemo.importance.hooks import MicroBatch
from minitron_nemo.importance.statistics import TokenMask, partial_sums
from minitron_nemo.parallel import Groups, all_gather_shards, all_reduce_sum, group_rank, group_size
from minitron_nemo.shape import ModelShape


class ExpertWatch:
    """The routed experts of one layer on this rank: sums over the tokens that counted."""

    def __init__(
        self, index: int, mlp: Any, shape: ModelShape, groups: Groups, current: MicroBatch, *, sequence_parallel: bool
    ) -> None:
        """
        Args:
            index: global layer index, from 0.
            mlp: the layer's megatron.core MoELayer.
        """
        self.index, self.place = index, f"decoder.layers.{index}.mlp"
        self.experts: list[int] = mlp.local_expert_indices
        device, count = mlp.router.weight.device, len(self.experts)
        self.num_tokens = torch.zeros(count, dtype=torch.float64, device=device)
        neurons = (shape.moe_ffn_hidden_size or 0) // group_size(groups.etp)
        self.output_sums = torch.zeros(3, count, dtype=torch.float64, device=device)
        self.neuron_sums = torch.zeros(3, count, neurons, dtype=torch.float64, device=device)
        self.num_seen = 0
        self._current, self._etp = current, groups.etp
        self._exchange = _groups_in_order_of_arrival(mlp)
        self._shard = (group_rank(groups.tp), group_size(groups.tp)) if sequence_parallel else (0, 1)
        self._is_copy = not sequence_parallel and group_rank(groups.tp) > 0  # every tp rank routes the same tokens
        self._code = torch.zeros(count, 0, dtype=torch.uint8, device=device)

    @torch.no_grad()
    def route(self, routed: Tensor) -> None:
        """A micro-batch's routing on this rank, [s*b, e] bool. Communicates: one all-gather a group that exchanges."""
        number = self._current.number
        require(
            self.num_seen + 1 == number,
            f"{self.place} saw forward pass {self.num_seen + 1}, but {number} micro-batches were announced. "
            "Call estimator.sample(loss_mask) once before each forward pass, on every pipeline stage.",
            RuntimeError,
        )
        counts = self._current.mask(*self._shard).counts.t().flatten().to(routed.device)  # [s*b], Megatron's order
        require(
            routed.shape[0] == counts.numel(),
            f"{self.place} routes {routed.shape[0]} tokens, but the loss mask announced {counts.numel()} on this rank. "
            "Give estimator.sample the mask [b, s] of the micro-batch that is run next.",
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

    @torch.no_grad()
    def see(self, expert: int, neurons: Tensor, outputs: Tensor) -> None:
        """Add what local expert `expert` made of its tokens: [t, f/etp] and [t, h], both times the router's weight.

        Communicates: expert tensor parallelism, one all-reduce of [t, h].
        """
        rows = neurons.shape[0]
        counts = self.counted(expert, rows)
        self.num_tokens[expert] += counts.sum()
        whole = outputs if group_size(self._etp) == 1 else all_reduce_sum(outputs.float(), group=self._etp)
        # where, not a product: a token that does not count brings in nothing, not even its NaN
        norms = torch.linalg.vector_norm(whole.float(), dim=-1).where(counts, 0).double()
        self.output_sums[:, expert] += torch.stack([norms.sum(), norms.sum(), norms.square().sum()])
        counted = neurons.where(counts.unsqueeze(1), 0).unsqueeze(1)  # [t, 1, f/etp]
        everything = TokenMask(torch.ones(1, rows, dtype=torch.bool), self.num_tokens, None)
        self.neuron_sums[:, expert] += partial_sums(counted, everything)[:, 0]

    def require_finite(self) -> None:
        """Raises: ValueError: an activation of an expert of this rank was not finite. Waits for the device."""
        totals = {"expert_ffn": self.neuron_sums.sum((0, 2)), "expert": self.output_sums.sum(0)}
        _require_finite({axis: total.unsqueeze(0) for axis, total in totals.items()}, [self.index], self.experts)


def watch_experts(
    model: Any, shape: ModelShape, groups: Groups, current: MicroBatch, handles: list[RemovableHandle]
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
        mlp = layer.mlp
        watch = ExpertWatch(index, mlp, shape, groups, current, sequence_parallel=model.config.sequence_parallel)
        show_experts(mlp, watch, handles)
        watches.append(watch)
    return watches


def show_experts(mlp: Any, watch: ExpertWatch, handles: list[RemovableHandle]) -> None:
    """Hook a MoELayer so that `watch` sees its routing and every local expert's tokens."""
    handles.append(mlp.router.register_forward_hook(_see_routing(watch)))
    if hasattr(mlp.experts, "local_experts"):
        for expert, module in enumerate(mlp.experts.local_experts):
            handles.append(module.linear_fc2.register_forward_hook(_see_expert(watch, expert)))
        return
    require(
        hasattr(mlp.experts, "linear_fc2"),
        f"{watch.place}.experts is a {type(mlp.experts).__name__} whose linear_fc2 cannot be watched. "
        "Use experts one by one or transformer-engine's grouped linears (moe_use_legacy_grouped_gemm=false).",
    )
    handles.append(mlp.experts.linear_fc2.register_forward_hook(_see_grouped_experts(watch)))


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
        mine[:, 0], mine[:, 1:] = watch.num_tokens.unsqueeze(-1), watch.neuron_sums.movedim(0, 1)
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
        raise ValueError(
            f"Activations of axis {list(totals)[place]} in decoder.layers.{layers[layer]} are not finite (NaN or "
            f"infinity) in expert {experts[expert]}; scores from them rank nothing. Check the checkpoint and its dtype "
            "with the evaluate stage."
        )


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


def _see_routing(watch: ExpertWatch) -> Callable[[nn.Module, Any, tuple[Tensor, Tensor]], None]:
    def hook(_module: nn.Module, _args: Any, output: tuple[Tensor, Tensor]) -> None:
        watch.route(output[1])

    return hook


def _see_expert(watch: ExpertWatch, expert: int) -> Callable[[nn.Module, Any, tuple[Tensor, Any]], None]:
    def hook(_module: nn.Module, args: tuple[Tensor, ...], output: tuple[Tensor, Any]) -> None:
        watch.see(expert, args[0], output[0])

    return hook


def _see_grouped_experts(watch: ExpertWatch) -> Callable[[nn.Module, Any, tuple[Tensor, Any]], None]:
    """transformer-engine's grouped linear takes all experts' tokens and how many each has, as host numbers."""

    def hook(_module: nn.Module, args: tuple[Tensor, list[int]], output: tuple[Tensor, Any]) -> None:
        parts = zip(args[0].split(args[1]), output[0].split(args[1]), strict=True)
        for expert, (neurons, outputs) in enumerate(parts):
            watch.see(expert, neurons, outputs)

    return hook

"""Second moments of what linears read, measured in calibration passes: C = sum a a^T over the tokens that count.

    input of           a                                       C's rows on this rank
    linear_fc2         [s/cp, b, f/tp]                         [f/tp, f]
    linear_proj        [s/cp, b, (n/tp)*d]                     [(n/tp)*d, n*d]
    an expert's fc2    [t, f/etp], the tokens routed to it     [f/etp, f]

Products of up to 4096 tokens are summed in float32, everything beyond in float64.

Communication: while measuring, tp (of an expert: etp) gathers each micro-batch's input [t, f]; merging sums over cp and
dp and gathers over tp, once per linear.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from minitron_nemo.activations.products import product_over_tokens
from minitron_nemo.activations.routing import Routing
from minitron_nemo.activations.tokens import AnnouncedBatch
from minitron_nemo.parallel import Groups, ProcessGroup, all_gather_shards, all_reduce_sum, group_rank, group_size
from minitron_nemo.shape import ModelShape

TOKENS_AT_ONCE = 4096  # float32 copies of the input and sums of its products reach no further

CalibrationPass = Callable[[Callable[[dict[str, Tensor]], None]], None]
"""Runs one forward pass of the calibration set through the model, on every rank; calls its argument with each
micro-batch (`loss_mask` [b, s/cp]) before that micro-batch's forward, on every pipeline stage."""


def announced_batch() -> AnnouncedBatch:
    """What the announcements of a `CalibrationPass` go to."""
    return AnnouncedBatch(call="Call what the calibration pass is given", give="Announce")


def rows_that_count(activation: Tensor, current: AnnouncedBatch, name: str) -> Tensor:
    """[s/cp, b, c] -> [t, c], see `TokenMask.rows_of`.

    Raises: ValueError: the mask is of another micro-batch size or length.
    """
    mask = current.mask()
    current.require_holds(name, activation, mask)
    return mask.rows_of(activation)


class SecondMoment:
    """Sum of outer products of rows, [left, right] float64: of an input with itself C = sum a a^T, this rank's rows."""

    def __init__(self, left: int, right: int, device: torch.device) -> None:
        self.total = torch.zeros(left, right, dtype=torch.float64, device=device)

    def add(self, left: Tensor, right: Tensor) -> None:
        """Add left^T right of [t, left] and [t, right], any float dtype."""
        for some, others in zip(left.split(TOKENS_AT_ONCE), right.split(TOKENS_AT_ONCE), strict=True):
            self.total += product_over_tokens(some, others)

    def merge_over(self, groups: Sequence[ProcessGroup | None]) -> Tensor:
        """The sum over the ranks of `groups`, which saw other tokens; its own is freed. Communicates: each, once."""
        total, self.total = self.total, self.total.new_empty(0)
        for group in groups:
            total = all_reduce_sum(total, group=group)
        return total


class DenseInput:
    """The input of a linear that tensor parallelism splits by its input; C's rows of this rank's part of it."""

    def __init__(self, name: str, linear: Any, groups: Groups, current: AnnouncedBatch, parts: int = 1) -> None:
        """
        Args:
            parts: of the tokens, each with a C of its own.
        """
        self.name, self.linear = name, linear
        self._groups, self._current = groups, current
        mine = linear.weight.shape[1]
        whole = mine * group_size(groups.tp)
        self._moments = [SecondMoment(mine, whole, linear.weight.device) for _ in range(parts)]
        self.num_seen = 0

    @torch.no_grad()
    def see(self, activation: Tensor, part: int = 0) -> Tensor:
        """Add a micro-batch [s/cp, b, f/tp]; returns its tokens that count [t, f/tp]. Communicates: tp, one gather."""
        self._current.require_is_next(self.name, self.num_seen)
        self.num_seen += 1
        rows = rows_that_count(activation, self._current, self.name)
        whole = torch.cat(all_gather_shards(rows, group=self._groups.tp), dim=1)
        self._moments[part].add(rows, whole)
        return rows

    def merge_over_ranks(self, part: int = 0) -> Tensor:
        """C [f, f] over all tokens of a part, equal on every rank. Communicates: cp and dp (sum), tp (gather)."""
        rows = self._moments[part].merge_over([self._groups.cp, self._groups.dp])
        return torch.cat(all_gather_shards(rows, group=self._groups.tp))

    def gather_weight(self) -> Tensor:
        """[h, f] in the model's dtype. Communicates: tp."""
        return torch.cat(all_gather_shards(self.linear.weight.detach(), group=self._groups.tp), dim=1)

    def set_weight(self, full: Tensor) -> None:
        """Overwrite this rank's columns with those of [h, f]."""
        part = full.chunk(group_size(self._groups.tp), dim=1)[group_rank(self._groups.tp)]
        self.linear.weight.data.copy_(part)


class ExpertInputs:
    """The inputs of the linear_fc2 of one layer's experts on this rank: per expert C's rows."""

    def __init__(self, routing: Routing, mlp: Any, shape: ModelShape, groups: Groups) -> None:
        """
        Args:
            mlp: the layer's megatron.core MoELayer.
        """
        self.index, self.place, self.experts = routing.index, routing.place, routing.experts
        self._routing, self._groups, self._mlp = routing, groups, mlp
        self._whole = shape.moe_ffn_hidden_size or 0
        self._part = self._whole // group_size(groups.etp)
        self._moments = [SecondMoment(self._part, self._whole, routing.device) for _ in self.experts]
        self._num_experts = shape.num_moe_experts or 0
        self._num_tokens = torch.zeros(len(self.experts), dtype=torch.float64, device=routing.device)

    @torch.no_grad()
    def see(self, expert: int, neurons: Tensor, outputs: Tensor) -> None:
        """Add local expert `expert`'s tokens [t, f/etp]. Communicates: expert tensor parallelism, one all-gather."""
        counts = self._routing.counted(expert, neurons.shape[0])
        self._num_tokens[expert] += counts.sum()
        rows = neurons.where(counts.unsqueeze(1), 0)  # no host value: tokens that do not count are 0, even a NaN
        whole = torch.cat(all_gather_shards(rows, group=self._groups.etp), dim=1)
        self._moments[expert].add(rows, whole)

    def tokens_over_ranks(self) -> list[int]:
        """Calibration tokens that each expert of the layer saw, equal on every rank of this stage.

        Communicates: tp, cp and dp (sum). Waits for the device.
        """
        total = torch.zeros(self._num_experts, dtype=torch.float64, device=self._routing.device)
        if group_rank(self._groups.etp) == 0:  # the ranks one expert is split over saw the same tokens
            total[self.experts[0] : self.experts[-1] + 1] = self._num_tokens
        for group in (self._groups.tp, self._groups.cp, self._groups.dp):
            total = all_reduce_sum(total, group=group)
        return [int(count) for count in total.tolist()]

    def merge_over_ranks(self, expert: int) -> Tensor:
        """C [f, f] of global expert `expert` over all its tokens, equal on every rank of this stage.

        Communicates: tp, cp and dp (sum): whichever of them holds the expert, other tokens of it, or a part of it.
        """
        total = torch.zeros(self._whole, self._whole, dtype=torch.float64, device=self._routing.device)
        if expert in self.experts:
            first = group_rank(self._groups.etp) * self._part
            total[first : first + self._part] = self._moments[self.experts.index(expert)].total
        for group in (self._groups.tp, self._groups.cp, self._groups.dp):
            total = all_reduce_sum(total, group=group)
        return total

    def weight_of(self, expert: int) -> Tensor:
        """This rank's [h, f/etp] of global expert `expert`, which is here."""
        local, experts = self.experts.index(expert), self._mlp.experts
        if hasattr(experts, "local_experts"):
            return experts.local_experts[local].linear_fc2.weight
        return getattr(experts.linear_fc2, f"weight{local}")

    def gather_weight(self, expert: int) -> Tensor:
        """[h, f] in the model's dtype. Communicates: etp."""
        return torch.cat(all_gather_shards(self.weight_of(expert).detach(), group=self._groups.etp), dim=1)

    def set_weight(self, expert: int, full: Tensor) -> None:
        """Overwrite this rank's columns with those of [h, f]."""
        part = full.chunk(group_size(self._groups.etp), dim=1)[group_rank(self._groups.etp)]
        self.weight_of(expert).data.copy_(part)

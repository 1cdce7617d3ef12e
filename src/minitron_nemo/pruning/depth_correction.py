"""Dropped layers stood in for by the layer before them, in closed form.

A run of dropped layers p+1 .. q after a kept layer p adds d to the residual stream. What of d is linear in the neurons
of layer p, its linear_fc2 can write itself:

    a     input of layer p's linear_fc2                               [s/cp, b, f/tp]
    d     output of layer q minus output of layer p                   [s/cp, b, h], or [s/(cp*tp), b, h]
    C, X  sums of a a^T and d a^T over the tokens that count          [f, f], [h, f] float64

    least_squares    W += X (C + lambda)^-1,    lambda = ridge * mean of C's diagonal
    scale            W *= 1 + <X, W> / <W C, W>, the multiple of what layer p writes that fits d best

The model stays a standard one, of the same size. All runs are measured in one pass over the intact model.

Communication: per micro-batch tp gathers a, and d where the sequence is split over it; at the end cp and dp (sum) and
tp (gather), once per run; pp once, to agree on errors. Where a run crosses pipeline stages, each micro-batch's output
of layer q is sent back to layer p's stage, which takes it before it begins its next forward. Memory per run: C's rows
[f/tp, f] and X's columns [h, f/tp] float64; for one run at a time the whole of both.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from minitron_nemo.activations.hooks import evaluating, hooks_until_the_end, on_input, on_output
from minitron_nemo.activations.tokens import AnnouncedBatch, mark_tokens_over
from minitron_nemo.checks import require
from minitron_nemo.config.pruning import DepthCorrectionConfig
from minitron_nemo.least_squares.fits import multiple_of, regress
from minitron_nemo.parallel import Groups, all_gather_shards, all_reduce_sum, gather_objects, receive_from, send_to
from minitron_nemo.places import READERS, in_layer
from minitron_nemo.plan import PruningPlan
from minitron_nemo.pruning.second_moments import (
    CalibrationPass,
    DenseInput,
    SecondMoment,
    announced_batch,
    rows_that_count,
)
from minitron_nemo.weights import bare_gpt


@dataclass(frozen=True)
class CorrectedRun:
    """Neighbouring dropped layers and what stands in for them; layer indices from 0."""

    layer: int
    """The kept layer before them, whose linear_fc2 changed."""
    first: int
    last: int
    error: float
    """sum |d - what stands in for it|^2 / sum |d|^2 over the calibration tokens; 1 is plain dropping."""


@torch.no_grad()
def correct_depth(
    model: nn.Module,
    plan: PruningPlan,
    groups: Groups,
    run: CalibrationPass,
    config: DepthCorrectionConfig | None = None,
) -> tuple[CorrectedRun, ...]:
    """Change, in place, linear_fc2 of each kept layer that dropped layers follow.

    Layers dropped from the very beginning have no layer before them and go uncorrected.

    Args:
        model: GPTModel of shape plan.source on this rank, bare or wrapped, all layers present.
        plan: says which layers stay; its other axes are not read.
        run: called once, unless no kept layer precedes a dropped one; finishes a micro-batch's pass through the
            pipeline stages' forwards before it begins the next.
    Returns: the runs, equal on every rank.
    Communicates: see the module's text; every rank takes part.
    Raises: ValueError, on every rank: a run follows a layer of experts; activations are not finite; C + lambda is not
        positive definite.
    """
    config = config or DepthCorrectionConfig()
    runs = list(dropped_runs(plan))
    for before, last in runs:
        require(
            not plan.source.has_experts(before),
            f"Layer {before}, after which layers {before + 1} to {last} are dropped, has experts: no single linear_fc2 "
            "could stand in for them. Set prune.surgery.correct_depth=false, or drop other layers.",
        )
    if not runs:
        return ()
    gpt = bare_gpt(model)
    device = next(gpt.parameters()).device
    current = announced_batch()
    watches: list[_RunWatch] = []

    def announce(batch: dict[str, Tensor]) -> None:
        for watch in watches:
            watch.close()
        current.announce(mark_tokens_over(batch["loss_mask"], groups=[groups.cp], device=device))

    with hooks_until_the_end() as handles, evaluating(gpt):
        watches, senders = _watch_runs(gpt, runs, groups, current, handles)
        run(announce)
    for watch in watches:
        watch.close()
    for sender in senders:
        sender.finish()
    local = [watch.correct(config) for watch in watches]
    found = [outcome for stage in gather_objects(local, group=groups.pp) for outcome in stage]
    problem = next((outcome for outcome in found if isinstance(outcome, str)), None)
    require(problem is None, problem or "")
    corrected = [outcome for outcome in found if isinstance(outcome, CorrectedRun)]
    return tuple(sorted(corrected, key=lambda run: run.layer))


def dropped_runs(plan: PruningPlan) -> Iterator[tuple[int, int]]:
    """(kept layer, last layer of the run dropped after it), for each run that a kept layer precedes."""
    kept = plan.layer.tolist()
    for layer, following in zip(kept, [*kept[1:], plan.source.num_layers], strict=True):
        if following > layer + 1:
            yield layer, following - 1


def _watch_runs(
    gpt: Any, runs: Sequence[tuple[int, int]], groups: Groups, current: AnnouncedBatch, handles: list[RemovableHandle]
) -> tuple[list[_RunWatch], list[_Sender]]:
    """Hook this stage's ends of every run: those that begin here, and those that only end here.

    Communicates: pp, the stages' layer indices.
    """
    layers = {layer.layer_number - 1: layer for layer in gpt.decoder.layers}
    stages = enumerate(gather_objects(list(layers), group=groups.pp))
    stage_of = {layer: stage for stage, of_stage in stages for layer in of_stage}
    watches, senders = [], []
    for before, last in runs:
        if before in layers:
            elsewhere = None if last in layers else stage_of[last]
            watches.append(_RunWatch(layers[before], last, elsewhere, groups, current, handles))
            if last in layers:
                handles.append(layers[last].register_forward_hook(on_output(watches[-1].see_end)))
        elif last in layers:
            senders.append(_Sender(stage_of[before], groups))
            handles.append(layers[last].register_forward_hook(on_output(senders[-1].send)))
    return watches, senders


class _Sender:
    """Sends a later stage's stream to the stage where the run begins, which takes it when its next forward is due."""

    def __init__(self, stage: int, groups: Groups) -> None:
        self._stage, self._pp = stage, groups.pp
        self._sending: tuple[Any, Tensor] | None = None

    def send(self, stream: Tensor) -> None:
        self.finish()  # it was taken before the stages in front began this micro-batch
        stream = stream.detach().clone()  # the schedule frees its own once sent on
        assert self._pp is not None
        self._sending = send_to(stream, to=self._stage, group=self._pp), stream

    def finish(self) -> None:
        """Wait until what was sent last is taken."""
        if self._sending is not None:
            self._sending[0].wait()
            self._sending = None


class _RunWatch:
    """Sums over one run of dropped layers, on the pipeline stage of the kept layer before it."""

    def __init__(
        self,
        before: Any,
        last: int,
        last_stage: int | None,
        groups: Groups,
        current: AnnouncedBatch,
        handles: list[RemovableHandle],
    ) -> None:
        """
        Args:
            last: index of the last dropped layer.
            last_stage: the pipeline stage it is on; None: this one, and `see_end` is shown its output.
        """
        self.layer, self.last = before.layer_number - 1, last
        self._last_stage = last_stage
        self._groups, self._current = groups, current
        self._gathers = groups.tp if before.config.sequence_parallel else None
        linear = before.get_submodule(READERS["ffn"])
        self.name = in_layer(self.layer, READERS["ffn"])
        self._input = DenseInput(self.name, linear, groups, current)
        hidden, neurons = linear.weight.shape
        self._products = SecondMoment(hidden, neurons, linear.weight.device)
        self._power = torch.zeros((), dtype=torch.float64, device=linear.weight.device)
        self._rows = self._start = self._end = torch.empty(0)
        self._open = False
        handles.append(linear.register_forward_pre_hook(on_input(self._see_neurons)))
        handles.append(before.register_forward_hook(on_output(self._see_start)))

    def _see_neurons(self, neurons: Tensor) -> None:
        self._rows = self._input.see(neurons)

    def _see_start(self, stream: Tensor) -> None:
        self._start, self._open = stream.detach().clone(), True  # the schedule frees the stream it sends on

    def see_end(self, stream: Tensor) -> None:
        self._end = stream.detach().clone()

    def close(self) -> None:
        """Add the micro-batch that was run last, while its mask is the announced one.

        Communicates: pp, one receive, where the run ends on another stage; tp, under sequence parallelism.
        """
        if not self._open:
            return
        if self._last_stage is not None:
            assert self._groups.pp is not None
            buffer = torch.empty_like(self._start)
            self._end = receive_from(buffer, source=self._last_stage, group=self._groups.pp)
        added = self._end.float() - self._start.float()
        whole = torch.cat(all_gather_shards(added, group=self._gathers))  # [s/cp, b, h]
        rows = rows_that_count(whole, self._current, f"decoder.layers.{self.last}")
        self._products.add(rows, self._rows)
        self._power += rows.double().square().sum()
        self._rows = self._start = self._end = torch.empty(0)
        self._open = False

    def correct(self, config: DepthCorrectionConfig) -> CorrectedRun | str:
        """Change the weight; what went wrong, in words, where it cannot be.

        Communicates: cp and dp (sum), tp (gather).
        """
        over = [self._groups.cp, self._groups.dp]
        moment, weight = self._input.merge_over_ranks(), self._input.gather_weight()
        products = torch.cat(all_gather_shards(self._products.merge_over(over), group=self._groups.tp), dim=1)
        power = self._power
        for group in over:
            power = all_reduce_sum(power, group=group)
        # Reading the values waits for the device; the pass is over.
        if not bool(moment.isfinite().all() & products.isfinite().all()):
            return (
                f"Activations between {self.name} and decoder.layers.{self.last} are not finite (NaN or infinity) on "
                "the calibration samples; no correction can be fitted to them. Check the checkpoint and its dtype with "
                "the evaluate stage."
            )
        try:
            if config.method == "scale":
                change = multiple_of(weight, moment, products)
            else:
                change = regress(moment, products, config.ridge)
        except ValueError as error:
            return f"{self.name}: {error}"
        new = (weight.double() + change).to(weight.dtype)
        self._input.set_weight(new)
        made = new.double() - weight.double()
        left = power - 2 * (products * made).sum() + ((made @ moment) * made).sum()
        return CorrectedRun(self.layer, self.layer + 1, self.last, float(left / power))

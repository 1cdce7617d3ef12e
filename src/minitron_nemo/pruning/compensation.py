"""Compensation: the linear that reads what is cut takes over, in closed form, what the cut inputs said.

    axis                 reading weight                        its input a                    split over
    ffn                  mlp.linear_fc2                        [s/cp, b, f/tp]                tp
    head (and group)     self_attention.linear_proj            [s/cp, b, (n/tp)*d]            tp
    expert_ffn           each kept expert's linear_fc2         [t, f/etp], routed tokens      etp, experts over ep
    shared_expert_ffn    mlp.shared_experts.linear_fc2         [s/cp, b, f/tp]                tp

A calibration pass sums the second moment C = sum a a^T of each such input, and `least_squares.refit` gives the weight
that best reproduces the uncut output from the kept inputs. It stands in the same place as before, with 0 in the dropped
columns, so that plain surgery of those axes loses nothing more. Layers are done one after the other, each measured on
the stream that the layers before it, already cut, really send; or all from one pass (`layers_at_once`).

Communication: while measuring, tp (of an expert: etp) gathers each micro-batch's input [t, f]; cp and dp sum C, and tp
gathers it, once per layer; then every rank solves the same equations. ep and pp exchange the outcome of each turn as
small objects. The result is the same on every layout, up to float rounding.

Memory per rank, of each linear of the layers in turn: C's rows [f/tp, f] float64 while measuring (of experts [e/ep,
f/etp, f]); for one linear at a time the whole C, and what `least_squares` needs. Products of up to 4096 tokens are
summed in float32, everything beyond in float64.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.utils.hooks import RemovableHandle

from minitron_nemo.checks import did_you_mean, require
from minitron_nemo.importance.experts import ExpertWatch, show_experts
from minitron_nemo.importance.hooks import MicroBatch
from minitron_nemo.importance.statistics import TokenMask, mark_tokens_over
from minitron_nemo.parallel import (
    Groups,
    all_gather_shards,
    all_reduce_sum,
    gather_objects,
    group_rank,
    group_size,
)
from minitron_nemo.pruning.least_squares import eliminate, refit
from minitron_nemo.pruning.plan import DIM_OF_AXIS, PruningPlan, axes_of
from minitron_nemo.weights import bare_gpt

SELECTIONS = ("scores", "compensated_error")
TOKENS_AT_ONCE = 4096  # float32 copies of the input and sums of its products reach no further

CalibrationPass = Callable[[Callable[[dict[str, Tensor]], None]], None]
"""Runs one forward pass of the calibration set through the model, on every rank; calls its argument with each
micro-batch (`loss_mask` [b, s/cp]) before that micro-batch's forward, on every pipeline stage."""


@dataclass
class CompensationConfig:
    """How the weights that read cut neurons and heads are refitted."""

    layers_at_once: int = 1
    """Layers refitted from one calibration pass. 1: each layer sees those before it already cut, at one pass a layer;
    0: all from a single pass over the uncut model, which holds every layer's second moments at once."""
    ridge: float = 1e-2
    """What keeps a weight near its old value, as a fraction of its inputs' mean square; 0 or more. Large: plain
    selection. 0 needs more calibration tokens than inputs. 1e-2 is GPTQ's (arXiv:2210.17323)."""
    num_samples: int = 256
    """Calibration samples of a pass, over all data-parallel ranks."""
    selection: str = "compensated_error"
    """Which neurons and heads stay: those of the plan (scores), or in the same numbers those whose loss the refitted
    weight makes up for worst, found by dropping one at a time (compensated_error)."""

    def __post_init__(self) -> None:
        require(
            self.layers_at_once >= 0,
            f"prune.surgery.compensation.layers_at_once={self.layers_at_once} must be at least 1, or 0 for all layers "
            "in one pass.",
        )
        require(
            math.isfinite(self.ridge) and self.ridge >= 0,
            f"prune.surgery.compensation.ridge={self.ridge} must be 0 or a positive number; try 0.01.",
        )
        require(
            self.num_samples >= 1,
            f"prune.surgery.compensation.num_samples={self.num_samples} must be at least 1; try 256.",
        )
        require(
            self.selection in SELECTIONS,
            f"prune.surgery.compensation.selection={self.selection} is not known; "
            f"{did_you_mean(self.selection, SELECTIONS)}",
        )


@dataclass(frozen=True)
class RefittedLinear:
    """What became of one linear that reads a cut axis."""

    axis: str
    layer: int
    """Index in plan.source, from 0."""
    expert: int | None
    plain_error: float
    """sum |W a - W' a|^2 / sum |W a|^2 over the calibration tokens, where the dropped inputs are simply gone."""
    error: float
    """The same of the refitted weight."""


@dataclass(frozen=True)
class Compensation:
    """The outcome, equal on every rank."""

    plan: PruningPlan
    """What to cut the model by: the given plan, with other neurons and heads where they were chosen anew."""
    linears: tuple[RefittedLinear, ...]
    """In the order of the forward pass."""

    def describe(self) -> str:
        """By axis the mean and the largest relative error of the linears' outputs, before and after."""
        lines = []
        for axis in dict.fromkeys(linear.axis for linear in self.linears):
            plain = [linear.plain_error for linear in self.linears if linear.axis == axis]
            after = [linear.error for linear in self.linears if linear.axis == axis]
            lines.append(
                f"{axis}: relative squared error of outputs {sum(plain) / len(plain):.3f} (largest {max(plain):.3f}) "
                f"by plain selection, {sum(after) / len(after):.3f} ({max(after):.3f}) refitted"
            )
        return "\n".join(lines)


@torch.no_grad()
def compensate(
    model: nn.Module, plan: PruningPlan, groups: Groups, run: CalibrationPass, config: CompensationConfig | None = None
) -> Compensation:
    """Refit in place the weights that read what `plan` cuts: neurons, heads, groups, neurons of experts.

    Args:
        model: GPTModel of shape plan.source on this rank, bare or wrapped. Its linear_proj and linear_fc2 weights
            change where their inputs are cut, and nothing else; the columns of dropped inputs become 0.
        plan: keeps every layer. A cut of hidden channels is left to surgery: the stream is measured whole.
        run: called once for every `config.layers_at_once` layers.
    Communicates: see the module's text; every rank takes part.
    Raises: ValueError, on every rank: the plan merges heads or drops layers; an input is not finite, or its second
        moment not positive definite (names the linear; those before it are refitted by then).
    """
    config = config or CompensationConfig()
    _require_supported(plan)
    axes = {axis for axis in axes_of(plan.source) if _is_cut(plan, axis)} & set(_AXES)
    if not axes:
        return Compensation(plan, ())
    gpt, outcomes = bare_gpt(model), []
    with evaluating(gpt):
        for layers in _turns(plan.source.num_layers, config.layers_at_once):
            outcomes += _compensate_layers(gpt, layers, axes, plan, groups, run, config)
    return Compensation(_plan_of(plan, outcomes), tuple(outcome.linear for outcome in outcomes))


_AXES = ("head", "ffn", "shared_expert_ffn", "expert_ffn")


def _is_cut(plan: PruningPlan, axis: str) -> bool:
    return getattr(plan.source, DIM_OF_AXIS[axis]) != getattr(plan.target, DIM_OF_AXIS[axis])


def _require_supported(plan: PruningPlan) -> None:
    require(
        plan.head_partner is None,
        "plan.head_partner merges dropped heads into kept ones, and compensation refits what the kept heads alone say. "
        "Use one of them: prune.merge_heads=false, or no compensation.",
    )
    require(
        not _is_cut(plan, "layer"),
        f"The plan drops {plan.source.num_layers - plan.target.num_layers} layers, whose output the layers after them "
        "would be fitted to. Drop the layers first, then compensate what is left.",
    )


def _turns(num_layers: int, at_once: int) -> Iterator[range]:
    at_once = at_once or num_layers
    for first in range(0, num_layers, at_once):
        yield range(first, min(first + at_once, num_layers))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Dropout is off inside."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


# ---- measuring -------------------------------------------------------------------------------------------------------


def rows_that_count(activation: Tensor, mask: TokenMask, name: str) -> Tensor:
    """[s/cp, b, c] -> [t, c], see `TokenMask.rows_of`.

    Raises: ValueError: the mask is of another micro-batch size or length.
    """
    require(
        activation.dim() == 3 and tuple(activation.shape[:2]) == (mask.seq_length, mask.num_tokens.numel()),
        f"{name} has activations of shape {list(activation.shape)} [s, b, ...], but the loss mask announced "
        f"{mask.num_tokens.numel()} samples of {mask.seq_length} tokens on this rank. "
        "Announce the mask [b, s] of the micro-batch that is run next.",
    )
    return mask.rows_of(activation)


class SecondMoment:
    """Sum of outer products of rows, [left, right] float64: of an input with itself C = sum a a^T, this rank's rows."""

    def __init__(self, left: int, right: int, device: torch.device) -> None:
        self.total = torch.zeros(left, right, dtype=torch.float64, device=device)

    def add(self, left: Tensor, right: Tensor) -> None:
        """Add left^T right of [t, left] and [t, right], any float dtype."""
        for some, others in zip(left.split(TOKENS_AT_ONCE), right.split(TOKENS_AT_ONCE), strict=True):
            self.total += some.float().t() @ others.float()

    def merge_over(self, groups: Sequence[ProcessGroup | None]) -> Tensor:
        """The sum over the ranks of `groups`, which saw other tokens; its own is freed. Communicates: each, once."""
        total, self.total = self.total, self.total.new_empty(0)
        for group in groups:
            total = all_reduce_sum(total, group=group)
        return total


class DenseInput:
    """The input of a linear that tensor parallelism splits by its input; C's rows of this rank's part of it."""

    def __init__(self, name: str, linear: Any, groups: Groups, current: MicroBatch) -> None:
        self.name, self.linear = name, linear
        self._groups, self._current = groups, current
        part = linear.weight.shape[1]
        self._moment = SecondMoment(part, part * group_size(groups.tp), linear.weight.device)
        self.num_seen = 0

    @torch.no_grad()
    def see(self, activation: Tensor) -> Tensor:
        """Add a micro-batch [s/cp, b, f/tp]; returns its tokens that count [t, f/tp]. Communicates: tp, one gather."""
        require_announced(self.name, self.num_seen, self._current)
        self.num_seen += 1
        rows = rows_that_count(activation, self._current.mask(0, 1), self.name)
        whole = torch.cat(all_gather_shards(rows, group=self._groups.tp), dim=1)
        self._moment.add(rows, whole)
        return rows

    def merge_over_ranks(self) -> Tensor:
        """C [f, f] over all tokens, equal on every rank. Communicates: cp and dp (sum), tp (gather)."""
        rows = self._moment.merge_over([self._groups.cp, self._groups.dp])
        return torch.cat(all_gather_shards(rows, group=self._groups.tp))

    def gather_weight(self) -> Tensor:
        """[h, f] in the model's dtype. Communicates: tp."""
        return torch.cat(all_gather_shards(self.linear.weight.detach(), group=self._groups.tp), dim=1)

    def set_weight(self, full: Tensor) -> None:
        """Overwrite this rank's columns with those of [h, f]."""
        part = full.chunk(group_size(self._groups.tp), dim=1)[group_rank(self._groups.tp)]
        self.linear.weight.data.copy_(part)


class ExpertInputs(ExpertWatch):
    """The inputs of the linear_fc2 of one layer's experts on this rank: per expert C's rows."""

    def __init__(self, index: int, mlp: Any, plan: PruningPlan, groups: Groups, current: MicroBatch, **layout: bool):
        super().__init__(index, mlp, plan.source, groups, current, **layout)
        self._groups, self._mlp = groups, mlp
        self._whole = plan.source.moe_ffn_hidden_size or 0
        self._part = self._whole // group_size(groups.etp)
        device = mlp.router.weight.device
        self._moments = [SecondMoment(self._part, self._whole, device) for _ in self.experts]

    @torch.no_grad()
    def see(self, expert: int, neurons: Tensor, outputs: Tensor) -> None:
        """Add local expert `expert`'s tokens [t, f/etp]. Communicates: expert tensor parallelism, one all-gather."""
        counts = self.counted(expert, neurons.shape[0])
        rows = neurons.where(counts.unsqueeze(1), 0)  # no host value: tokens that do not count are 0, even a NaN
        whole = torch.cat(all_gather_shards(rows, group=self._groups.etp), dim=1)
        self._moments[expert].add(rows, whole)

    def merge_over_ranks(self, expert: int) -> Tensor:
        """C [f, f] of global expert `expert` over all its tokens, equal on every rank of this stage.

        Communicates: tp, cp and dp (sum): whichever of them holds the expert, other tokens of it, or a part of it.
        """
        total = torch.zeros(self._whole, self._whole, dtype=torch.float64, device=self.num_tokens.device)
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


def require_announced(name: str, num_seen: int, current: MicroBatch) -> None:
    """RuntimeError unless the forward pass that a place sees now is that of the micro-batch announced last."""
    require(
        num_seen + 1 == current.number,
        f"{name} saw forward pass {num_seen + 1}, but {current.number} micro-batches were announced. "
        "Call what the calibration pass is given once before each forward, on every pipeline stage.",
        RuntimeError,
    )


# ---- refitting -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Outcome:
    linear: RefittedLinear
    kept: tuple[int, ...]
    problem: str | None = None


def _compensate_layers(
    gpt: Any,
    layers: Iterable[int],
    axes: set[str],
    plan: PruningPlan,
    groups: Groups,
    run: CalibrationPass,
    config: CompensationConfig,
) -> list[_Outcome]:
    """Measure these layers in one pass and refit them; every rank gets the outcomes of all of them."""
    device = next(gpt.parameters()).device
    current, handles = MicroBatch(), list[RemovableHandle]()
    inputs: list[tuple[str, int, DenseInput | ExpertInputs]] = []

    def announce(batch: dict[str, Tensor]) -> None:
        current.announce(mark_tokens_over(batch["loss_mask"], groups=[groups.cp], device=device))

    try:
        for layer in gpt.decoder.layers:
            if layer.layer_number - 1 in layers:
                inputs += _watch(layer, axes, plan, groups, current, handles)
        run(announce)
    finally:
        for handle in handles:
            handle.remove()
    local: list[_Outcome] = []
    while inputs:  # a linear's moment is freed when it is refitted
        axis, index, seen = inputs.pop(0)
        if isinstance(seen, DenseInput):
            weight, moment = seen.gather_weight(), seen.merge_over_ranks()
            outcome, full = _refit(axis, index, None, seen.name, weight, moment, plan, config)
            seen.set_weight(full)
            local.append(outcome)
        else:
            local += _refit_experts(seen, plan, config)
    everyone: dict[tuple[int, int, int], _Outcome] = {}
    of_stage = [outcome for outcomes in gather_objects(local, group=groups.ep) for outcome in outcomes]
    for outcomes in gather_objects(of_stage, group=groups.pp):
        for outcome in outcomes:
            linear = outcome.linear
            everyone[linear.layer, _AXES.index(linear.axis), linear.expert or 0] = outcome
    ordered = [everyone[key] for key in sorted(everyone)]
    problem = next((outcome.problem for outcome in ordered if outcome.problem is not None), None)
    require(problem is None, problem or "")
    return ordered


def _watch(
    layer: Any, axes: set[str], plan: PruningPlan, groups: Groups, current: MicroBatch, handles: list[RemovableHandle]
) -> list[tuple[str, int, DenseInput | ExpertInputs]]:
    """Hook the inputs of one layer that are cut."""
    index = layer.layer_number - 1
    name, mlp, with_experts = f"decoder.layers.{index}", layer.mlp, plan.source.has_experts(index)
    linears = {"head": (f"{name}.self_attention.linear_proj", layer.self_attention.linear_proj)}
    if not with_experts:
        linears["ffn"] = (f"{name}.mlp.linear_fc2", mlp.linear_fc2)
    elif plan.shared_expert_ffn is not None:
        linears["shared_expert_ffn"] = (f"{name}.mlp.shared_experts.linear_fc2", mlp.shared_experts.linear_fc2)
    found: list[tuple[str, int, DenseInput | ExpertInputs]] = []
    for axis, (linear_name, linear) in linears.items():
        if axis in axes:
            dense = DenseInput(linear_name, linear, groups, current)
            handles.append(linear.register_forward_pre_hook(see_input(dense)))
            found.append((axis, index, dense))
    if with_experts and "expert_ffn" in axes:
        experts = ExpertInputs(index, mlp, plan, groups, current, sequence_parallel=layer.config.sequence_parallel)
        show_experts(mlp, experts, handles)
        found.append(("expert_ffn", index, experts))
    return found


def see_input(dense: DenseInput) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    """A forward pre-hook that shows a linear's input."""

    def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        dense.see(args[0])

    return hook


def _refit_experts(seen: ExpertInputs, plan: PruningPlan, config: CompensationConfig) -> list[_Outcome]:
    """Refit the kept experts of one layer that are on this rank."""
    assert plan.expert is not None
    outcomes = []
    for expert in range(plan.source.num_moe_experts or 0):
        moment = seen.merge_over_ranks(expert)  # every rank takes part, whoever holds the expert
        if expert not in seen.experts or expert not in plan.expert[seen.index]:
            continue
        name, weight = f"{seen.place}.experts.{expert}.linear_fc2", seen.gather_weight(expert)
        outcome, full = _refit("expert_ffn", seen.index, expert, name, weight, moment, plan, config)
        seen.set_weight(expert, full)
        outcomes.append(outcome)
    return outcomes


def _refit(
    axis: str,
    layer: int,
    expert: int | None,
    name: str,
    weight: Tensor,
    moment: Tensor,
    plan: PruningPlan,
    config: CompensationConfig,
) -> tuple[_Outcome, Tensor]:
    """One linear's outcome and its new full weight; where something stands in the way, it says so and `weight` stays.

    The same on every rank that holds the linear: equal matrices, the same arithmetic.
    """
    kept = getattr(plan, axis)[layer] if expert is None else getattr(plan, axis)[layer, expert]
    nothing = RefittedLinear(axis, layer, expert, 0.0, 0.0)
    if not bool(moment.isfinite().all()):
        problem = (
            f"Inputs of {name} are not finite (NaN or infinity) on the calibration samples; no weight can be fitted "
            "to them. Check the checkpoint and its dtype with the evaluate stage."
        )
        return _Outcome(nothing, (), problem), weight
    try:
        if config.selection == "compensated_error" and bool(moment.diagonal().sum() > 0):
            kept = eliminate(weight, moment, *_pools(axis, layer, plan), config.ridge)
        result = refit(weight, moment, _columns(axis, kept, plan), config.ridge)
    except ValueError as error:
        return _Outcome(nothing, (), f"{name}: {error}"), weight
    linear = RefittedLinear(axis, layer, expert, result.plain_error, result.error)
    return _Outcome(linear, tuple(kept.tolist())), result.weight


def _columns(axis: str, kept: Tensor, plan: PruningPlan) -> Tensor:
    """The kept inputs of the reading linear: kv_channels of each kept head."""
    if axis != "head":
        return kept
    channels = plan.source.kv_channels
    return (kept.unsqueeze(1) * channels + torch.arange(channels)).flatten()


def _pools(axis: str, layer: int, plan: PruningPlan) -> tuple[Tensor, Tensor]:
    """The pool of each neuron or head, and how many of each pool stay: as many as in the plan, of heads by group."""
    source, target = plan.source, plan.target
    if axis != "head":
        have, keep = (getattr(shape, DIM_OF_AXIS[axis]) for shape in (source, target))
        return torch.zeros(have, dtype=torch.int64), torch.tensor([keep])
    keep_of_group = torch.zeros(source.num_query_groups, dtype=torch.int64)
    keep_of_group[plan.group[layer]] = target.heads_per_group
    return torch.arange(source.num_query_groups).repeat_interleave(source.heads_per_group), keep_of_group


def _plan_of(plan: PruningPlan, outcomes: Sequence[_Outcome]) -> PruningPlan:
    """`plan` with the neurons and heads that stayed."""
    entries = {axis: getattr(plan, axis).clone() for axis in {outcome.linear.axis for outcome in outcomes}}
    for outcome in outcomes:
        linear, kept = outcome.linear, torch.tensor(outcome.kept)
        place = linear.layer if linear.expert is None else (linear.layer, linear.expert)
        entries[linear.axis][place] = kept
    return dataclasses.replace(plan, **entries)

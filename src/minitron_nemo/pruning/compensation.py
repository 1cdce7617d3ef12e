"""Compensation: the linear that reads what is cut takes over, in closed form, what the cut inputs said.

    axis                 reading weight                        its input a                    split over
    ffn                  mlp.linear_fc2                        [s/cp, b, f/tp]                tp
    head (and group)     self_attention.linear_proj            [s/cp, b, (n/tp)*d]            tp
    expert_ffn           each kept expert's linear_fc2         [t, f/etp], routed tokens      etp, experts over ep
    shared_expert_ffn    mlp.shared_experts.linear_fc2         [s/cp, b, f/tp]                tp

A calibration pass sums the second moment C = sum a a^T of each such input, and `fits.refit` gives the weight
that best reproduces the uncut output from the kept inputs. It stands in the same place as before, with 0 in the dropped
columns, so that plain surgery of those axes loses nothing more. Layers are done one after the other, each measured on
the stream that the layers before it, already cut, really send; or all from one pass (`layers_at_once`).

Communication: while measuring and to merge C see second_moments.py; then every rank solves the same equations. ep and
pp exchange the outcome of each turn as small objects. The result is the same on every layout, up to float rounding; of
neurons or heads that rounding parts, all ranks take the choice of the first one (tp, cp and dp, a gather of indices).

Memory per rank, of each linear of the layers in turn: C's rows [f/tp, f] float64 while measuring (of experts [e/ep,
f/etp, f]); for one linear at a time the whole C, and what least squares need.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from minitron_nemo import run_record
from minitron_nemo.activations.hooks import evaluating, hooks_until_the_end, on_input
from minitron_nemo.activations.routing import Routing
from minitron_nemo.activations.tokens import AnnouncedBatch, mark_tokens_over
from minitron_nemo.checks import require
from minitron_nemo.config.pruning import CompensationConfig, SequentialConfig
from minitron_nemo.least_squares.elimination import inputs_of
from minitron_nemo.least_squares.fits import Refit, eliminate_and_refit, refit
from minitron_nemo.parallel import Groups, all_gather_shards, gather_objects, is_rank_zero
from minitron_nemo.places import READERS, in_layer
from minitron_nemo.plan import PruningPlan, axes_of
from minitron_nemo.progress import Reporter
from minitron_nemo.pruning.second_moments import CalibrationPass, DenseInput, ExpertInputs, announced_batch
from minitron_nemo.shape import DIM_OF_AXIS
from minitron_nemo.weights import bare_gpt

logger = logging.getLogger(__name__)

TOKENS_PER_INPUT = 1
"""Calibration tokens an expert must have seen, for each of its neurons, to be refitted: the second moment of fewer has
no full rank, and the fit would say what the samples do not."""


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
    axes = {axis for axis in axes_of(plan.source) if is_cut(plan, axis)} & set(_AXES)
    if not axes:
        return Compensation(plan, ())
    gpt, outcomes = bare_gpt(model), []
    with evaluating(gpt):
        for layers in _turns(plan.source.num_layers, config.layers_at_once):
            outcomes += _compensate_layers(gpt, layers, axes, plan, groups, run, config)
    say_what_was_not_refitted(outcomes, plan, config)
    return Compensation(_plan_of(plan, outcomes), tuple(outcome.linear for outcome in outcomes))


_AXES = ("head", "ffn", "shared_expert_ffn", "expert_ffn")


def is_cut(plan: PruningPlan, axis: str) -> bool:
    return getattr(plan.source, DIM_OF_AXIS[axis]) != getattr(plan.target, DIM_OF_AXIS[axis])


def _require_supported(plan: PruningPlan) -> None:
    require(
        plan.head_partner is None,
        "plan.head_partner merges dropped heads into kept ones, and compensation refits what the kept heads alone say. "
        "Use one of them: prune.merge_heads=false, or no compensation.",
    )
    require(
        not is_cut(plan, "layer"),
        f"The plan drops {plan.source.num_layers - plan.target.num_layers} layers, whose output the layers after them "
        "would be fitted to. Drop the layers first, then compensate what is left.",
    )


def _turns(num_layers: int, at_once: int) -> Iterator[range]:
    at_once = at_once or num_layers
    for first in range(0, num_layers, at_once):
        yield range(first, min(first + at_once, num_layers))


@dataclass(frozen=True)
class Outcome:
    linear: RefittedLinear
    kept: tuple[int, ...]
    problem: str | None = None
    too_few_tokens: bool = False
    """An expert that was only cut."""


def _compensate_layers(
    gpt: Any,
    layers: Iterable[int],
    axes: set[str],
    plan: PruningPlan,
    groups: Groups,
    run: CalibrationPass,
    config: CompensationConfig,
) -> list[Outcome]:
    """Measure these layers in one pass and refit them; every rank gets the outcomes of all of them."""
    device = next(gpt.parameters()).device
    current = announced_batch()
    inputs: list[tuple[str, int, DenseInput | ExpertInputs]] = []

    def announce(batch: dict[str, Tensor]) -> None:
        current.announce(mark_tokens_over(batch["loss_mask"], groups=[groups.cp], device=device))

    with hooks_until_the_end() as handles:
        for layer in gpt.decoder.layers:
            if layer.layer_number - 1 in layers:
                inputs += _watch(layer, axes, plan, groups, current, handles)
        run(announce)
    local: list[Outcome] = []
    total = len(inputs)
    with Reporter("refitting linears", total, show=is_rank_zero()) as reporter:
        while inputs:  # a linear's moment is freed when it is refitted
            axis, index, seen = inputs.pop(0)
            if isinstance(seen, DenseInput):
                whole, moment = _Linear(axis, index, None, seen.name, seen.gather_weight()), seen.merge_over_ranks()
                choice = _choose(whole, moment, plan, config)
                outcome, full = _refit(whole, moment, _gather_first_choice(choice.kept, groups), choice, plan, config)
                seen.set_weight(full)
                local.append(outcome)
            else:
                local += refit_experts(seen, plan, groups, config)
            reporter.update(total - len(inputs))
    everyone: dict[tuple[int, int, int], Outcome] = {}
    of_stage = [outcome for outcomes in gather_objects(local, group=groups.ep) for outcome in outcomes]
    for outcomes in gather_objects(of_stage, group=groups.pp):
        for outcome in outcomes:
            linear = outcome.linear
            everyone[linear.layer, _AXES.index(linear.axis), linear.expert or 0] = outcome
    ordered = [everyone[key] for key in sorted(everyone)]
    require_no_problem(ordered, groups)
    return ordered


def require_no_problem(outcomes: Iterable[Outcome], groups: Groups) -> None:
    """Raises: ValueError, on every rank: the first thing that stood in the way. Communicates: tp, cp and dp."""
    problem = next((outcome.problem for outcome in outcomes if outcome.problem is not None), None)
    for group in (groups.tp, groups.cp, groups.dp):
        problem = next((each for each in gather_objects(problem, group=group) if each is not None), None)
    require(problem is None, problem or "")


def _watch(
    layer: Any,
    axes: set[str],
    plan: PruningPlan,
    groups: Groups,
    current: AnnouncedBatch,
    handles: list[RemovableHandle],
) -> list[tuple[str, int, DenseInput | ExpertInputs]]:
    """Hook the inputs of one layer that are cut."""
    index = layer.layer_number - 1
    with_experts = plan.source.has_experts(index)
    found: list[tuple[str, int, DenseInput | ExpertInputs]] = []
    for axis in ("head", "shared_expert_ffn" if with_experts else "ffn"):
        if axis in axes:
            linear = layer.get_submodule(READERS[axis])
            dense = DenseInput(in_layer(index, READERS[axis]), linear, groups, current)
            handles.append(linear.register_forward_pre_hook(on_input(dense.see)))
            found.append((axis, index, dense))
    if with_experts and "expert_ffn" in axes:
        routing = Routing(index, layer.mlp, groups, current, sequence_parallel=layer.config.sequence_parallel)
        experts = ExpertInputs(routing, layer.mlp, plan.source, groups)
        routing.show(experts.see, handles)
        found.append(("expert_ffn", index, experts))
    return found


def refit_experts(seen: ExpertInputs, plan: PruningPlan, groups: Groups, config: CompensationConfig) -> list[Outcome]:
    """Refit the kept experts of one layer that are on this rank."""
    assert plan.expert is not None
    outcomes, tokens = [], seen.tokens_over_ranks()
    for expert in range(plan.source.num_moe_experts or 0):
        run_record.is_at_work()
        moment = seen.merge_over_ranks(expert)  # every rank takes part, whoever holds the expert
        if expert not in plan.expert[seen.index]:
            continue
        few = tokens[expert] < TOKENS_PER_INPUT * len(moment)
        fit = dataclasses.replace(config, selection="scores", ridge=1.0) if few else config  # one that always works
        if expert not in seen.experts:
            nothing = torch.full((plan.target.moe_ffn_hidden_size or 0,), -1, device=moment.device)
            _gather_first_choice(nothing, groups)
            continue
        name, weight = f"{seen.place}.experts.{expert}.linear_fc2", seen.gather_weight(expert)
        linear = _Linear("expert_ffn", seen.index, expert, name, weight)
        choice = _choose(linear, moment, plan, fit)
        outcome, full = _refit(linear, moment, _gather_first_choice(choice.kept, groups), choice, plan, fit)
        if few and outcome.problem is None:
            outcome, full = _only_cut(outcome, weight)
        seen.set_weight(expert, full)
        outcomes.append(outcome)
    return outcomes


@dataclass(frozen=True)
class _Linear:
    """One that reads a cut axis, whole."""

    axis: str
    layer: int
    expert: int | None
    name: str
    weight: Tensor
    """[h, f] in the model's dtype."""


@dataclass(frozen=True)
class _Choice:
    kept: Tensor
    """[k] int64 on the device, what stays of the cut axis."""
    refitted: Refit | None = None
    """The linear refitted to that, where choosing has told."""
    problem: str | None = None
    """What stands in the way of refitting."""


def _choose(linear: _Linear, moment: Tensor, plan: PruningPlan, config: CompensationConfig) -> _Choice:
    row = linear.layer if linear.expert is None else (linear.layer, linear.expert)
    kept, refitted, problem = getattr(plan, linear.axis)[row], None, None
    if not bool(moment.isfinite().all()):
        problem = (
            f"Inputs of {linear.name} are not finite (NaN or infinity) on the calibration samples; no weight can be "
            "fitted to them. Check the checkpoint and its dtype with the evaluate stage."
        )
    elif config.chooses and bool(moment.diagonal().sum() > 0):
        try:
            pools = pools_of(linear.axis, linear.layer, plan)
            kept, refitted = eliminate_and_refit(linear.weight, moment, *pools, config.ridge)
        except ValueError as error:
            problem = f"{linear.name}: {error}"
    return _Choice(kept.to(moment.device), refitted, problem)


def _gather_first_choice(local_kept: Tensor, groups: Groups) -> Tensor:
    """[k] on the host: what the first of this stage's ranks that hold the linear keeps; one that does not, passes -1.

    Equal matrices need not be equal to the last bit on two ranks, and of nearly equal inputs they would drop others.
    Communicates: tp, cp and dp, a gather of [k].
    """
    kept = local_kept
    for group in (groups.tp, groups.cp, groups.dp):
        choices = all_gather_shards(kept, group=group)
        kept = next((choice for choice in choices if int(choice[0]) >= 0), kept)  # waits for the device
    return kept.cpu()


def _refit(
    linear: _Linear, moment: Tensor, kept: Tensor, mine: _Choice, plan: PruningPlan, config: CompensationConfig
) -> tuple[Outcome, Tensor]:
    """One linear's outcome and its new full weight; where something stands in the way, it says so and `weight` stays.
    `kept` is what all ranks agreed on; where that is this rank's own choice, nothing is solved again.

    Up to rounding the same on every rank that holds the linear.
    """
    place = (linear.axis, linear.layer, linear.expert)
    result, problem = mine.refitted, mine.problem
    if problem is None and (result is None or not torch.equal(kept, mine.kept.cpu())):
        try:
            width = plan.source.kv_channels if linear.axis == "head" else 1
            result = refit(linear.weight, moment, inputs_of(kept, width), config.ridge)
        except ValueError as error:
            problem = f"{linear.name}: {error}"
    if result is None or problem is not None:
        return Outcome(RefittedLinear(*place, 0.0, 0.0), (), problem), linear.weight
    return Outcome(RefittedLinear(*place, result.plain_error, result.error), tuple(kept.tolist())), result.weight


def _only_cut(outcome: Outcome, weight: Tensor) -> tuple[Outcome, Tensor]:
    """An outcome whose fit is not trusted: the kept columns of `weight` as they were."""
    cut, kept = torch.zeros_like(weight), list(outcome.kept)
    cut[:, kept] = weight[:, kept]
    linear = dataclasses.replace(outcome.linear, error=outcome.linear.plain_error)
    return Outcome(linear, outcome.kept, too_few_tokens=True), cut


def say_what_was_not_refitted(
    outcomes: Sequence[Outcome], plan: PruningPlan, config: CompensationConfig | SequentialConfig
) -> None:
    found = [outcome.linear for outcome in outcomes if outcome.too_few_tokens]
    if found:
        logger.warning(
            "%s experts (the first: expert %s of layer %s) saw fewer than %s calibration tokens, as many as they have "
            "neurons, and were cut without refitting what is left. More prune.%s.num_samples reach more.",
            len(found),
            found[0].expert,
            found[0].layer,
            TOKENS_PER_INPUT * (plan.source.moe_ffn_hidden_size or 0),
            config.KEY,
        )


def pools_of(axis: str, layer: int, plan: PruningPlan) -> tuple[Tensor, Tensor]:
    """The pool of each neuron or head, and how many of each pool stay: as many as in the plan, of heads by group."""
    source, target = plan.source, plan.target
    if axis != "head":
        have, keep = (getattr(shape, DIM_OF_AXIS[axis]) for shape in (source, target))
        return torch.zeros(have, dtype=torch.int64), torch.tensor([keep])
    keep_of_group = torch.zeros(source.num_query_groups, dtype=torch.int64)
    keep_of_group[plan.group[layer]] = target.heads_per_group
    return torch.arange(source.num_query_groups).repeat_interleave(source.heads_per_group), keep_of_group


def _plan_of(plan: PruningPlan, outcomes: Sequence[Outcome]) -> PruningPlan:
    """`plan` with the neurons and heads that stayed."""
    entries = {axis: getattr(plan, axis).clone() for axis in {outcome.linear.axis for outcome in outcomes}}
    for outcome in outcomes:
        linear, kept = outcome.linear, torch.tensor(outcome.kept)
        place = linear.layer if linear.expert is None else (linear.layer, linear.expert)
        entries[linear.axis][place] = kept
    return dataclasses.replace(plan, **entries)

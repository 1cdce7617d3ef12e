"""Compensation against float64 lstsq on the inputs of each linear, layer after layer."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_batch_on_this_cp_rank
from torch import Tensor

from minitron_nemo.config.pruning import CompensationConfig
from minitron_nemo.parallel import Groups
from minitron_nemo.plan import PruningPlan
from minitron_nemo.pruning import prune_into
from minitron_nemo.pruning.compensation import Compensation, compensate
from minitron_nemo.pruning.second_moments import DenseInput, ExpertInputs
from minitron_nemo.shape import ModelShape
from minitron_nemo.weights import stream_full_parameters
from support.gathering_attention import build_context_parallel_gpt
from support.megatron import TINY, TINY_EXPERTS, build_gpt, causal_mask, run_gpt, smaller
from support.plans import random_plan
from support.ranks import Ranks

Weights = dict[str, Tensor]

DENSE = smaller(TINY, num_layers=3)
EXPERTS = smaller(TINY_EXPERTS, moe_router_pre_softmax=True)
RIDGE = 1e-2
SAMPLES, LENGTH = 8, 16
GENERATOR = torch.Generator().manual_seed(5)
TOKENS = torch.randint(66, (SAMPLES, LENGTH), generator=GENERATOR)
MASK = (torch.rand(SAMPLES, LENGTH, generator=GENERATOR) > 0.2).float()
MASK[3, 5:] = 0
MASK[6] = 0  # a sample of which nothing counts

CUTS: dict[str, tuple[ModelShape, dict[str, int]]] = {
    "llama": (DENSE, {"ffn_hidden_size": 18, "num_attention_heads": 4}),
    "groups": (DENSE, {"num_attention_heads": 2, "num_query_groups": 1}),
    "not gated, biases": (
        smaller(DENSE, gated_linear_unit=False, activation="gelu", add_bias_linear=True, normalization="LayerNorm"),
        {"ffn_hidden_size": 18, "num_attention_heads": 2},
    ),
    "experts": (
        EXPERTS,
        {
            "ffn_hidden_size": 18,
            "num_moe_experts": 3,
            "moe_ffn_hidden_size": 8,
            "moe_shared_expert_intermediate_size": 6,
        },
    ),
}


def plan_of(cut: str) -> PruningPlan:
    shape, target = CUTS[cut]
    return random_plan(shape, **target)


def calibration(model: Any, tokens: Tensor = TOKENS, mask: Tensor = MASK, micro_batch: int = 2) -> Callable[..., None]:
    """This rank's share of the samples: every dp-th, and of each its part over cp."""
    first, step = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    batch = get_batch_on_this_cp_rank({"tokens": tokens[first::step], "loss_mask": mask[first::step]})

    def run(before: Callable[[dict[str, Tensor]], None]) -> None:
        for start in range(0, len(batch["tokens"]), micro_batch):
            here = {name: tensor[start : start + micro_batch] for name, tensor in batch.items()}
            if parallel_state.get_pipeline_model_parallel_world_size() == 1:
                before(here)
                run_gpt(model, here["tokens"])
            else:
                run_schedule(model, here, before)

    return run


def run_schedule(model: Any, batch: dict[str, Tensor], before: Callable[[dict[str, Tensor]], None]) -> None:
    """Megatron's own, in which later stages hear of a micro-batch when its activations have arrived."""
    rows, length = batch["tokens"].shape

    def step(_: Any, model: Any) -> tuple[Tensor, Callable[..., None]]:
        before(batch)
        output = model(batch["tokens"], torch.arange(length).expand(rows, -1), causal_mask(length))
        return output, lambda logits, non_loss_data: None

    with torch.no_grad():
        get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=iter(()),
            model=[model],
            num_microbatches=1,
            seq_length=length,
            micro_batch_size=rows,
            forward_only=True,
            collect_non_loss_data=True,
        )


def full_weights(model: Any, shape: ModelShape) -> Weights:
    return {name: full.clone() for name, full in stream_full_parameters(model, shape, Groups.from_megatron())}


def compensated(cut: str, **options: Any) -> tuple[Weights, Compensation]:
    """Full weights after compensation on the current layout."""
    plan = plan_of(cut)
    build = build_context_parallel_gpt if parallel_state.get_context_parallel_world_size() > 1 else build_gpt
    model = build(plan.source)
    config = CompensationConfig(**{"ridge": RIDGE, "selection": "scores"} | options)
    found = compensate(model, plan, Groups.from_megatron(), calibration(model), config)
    return full_weights(model, plan.source), found


# ---- by hand ---------------------------------------------------------------------------------------------------------


def kept_inputs(plan: PruningPlan, layer: int, expert: int | None, name: str) -> list[int]:
    if "linear_proj" in name:
        channels = plan.source.kv_channels
        return [head * channels + channel for head in plan.head[layer].tolist() for channel in range(channels)]
    if expert is not None:
        return plan.expert_ffn[layer, expert].tolist()
    return (plan.shared_expert_ffn if "shared" in name else plan.ffn)[layer].tolist()


def cut_linears(model: Any, plan: PruningPlan, layer: int) -> dict[str, tuple[Any, int | None]]:
    """Name -> (linear, expert) of what reads a cut axis in a layer; dropped experts are left out."""
    block = model.decoder.layers[layer]
    linears: dict[str, tuple[Any, int | None]] = {}
    if plan.target.num_attention_heads < plan.source.num_attention_heads:
        linears["self_attention.linear_proj"] = block.self_attention.linear_proj, None
    if plan.source.has_experts(layer):
        linears["mlp.shared_experts.linear_fc2"] = block.mlp.shared_experts.linear_fc2, None
        for expert in plan.expert[layer].tolist():
            linear = block.mlp.experts.local_experts[expert].linear_fc2
            linears[f"mlp.experts.local_experts.{expert}.linear_fc2"] = linear, expert
    elif plan.target.ffn_hidden_size < plan.source.ffn_hidden_size:
        linears["mlp.linear_fc2"] = block.mlp.linear_fc2, None
    return linears


def counted_inputs(model: Any, plan: PruningPlan, layer: int) -> dict[str, Tensor]:
    """Every counted token's input of the linears that read a cut axis, [t, f] float64 by name."""
    seen: dict[str, list[Tensor]] = {}
    handles, mlp = [], model.decoder.layers[layer].mlp
    dense = {name: linear for name, (linear, expert) in cut_linears(model, plan, layer).items() if expert is None}
    places = dense | ({"experts": mlp} if plan.source.has_experts(layer) else {})
    for name, module in places.items():
        hook = lambda _, args, name=name: seen.setdefault(name, []).append(args[0])  # noqa: E731
        handles.append(module.register_forward_pre_hook(hook))
    run_gpt(model, TOKENS)
    for handle in handles:
        handle.remove()
    inputs = {name: torch.cat(parts)[MASK.t() != 0].double() for name, parts in seen.items()}
    if "experts" in inputs:
        inputs |= routed_inputs(mlp, inputs.pop("experts"))
    return inputs


def routed_inputs(mlp: Any, tokens: Tensor) -> dict[str, Tensor]:
    found: dict[str, list[Tensor]] = {}
    for token in tokens:
        weights, chosen = (mlp.router.weight.double() @ token).softmax(0).topk(2)
        for weight, expert in zip(weights, chosen.tolist(), strict=True):
            gate, up = (mlp.experts.local_experts[expert].linear_fc1.weight.double() @ token).chunk(2)
            found.setdefault(f"mlp.experts.local_experts.{expert}.linear_fc2", []).append(F.silu(gate) * up * weight)
    return {name: torch.stack(rows) for name, rows in found.items()}


@torch.no_grad()
def by_hand(plan: PruningPlan, *, layers_at_once: int) -> tuple[Weights, dict[str, float]]:
    """Full weights and each refitted linear's relative error; layer after layer on the model as it is by then."""
    model, before, errors = build_gpt(plan.source), build_gpt(plan.source), {}
    for layer in range(plan.source.num_layers):
        inputs = counted_inputs(model if layers_at_once == 1 else before, plan, layer)
        for name, (linear, expert) in cut_linears(model, plan, layer).items():
            seen, weight, kept = inputs[name], linear.weight.double(), kept_inputs(plan, layer, expert, name)
            pull = (RIDGE * seen.square().sum(0).mean()).sqrt()
            left = torch.cat([seen[:, kept], pull * torch.eye(len(kept), dtype=torch.float64)])
            right = torch.cat([seen @ weight.t(), pull * weight[:, kept].t()])
            new = torch.zeros_like(weight)
            new[:, kept] = torch.linalg.lstsq(left, right).solution.t()
            errors[f"{layer}.{name}"] = float(
                (seen @ (weight - new).t()).square().sum() / (seen @ weight.t()).square().sum()
            )
            linear.weight.copy_(new)
    return full_weights(model, plan.source), errors


def assert_same(found: Weights, expected: Weights, untouched: Weights, where: str = "") -> None:
    """Refitted weights agree to 1e-4 of their norm (float32 activations of another order of sums), the rest exactly."""
    for name, tensor in expected.items():
        if torch.equal(tensor, untouched[name]):
            assert torch.equal(found[name], tensor), f"{name} {where}"
        else:
            assert (found[name] - tensor).norm() <= 1e-4 * tensor.norm(), f"{name} {where}"


def assert_same_choice(found: PruningPlan, expected: PruningPlan, where: str = "") -> None:
    for axis in ("head", "ffn", "expert_ffn", "shared_expert_ffn"):
        mine, theirs = getattr(found, axis), getattr(expected, axis)
        assert mine is theirs is None or torch.equal(mine, theirs), f"{axis} {where}"


# ---- claims ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers_at_once", [1, 0])
@pytest.mark.parametrize("cut", CUTS)
def test_refitted_weights_are_least_squares_on_every_token_that_counts(cut: str, layers_at_once: int) -> None:
    plan = plan_of(cut)
    expected, errors = by_hand(plan, layers_at_once=layers_at_once)
    found, outcome = compensated(cut, layers_at_once=layers_at_once)
    assert_same(found, expected, full_weights(build_gpt(plan.source), plan.source))
    assert [linear.error for linear in outcome.linears] == pytest.approx(list(errors.values()), rel=1e-3)
    assert all(linear.error < linear.plain_error for linear in outcome.linears)
    assert_same_choice(outcome.plan, plan)


def test_layers_in_turn_and_all_at_once_are_not_the_same() -> None:
    in_turn, at_once = compensated("llama")[0], compensated("llama", layers_at_once=0)[0]
    first, last = "decoder.layers.0.mlp.linear_fc2.weight", "decoder.layers.2.mlp.linear_fc2.weight"
    assert torch.equal(in_turn[first], at_once[first])
    assert (in_turn[last] - at_once[last]).norm() > 1e-3 * at_once[last].norm()


@pytest.mark.parametrize("cut", ["llama", "experts"])
def test_what_surgery_then_cuts_was_silent(cut: str) -> None:
    plan = plan_of(cut)
    if plan.expert is not None:  # dropped experts do speak
        target = {dim: size for dim, size in CUTS[cut][1].items() if dim != "num_moe_experts"}
        plan = random_plan(plan.source, **target)
    model = build_gpt(plan.source)
    compensate(
        model, plan, Groups.from_megatron(), calibration(model), CompensationConfig(ridge=RIDGE, selection="scores")
    )
    student = build_gpt(plan.target, seed=1)
    prune_into(model, student, plan, Groups.from_megatron())
    with torch.no_grad():
        torch.testing.assert_close(run_gpt(student, TOKENS), run_gpt(model, TOKENS), rtol=1e-4, atol=1e-4)


def test_a_compensated_student_is_nearer_to_its_teacher() -> None:
    plan = plan_of("llama")
    teacher, compensated_teacher, students = build_gpt(plan.source), build_gpt(plan.source), []
    chosen = compensate(compensated_teacher, plan, Groups.from_megatron(), calibration(compensated_teacher)).plan
    for model, kept in ((teacher, plan), (compensated_teacher, chosen)):
        students.append(build_gpt(plan.target, seed=1))
        prune_into(model, students[-1], kept, Groups.from_megatron())
    with torch.no_grad():
        wanted = run_gpt(teacher, TOKENS)
        plain, refitted = (float((run_gpt(student, TOKENS) - wanted).norm()) for student in students)
    assert refitted < 0.8 * plain


@pytest.mark.parametrize("cut", ["llama", "experts"])
def test_where_nothing_is_dropped_nothing_is_run_and_no_weight_changes(cut: str) -> None:
    shape, model = CUTS[cut][0], build_gpt(CUTS[cut][0])
    plan = random_plan(shape, hidden_size=14)

    def never(_: Any) -> None:
        raise AssertionError("a pass that nothing needs")

    assert compensate(model, plan, Groups.from_megatron(), never).linears == ()
    expected = full_weights(build_gpt(shape), shape)
    assert all(torch.equal(full, expected[name]) for name, full in full_weights(model, shape).items())


@pytest.mark.parametrize("cut", ["llama", "experts"])
def test_a_choice_by_the_compensated_error_leaves_less_of_it(cut: str) -> None:
    plan = plan_of(cut)
    by_scores = compensated(cut, layers_at_once=0)[1]
    by_error = compensated(cut, layers_at_once=0, selection="compensated_error")[1]
    mine, given = (sum(linear.error for linear in found.linears) for found in (by_error, by_scores))
    assert mine < 0.9 * given  # each linear on its own need not gain: dropping one at a time is greedy
    assert torch.equal(by_error.plan.group, plan.group)


def on_this_layout(cut: str) -> tuple[Weights, Compensation, Compensation]:
    weights, in_turn = compensated(cut)
    _, chosen = compensated(cut, layers_at_once=2, selection="compensated_error")
    return weights, in_turn, chosen


on_one_process = functools.cache(on_this_layout)

LAYOUTS = [
    *(("llama", layout) for layout in ("tp2", "tp2-sp", "pp2", "dp2", "cp2")),
    *(("experts", layout) for layout in ("dp2-ep2", "tp2", "tp2-sp-ep2-etp1", "pp2")),
]


@pytest.mark.parametrize(("cut", "layout"), LAYOUTS)
def test_the_outcome_is_the_same_on_every_layout(ranks: Ranks, cut: str, layout: str) -> None:
    expected, in_turn, chosen = on_one_process(cut)
    shape = CUTS[cut][0]
    untouched = full_weights(build_gpt(shape), shape)
    for rank, found in enumerate(ranks(layout).run(on_this_layout, cut)):
        assert_same(found[0], expected, untouched, f"rank {rank} of {layout}")
        for mine, theirs in zip(found[1:], (in_turn, chosen), strict=True):
            assert [(x.axis, x.layer, x.expert) for x in mine.linears] == [
                (x.axis, x.layer, x.expert) for x in theirs.linears
            ]
            assert [x.error for x in mine.linears] == pytest.approx([x.error for x in theirs.linears], rel=1e-3)
            assert_same_choice(mine.plan, theirs.plan, f"rank {rank} of {layout}")


def test_micro_batch_size_and_padding_change_nothing() -> None:
    plan = plan_of("llama")
    expected = compensated("llama")[0]
    tokens = torch.where(MASK != 0, TOKENS, 3)  # behind causal attention only what stands before counts
    ends = (MASK.cumsum(1) == MASK.sum(1, keepdim=True)) & (MASK == 0)  # after the last token that counts
    model = build_gpt(plan.source)
    run = calibration(model, torch.where(ends, tokens, TOKENS), MASK, micro_batch=8)
    compensate(model, plan, Groups.from_megatron(), run, CompensationConfig(ridge=RIDGE, selection="scores"))
    untouched = full_weights(build_gpt(plan.source), plan.source)
    assert_same(full_weights(model, plan.source), expected, untouched)


def test_bf16_weights_stay_bf16_and_near_the_float32_solution() -> None:
    plan, expected = plan_of("llama"), compensated("llama")[0]
    model = build_gpt(plan.source, dtype=torch.bfloat16)
    compensate(
        model, plan, Groups.from_megatron(), calibration(model), CompensationConfig(ridge=RIDGE, selection="scores")
    )
    for name, full in full_weights(model, plan.source).items():
        assert full.dtype == torch.bfloat16
        assert (full.float() - expected[name]).norm() < 0.05 * expected[name].norm(), name  # 8 bits of mantissa


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ridge": -0.1}, r"compensation.ridge=-0.1 must be at least 0; the default is 0.01"),
        ({"ridge": float("nan")}, r"compensation.ridge=nan must be a finite number at least 0"),
        ({"layers_at_once": -1}, r"compensation.layers_at_once=-1 must be at least 0"),
        ({"num_samples": 0}, r"compensation.num_samples=0 must be at least 1; try 256"),
        ({"selection": "score"}, r"compensation.selection=score is not known; did you mean scores\?"),
    ],
)
def test_a_config_that_cannot_work_says_what_would(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CompensationConfig(**options)


def refused(plan: PruningPlan, mask: Tensor = MASK, broken: bool = False, **options: Any) -> None:
    model = build_gpt(plan.source)
    for layer in model.decoder.layers:
        if broken and layer.layer_number == 2:
            layer.mlp.linear_fc1.weight.data[7] = float("nan")
    compensate(model, plan, Groups.from_megatron(), calibration(model, mask=mask), CompensationConfig(**options))


def test_what_cannot_be_compensated_is_refused() -> None:
    plan = plan_of("llama")
    merged = dataclasses.replace(plan, head_partner=torch.full_like(plan.head, -1))
    with pytest.raises(ValueError, match=r"plan.head_partner merges dropped heads into kept ones, .* Use one of them"):
        refused(merged)
    with pytest.raises(ValueError, match=r"The plan drops 1 layers, .* Drop the layers first"):
        refused(random_plan(DENSE, num_layers=2, ffn_hidden_size=18))
    few = torch.zeros_like(MASK)
    few[0, :5] = 1
    message = (
        r"decoder.layers.0.self_attention.linear_proj: the second moment of its 48 inputs is not positive definite"
    )
    with pytest.raises(ValueError, match=message):
        refused(plan, mask=few, ridge=0.0)


def test_an_input_that_is_not_finite_is_named_on_every_stage(ranks: Ranks) -> None:
    plan = random_plan(DENSE, ffn_hidden_size=18)
    message = r"Inputs of decoder.layers.1.mlp.linear_fc2 are not finite \(NaN or infinity\)"
    with pytest.raises(ValueError, match=message):
        refused(plan, broken=True)
    with pytest.raises(ValueError, match=message):
        ranks("pp2").run(refused, plan, MASK, True)


def compensated_on_few_tokens() -> tuple[Weights, Weights, Compensation, str]:
    """Weights before and after, the outcome, and what was logged, of a pass over five tokens."""
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append
    plan = plan_of("experts")
    model = build_gpt(plan.source)
    before = full_weights(model, plan.source)
    logging.getLogger("minitron_nemo").addHandler(handler)
    try:
        run = calibration(model, TOKENS[:1], (torch.arange(LENGTH) < 5).float().expand(1, -1), micro_batch=1)
        found = compensate(model, plan, Groups.from_megatron(), run, CompensationConfig(ridge=RIDGE))
    finally:
        logging.getLogger("minitron_nemo").removeHandler(handler)
    return before, full_weights(model, plan.source), found, "".join(record.getMessage() for record in records)


def test_an_expert_that_few_tokens_reached_is_cut_and_not_refitted(ranks: Ranks) -> None:
    [(before, after, found, said)] = ranks("single").run(compensated_on_few_tokens)
    plan, experts = plan_of("experts"), [linear for linear in found.linears if linear.axis == "expert_ffn"]
    assert f"{len(experts)} experts (the first: expert" in said and "were cut without refitting" in said
    for linear in experts:
        assert linear.error == linear.plain_error
        name = f"decoder.layers.{linear.layer}.mlp.experts.local_experts.{linear.expert}.linear_fc2.weight"
        kept = plan.expert_ffn[linear.layer, linear.expert]
        expected = torch.zeros_like(before[name])
        expected[:, kept] = before[name][:, kept]
        assert torch.equal(after[name], expected)
        assert torch.equal(found.plan.expert_ffn[linear.layer, linear.expert], kept)  # not by an error of few tokens


def chosen_of_twins(cut: str) -> PruningPlan:
    """What stays where inputs are alike, neuron by neuron, and each rank's second moments differ in their last bits."""
    plan = plan_of(cut)
    model = build_gpt(plan.source)
    for name, parameter in model.named_parameters():
        if "linear_fc2.weight" in name:
            parameter.data[:, 1::2] = parameter.data[:, 0::2]
        elif "linear_fc1.weight" in name:
            parameter.data[1::2] = parameter.data[0::2]
    rounding = torch.Generator().manual_seed(torch.distributed.get_rank())
    merges = [(kind, kind.merge_over_ranks) for kind in (DenseInput, ExpertInputs)]
    for kind, merge in merges:

        def nearly(self: Any, *expert: int, merge: Any = merge) -> Tensor:
            moment = merge(self, *expert)
            noise = torch.rand(moment.shape, generator=rounding, dtype=torch.float64)
            noise = (noise + noise.t()) / 2
            return moment * (1 + 2**-50 * noise)

        kind.merge_over_ranks = nearly
    try:
        run, config = calibration(model), CompensationConfig(ridge=RIDGE, layers_at_once=0)
        return compensate(model, plan, Groups.from_megatron(), run, config).plan
    finally:
        for kind, merge in merges:
            kind.merge_over_ranks = merge


@pytest.mark.parametrize(("cut", "layout"), [("llama", "dp2"), ("experts", "tp2"), ("experts", "dp2-ep2")])
def test_ranks_whose_rounding_differs_keep_the_same(ranks: Ranks, cut: str, layout: str) -> None:
    first, second = ranks(layout).run(chosen_of_twins, cut)
    assert_same_choice(second, first)

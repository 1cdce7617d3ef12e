"""Standing in for dropped layers, against float64 lstsq on the neurons and the stream."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from test_compensation import EXPERTS, MASK, TOKENS, Weights, assert_same, calibration, full_weights
from torch import Tensor

from minitron_nemo.config.pruning import DepthCorrectionConfig
from minitron_nemo.parallel import Groups
from minitron_nemo.plan import PruningPlan
from minitron_nemo.pruning import plan_from_importance, prune_into
from minitron_nemo.pruning.depth_correction import CorrectedRun, correct_depth
from minitron_nemo.shape import ModelShape
from support.gathering_attention import build_context_parallel_gpt
from support.megatron import TINY, build_gpt, run_gpt, smaller
from support.plans import random_scores
from support.ranks import Ranks

SHAPE = smaller(TINY, num_layers=8)
KEPT = [1, 2, 5, 6]  # dropped: 0, which nothing precedes; 3 and 4, of two pipeline stages; 7
RIDGE = 1e-2


def plan_keeping(kept: list[int], shape: ModelShape = SHAPE) -> PruningPlan:
    target = shape.keeping_layers(kept)
    return plan_from_importance(random_scores(shape), shape, target, layers=kept)


def corrected(**options: Any) -> tuple[Weights, tuple[CorrectedRun, ...]]:
    build = build_context_parallel_gpt if parallel_state.get_context_parallel_world_size() > 1 else build_gpt
    model = build(SHAPE)
    config = DepthCorrectionConfig(**{"ridge": RIDGE} | options)
    found = correct_depth(model, plan_keeping(KEPT), Groups.from_megatron(), calibration(model), config)
    return full_weights(model, SHAPE), found


@functools.cache
@torch.no_grad()
def by_hand(method: str) -> tuple[Weights, list[float]]:
    """Full weights, and of each run the share of what it adds that is not stood in for."""
    model, inputs, outputs = build_gpt(SHAPE), {}, {}
    for index, layer in enumerate(model.decoder.layers):
        layer.mlp.linear_fc2.register_forward_pre_hook(
            lambda _, args, index=index: inputs.__setitem__(index, args[0][MASK.t() != 0].double())
        )
        layer.register_forward_hook(
            lambda _, args, output, index=index: outputs.__setitem__(index, output[0][MASK.t() != 0].double())
        )
    run_gpt(model, TOKENS)
    errors = []
    for before, last in ((2, 4), (6, 7)):
        linear = model.decoder.layers[before].mlp.linear_fc2
        seen, added, weight = inputs[before], outputs[last] - outputs[before], linear.weight.double()
        if method == "scale":
            wrote = (seen @ weight.t()).flatten()
            change = weight * torch.linalg.lstsq(wrote.unsqueeze(1), added.flatten().unsqueeze(1)).solution
        else:
            pull = (RIDGE * seen.square().sum(0).mean()).sqrt()
            rows = torch.cat([seen, pull * torch.eye(SHAPE.ffn_hidden_size, dtype=torch.float64)])
            wanted = torch.cat([added, torch.zeros(SHAPE.ffn_hidden_size, SHAPE.hidden_size, dtype=torch.float64)])
            change = torch.linalg.lstsq(rows, wanted).solution.t()
        errors.append(float((added - seen @ change.t()).square().sum() / added.square().sum()))
        linear.weight.copy_(weight + change)
    return full_weights(model, SHAPE), errors


@pytest.mark.parametrize("method", ["least_squares", "scale"])
def test_the_layer_before_dropped_ones_writes_what_fits_them_best(method: str) -> None:
    expected, errors = by_hand(method)
    found, runs = corrected(method=method)
    assert_same(found, expected, full_weights(build_gpt(SHAPE), SHAPE))
    assert [(run.layer, run.first, run.last) for run in runs] == [(2, 3, 4), (6, 7, 7)]
    assert [run.error for run in runs] == pytest.approx(errors, rel=1e-3)
    assert all(run.error < 1 for run in runs)


def test_a_corrected_student_is_nearer_to_its_teacher() -> None:
    plan = plan_keeping([0, 1, 2, 3, 5, 6, 7])
    teacher, corrected_teacher = build_gpt(SHAPE), build_gpt(SHAPE)
    correct_depth(corrected_teacher, plan, Groups.from_megatron(), calibration(corrected_teacher))
    distances = []
    with torch.no_grad():
        for model in (teacher, corrected_teacher):
            student = build_gpt(plan.target, seed=1)
            prune_into(model, student, plan, Groups.from_megatron())
            distances.append(float((run_gpt(student, TOKENS) - run_gpt(teacher, TOKENS)).norm()))
    plain, better = distances
    assert better < 0.8 * plain


def test_where_no_layer_is_dropped_nothing_is_run_and_no_weight_changes() -> None:
    model = build_gpt(SHAPE)

    def never(_: Any) -> None:
        raise AssertionError("a pass that nothing needs")

    assert correct_depth(model, plan_keeping(list(range(8))), Groups.from_megatron(), never) == ()
    assert correct_depth(model, plan_keeping(list(range(2, 8))), Groups.from_megatron(), never) == ()
    expected = full_weights(build_gpt(SHAPE), SHAPE)
    assert all(torch.equal(full, expected[name]) for name, full in full_weights(model, SHAPE).items())


@pytest.mark.parametrize("layout", ["tp2", "tp2-sp", "dp2", "cp2", "pp2"])
def test_the_correction_is_the_same_on_every_layout(ranks: Ranks, layout: str) -> None:
    expected, errors = by_hand("least_squares")
    untouched = full_weights(build_gpt(SHAPE), SHAPE)
    for rank, (found, runs) in enumerate(ranks(layout).run(corrected)):
        assert_same(found, expected, untouched, f"rank {rank} of {layout}")
        assert [run.error for run in runs] == pytest.approx(errors, rel=1e-3)


def refused(kept: list[int], shape: ModelShape = SHAPE, mask: Tensor = MASK, broken: bool = False, **options: Any):
    model = build_gpt(shape)
    for layer in model.decoder.layers:
        if broken and layer.layer_number == 8:
            layer.mlp.linear_fc1.weight.data[7] = float("nan")
    plan = plan_keeping(kept, shape)
    correct_depth(model, plan, Groups.from_megatron(), calibration(model, mask=mask), DepthCorrectionConfig(**options))


def test_what_cannot_be_corrected_is_refused_on_every_stage(ranks: Ranks) -> None:
    with pytest.raises(ValueError, match=r"Layer 0, after which layers 1 to 1 are dropped, has experts"):
        refused([0, 2], EXPERTS)
    few = torch.zeros_like(MASK)
    few[0, :5] = 1
    with pytest.raises(ValueError, match=r"layers.2.mlp.linear_fc2: the second moment of its 40 inputs is not"):
        refused(KEPT, mask=few, ridge=0.0)
    message = r"between decoder.layers.6.mlp.linear_fc2 and decoder.layers.7 are not finite \(NaN or infinity\)"
    with pytest.raises(ValueError, match=message):
        refused(KEPT, broken=True)
    with pytest.raises(ValueError, match=message):
        ranks("pp2").run(refused, KEPT, SHAPE, MASK, True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"method": "least_square"},
            r"depth_correction.method=least_square is not known; did you mean",
        ),
        ({"ridge": -1.0}, r"depth_correction.ridge=-1.0 must be at least 0; the default is 0.1"),
        ({"num_samples": 0}, r"depth_correction.num_samples=0 must be at least 1; try 256"),
    ],
)
def test_a_config_that_cannot_work_says_what_would(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DepthCorrectionConfig(**options)

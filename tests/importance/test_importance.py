"""Importance of a real Megatron model, against all activations kept and for loops in float64."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from importance_by_hand import PAIRS, importance_by_hand
from importance_on_ranks import NUM_SAMPLES, SHAPE, TOKENS, build_model, estimate, make_samples
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.identity_op import IdentityOp
from torch import Tensor
from torch.testing import assert_close

from minitron_nemo.config.importance import ImportanceConfig
from minitron_nemo.importance import ImportanceEstimator
from minitron_nemo.importance.baselines import random_scores, weight_magnitude
from minitron_nemo.parallel import Groups
from minitron_nemo.scores import Importance
from minitron_nemo.shape import ModelShape
from support.megatron import TINY_EXPERTS, build_gpt, causal_mask, fuse_norms, run_gpt
from support.ranks import Ranks

AXES = ("hidden", "ffn", "head", "group")


def assert_same_scores(actual: Importance, expected: Any, message: str, rtol: float = 1e-5) -> None:
    """Every axis and aggregation; `expected` is an Importance or by-hand scores."""
    for axis in AXES:
        for batch, sequence in PAIRS:
            reference = (
                expected.scores(axis, batch, sequence)
                if isinstance(expected, Importance)
                else expected[axis, batch, sequence]
            )
            assert_close(
                actual.scores(axis, batch, sequence),
                reference.float(),
                rtol=rtol,
                # float32 activations differ by 1e-7 of themselves; a variance that is a small difference of large
                # squares keeps that error relative to the squares
                atol=1e-6 * reference.abs().max().item() if "variance" in (batch, sequence) else 0,
                msg=lambda text, what=f"{message}: {axis} {batch} {sequence}": f"{what}\n{text}",
            )


@pytest.fixture(scope="module")
def by_hand() -> dict[tuple[str, str, str], Tensor]:
    return importance_by_hand(build_gpt(SHAPE), SHAPE, *make_samples())


@pytest.fixture(scope="module")
def contributions_by_hand() -> dict[tuple[str, str, str], Tensor]:
    return importance_by_hand(build_gpt(SHAPE), SHAPE, *make_samples(), metric="contributions")


def estimate_all(tokens: Tensor, mask: Tensor, *, micro_batch: int = 1) -> dict[str, Importance]:
    """By every metric."""
    estimated = {
        metric: estimate(tokens, mask, micro_batch=micro_batch, metric=metric)
        for metric in ("activations", "contributions")
    }
    magnitude = weight_magnitude(build_model(), SHAPE, Groups.from_megatron())
    return {**estimated, "weight_magnitude": magnitude, "random": random_scores(SHAPE, seed=1)}


@pytest.mark.parametrize("layout", ["tp2", "tp2-sp", "pp2", "dp2", "cp2", "tp2-pp2", "tp2-dp2"])
def test_importance_by_every_metric_is_the_same_on_every_layout(
    ranks: Ranks,
    by_hand: dict[tuple[str, str, str], Tensor],
    contributions_by_hand: dict[tuple[str, str, str], Tensor],
    layout: str,
) -> None:
    magnitude = weight_magnitude(build_gpt(SHAPE), SHAPE, Groups.from_megatron())
    everyone = ranks(layout).run(estimate_all, *make_samples(), micro_batch=3)
    for rank, by_metric in enumerate(everyone):
        where = f"rank {rank} of {layout}"
        assert_same_scores(by_metric["activations"], by_hand, where)
        assert_same_scores(by_metric["contributions"], contributions_by_hand, f"contributions, {where}")
        assert_same_scores(by_metric["weight_magnitude"], magnitude, f"weight magnitude, {where}", rtol=0)
        assert_same_scores(by_metric["random"], random_scores(SHAPE, seed=1), f"random, {where}", rtol=0)
        assert by_metric["activations"].num_samples == NUM_SAMPLES
        for metric, importance in by_metric.items():
            for axis in AXES:  # bitwise: ranks that rank differently would prune differently
                for pair in PAIRS:
                    ours, first = importance.scores(axis, *pair), everyone[0][metric].scores(axis, *pair)
                    assert torch.equal(ours, first), f"{where} differs from rank 0 in {axis} by {metric}"


def test_all_nine_aggregations_equal_loops_over_all_activations(by_hand: dict[tuple[str, str, str], Tensor]) -> None:
    assert len(PAIRS) == 9
    assert_same_scores(estimate(*make_samples()), by_hand, "one process")


OPTIONS = {"head_norm": "after", "neurons": "pre_activation"}


def test_other_measures_equal_loops_over_all_activations(ranks: Ranks) -> None:
    expected = importance_by_hand(build_gpt(SHAPE), SHAPE, *make_samples(), **OPTIONS)
    assert_same_scores(estimate(*make_samples(), **OPTIONS), expected, "one process")
    for rank, importance in enumerate(ranks("tp2-sp").run(estimate, *make_samples(), **OPTIONS)):
        assert_same_scores(importance, expected, f"rank {rank} of tp2-sp")


def test_contributions_equal_loops_over_what_each_structure_writes(
    contributions_by_hand: dict[tuple[str, str, str], Tensor],
) -> None:
    assert_same_scores(estimate(*make_samples(), metric="contributions"), contributions_by_hand, "one process")


@pytest.mark.parametrize(
    "changes", [{"normalization": "LayerNorm1p", "gated_linear_unit": False}, {"add_bias_linear": True}]
)
@pytest.mark.parametrize("neurons", ["post_activation", "pre_activation"])
def test_importance_of_other_architectures_equals_loops_over_all_activations(
    changes: dict[str, Any], neurons: str
) -> None:
    shape = dataclasses.replace(SHAPE, **changes)
    expected = importance_by_hand(build_gpt(shape), shape, *make_samples(), neurons=neurons)
    assert_same_scores(estimate(*make_samples(), shape=shape, neurons=neurons), expected, str(changes))


def test_a_model_with_experts_is_scored_on_every_axis_it_has(ranks: Ranks) -> None:
    """The axes of experts have their own tests; here they stand beside the others, of dense and expert layers."""
    shape = dataclasses.replace(
        TINY_EXPERTS, num_layers=3, moe_layer_freq=(0, 1, 1), moe_shared_expert_intermediate_size=20
    )
    alone = estimate(*make_samples(), shape=shape)
    assert set(alone.axes) == {*AXES, "expert", "expert_ffn", "shared_expert_ffn"}
    for axis, dense in (("ffn", [True, False, False]), ("shared_expert_ffn", [False, True, True])):
        assert (alone.scores(axis) > 0).any(1).tolist() == dense, axis
    for importance in ranks("tp2-sp").run(estimate, *make_samples(), shape=shape, micro_batch=3):
        for axis in alone.axes:
            assert_close(importance.scores(axis), alone.scores(axis), rtol=1e-4, atol=0, msg=axis)


def estimate_in_schedule(tokens: Tensor, mask: Tensor, *, micro_batch: int) -> Importance:
    """As `estimate`, driven by Megatron's own pipeline schedule; every stage is told the mask."""
    model = build_gpt(SHAPE)
    positions = torch.arange(TOKENS).expand(micro_batch, TOKENS)

    def forward_step(batches: Any, model: Any) -> tuple[Tensor, Any]:
        batch_tokens, batch_mask = next(batches)
        estimator.sample(batch_mask)
        output = model(batch_tokens, positions, causal_mask(TOKENS))
        return output, lambda logits: (logits.sum(), {"seen": len(batch_tokens)})

    with ImportanceEstimator(model, SHAPE, Groups.from_megatron()) as estimator:
        get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter(zip(tokens.split(micro_batch), mask.split(micro_batch), strict=True)),
            model=model,
            num_microbatches=len(tokens) // micro_batch,
            seq_length=TOKENS,
            micro_batch_size=micro_batch,
            forward_only=True,
        )
        return estimator.finish()


def test_importance_is_the_same_in_megatrons_pipeline_schedule(
    ranks: Ranks, by_hand: dict[tuple[str, str, str], Tensor]
) -> None:
    for rank, importance in enumerate(ranks("pp2").run(estimate_in_schedule, *make_samples(), micro_batch=2)):
        assert_same_scores(importance, by_hand, f"rank {rank} of pp2")


def test_micro_batch_size_does_not_change_scores() -> None:
    one = estimate(*make_samples(), micro_batch=1)
    for micro_batch in (2, 4, 6):
        assert_same_scores(estimate(*make_samples(), micro_batch=micro_batch), one, f"micro-batch of {micro_batch}")


def test_order_of_samples_does_not_change_scores() -> None:
    tokens, mask = make_samples()
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    assert_same_scores(estimate(tokens[order], mask[order], micro_batch=2), estimate(tokens, mask), "another order")


def test_padded_tokens_contribute_nothing() -> None:
    tokens, mask = make_samples()
    mask[4] = 1  # padding at the end only: what stands there cannot reach the tokens before it
    other = torch.where(mask == 0, (tokens + 17) % SHAPE.padded_vocab_size, tokens)
    assert not torch.equal(tokens, other)
    assert_same_scores(estimate(other, mask), estimate(tokens, mask), "other padding", rtol=0)


def test_a_sample_that_is_all_padding_is_no_sample() -> None:
    tokens, mask = make_samples()
    filled = torch.cat([mask, torch.zeros(2, TOKENS)])
    importance = estimate(torch.cat([tokens, tokens[:2]]), filled, micro_batch=4)
    assert importance.num_samples == NUM_SAMPLES
    assert_same_scores(importance, estimate(tokens, mask), "with fillers")


def test_repeating_all_samples_does_not_change_scores() -> None:
    tokens, mask = make_samples()
    twice = estimate(tokens.repeat(2, 1), mask.repeat(2, 1))
    assert twice.num_samples == 2 * NUM_SAMPLES
    assert_same_scores(twice, estimate(tokens, mask), "each sample twice")


def test_estimating_changes_neither_outputs_nor_weights_nor_modes() -> None:
    tokens, mask = make_samples()
    model = build_gpt(SHAPE).train()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with torch.no_grad():
        expected = run_gpt(model, tokens)
        with ImportanceEstimator(model, SHAPE, Groups.from_megatron()) as estimator:
            assert not model.training
            estimator.sample(mask)
            actual = run_gpt(model, tokens)
    assert torch.equal(actual, expected)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert model.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.decoder.layers.modules())


def estimate_fused(tokens: Tensor, mask: Tensor, shape: ModelShape) -> Importance:
    model = fuse_norms(build_gpt(shape))
    with ImportanceEstimator(model, shape, Groups.from_megatron()) as estimator, torch.no_grad():
        estimator.sample(mask)
        run_gpt(model, tokens)
        return estimator.finish()


@pytest.mark.parametrize("normalization", ["RMSNorm", "LayerNorm", "LayerNorm1p"])
def test_norms_fused_into_linears_score_hidden_channels_alike(ranks: Ranks, normalization: str) -> None:
    shape = dataclasses.replace(SHAPE, normalization=normalization)
    plain = estimate(*make_samples(), shape=shape)
    assert_same_scores(estimate_fused(*make_samples(), shape), plain, normalization)
    if normalization == "LayerNorm1p":
        for rank, importance in enumerate(ranks("tp2-sp").run(estimate_fused, *make_samples(), shape)):
            assert_same_scores(importance, plain, f"{normalization}, rank {rank} of tp2-sp")


def test_merged_halves_are_one_pass_over_both() -> None:
    tokens, mask = make_samples()
    parts = [estimate(tokens[here], mask[here]) for here in (slice(2), slice(2, None))]
    merged = Importance.merge(parts)
    assert_same_scores(merged, estimate(tokens, mask), "merged", rtol=1e-6)
    assert merged.num_samples == NUM_SAMPLES and merged.origin["head_norm"] == "before"
    assert len(merged.origin["merged"]) == 2


def test_weight_magnitude_is_the_norm_of_a_structures_weights() -> None:
    layers = build_gpt(SHAPE).decoder.layers
    f, d = SHAPE.ffn_hidden_size, SHAPE.kv_channels
    expected_ffn, expected_head = torch.zeros(2, f), torch.zeros(2, SHAPE.num_attention_heads)
    for layer in (0, 1):
        fc1, fc2 = layers[layer].mlp.linear_fc1.weight, layers[layer].mlp.linear_fc2.weight
        for neuron in range(f):
            expected_ffn[layer, neuron] = torch.cat([fc1[neuron], fc1[f + neuron], fc2[:, neuron]]).norm()
        qkv, proj = layers[layer].self_attention.linear_qkv.weight, layers[layer].self_attention.linear_proj.weight
        for head in range(SHAPE.num_attention_heads):
            first = (head // SHAPE.heads_per_group * (SHAPE.heads_per_group + 2) + head % SHAPE.heads_per_group) * d
            rows, columns = qkv[first : first + d], proj[:, head * d : (head + 1) * d]
            expected_head[layer, head] = torch.cat([rows.flatten(), columns.flatten()]).norm()
    alone = weight_magnitude(build_gpt(SHAPE), SHAPE, Groups.from_megatron())
    assert_close(alone.scores("ffn"), expected_ffn)
    assert_close(alone.scores("head"), expected_head)
    assert_close(alone.scores("ffn", "mean", "variance"), expected_ffn)


def test_random_scores_are_those_of_the_seed() -> None:
    first, again, other = (random_scores(SHAPE, seed=seed) for seed in (1, 1, 2))
    assert_same_scores(again, first, "same seed", rtol=0)
    for axis in AXES:
        assert not torch.equal(other.scores(axis), first.scores(axis)), axis
        assert first.scores(axis).unique().numel() == first.scores(axis).numel(), f"{axis} has ties"


# ---- errors ----------------------------------------------------------------------------------------------------------


def test_a_shape_of_another_model_is_an_error() -> None:
    other = dataclasses.replace(SHAPE, ffn_hidden_size=48)
    with (
        pytest.raises(ValueError, match=r"The model has ffn_hidden_size=40, but the shape to score it by says 48"),
        ImportanceEstimator(build_gpt(SHAPE), other, Groups()),
    ):
        pass


def test_a_layer_without_dense_mlp_is_an_error_that_leaves_no_hook() -> None:
    model = build_gpt(SHAPE)
    model.decoder.layers[1].mlp = IdentityOp()
    with (
        pytest.raises(ValueError, match=r"decoder.layers.1.mlp is a IdentityOp without linear_fc2"),
        ImportanceEstimator(model, SHAPE, Groups()),
    ):
        pass
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_zero_samples_are_an_error() -> None:
    model = build_gpt(SHAPE)
    with (
        ImportanceEstimator(model, SHAPE, Groups()) as estimator,
        pytest.raises(ValueError, match=r"at least 1 calibration sample .* but 0 were seen"),
    ):
        estimator.finish()


def test_a_forward_pass_that_was_not_announced_is_an_error() -> None:
    tokens, mask = make_samples()
    model = build_gpt(SHAPE)
    with (
        ImportanceEstimator(model, SHAPE, Groups()),
        torch.no_grad(),
        pytest.raises(RuntimeError, match=r"Call estimator.sample\(loss_mask\) once before each forward"),
    ):
        run_gpt(model, tokens)
    with ImportanceEstimator(model, SHAPE, Groups()) as estimator, torch.no_grad():
        estimator.sample(mask)
        run_gpt(model, tokens)
        with pytest.raises(RuntimeError, match="saw forward pass 2, but 1 micro-batches were announced"):
            run_gpt(model, tokens)


def test_a_mask_of_another_size_is_an_error() -> None:
    tokens, mask = make_samples()
    model = build_gpt(SHAPE)
    with ImportanceEstimator(model, SHAPE, Groups()) as estimator, torch.no_grad():
        estimator.sample(mask[:, :-1])
        with pytest.raises(ValueError, match="announced 6 samples of 11 tokens"):
            run_gpt(model, tokens)


def test_activations_that_are_not_finite_stop_the_pass_and_name_layer_axis_and_sample() -> None:
    """The pass ends with the micro-batch, not with the calibration: the next announcement raises."""
    tokens, mask = make_samples(padded=False)
    tokens[tokens == 0] = 1
    tokens[3, 7] = 0
    model = build_gpt(SHAPE)
    with torch.no_grad():
        model.embedding.word_embeddings.weight[0] = float("nan")
    message = (
        r"axis hidden \(input norm\) in decoder.layers.0 are not finite \(NaN or infinity\) in calibration sample 3 "
    )
    with ImportanceEstimator(model, SHAPE, Groups()) as estimator, torch.no_grad():
        for start in (0, 2):
            estimator.sample(mask[start : start + 2])
            run_gpt(model, tokens[start : start + 2])
        with pytest.raises(ValueError, match=message):
            estimator.sample(mask[4:])
    with ImportanceEstimator(model, SHAPE, Groups()) as estimator, torch.no_grad():
        estimator.sample(mask)
        run_gpt(model, tokens)
        with pytest.raises(ValueError, match=message):
            estimator.finish()


def not_finite_on_one_rank(tokens: Tensor, mask: Tensor) -> str:
    """A neuron of the last layer that only the second tensor-parallel rank holds."""
    model = build_gpt(SHAPE)
    if parallel_state.get_tensor_model_parallel_rank() == 1:
        model.decoder.layers[1].mlp.linear_fc1.weight.data[3] = float("inf")
    with ImportanceEstimator(model, SHAPE, Groups.from_megatron()) as estimator, torch.no_grad():
        estimator.sample(mask)
        run_gpt(model, tokens)
        with pytest.raises(ValueError) as error:
            estimator.finish()
    return str(error.value)


def test_every_rank_stops_with_one_message_where_one_of_them_is_not_finite(ranks: Ranks) -> None:
    first, second = ranks("tp2").run(not_finite_on_one_rank, *make_samples())
    assert "axis ffn in decoder.layers.1 are not finite" in first and "sample 0 " in first
    assert second == first


def test_values_that_cannot_work_are_named() -> None:
    with pytest.raises(ValueError, match=r"importance.head_norm=befor is not known; did you mean before\?"):
        ImportanceConfig(head_norm="befor")
    with pytest.raises(ValueError, match=r"importance.neurons=pre is not known; .*pre_activation"):
        ImportanceConfig(neurons="pre")
    with pytest.raises(ValueError, match=r"importance.num_samples=0 must be at least 1; try 1024"):
        ImportanceConfig(num_samples=0)

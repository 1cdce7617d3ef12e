"""Importance of a real Megatron model, against all activations kept and for loops in float64."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from gathering_attention import build_context_parallel_gpt
from importance_by_hand import PAIRS, importance_by_hand
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.utils import get_batch_on_this_cp_rank
from torch import Tensor, nn
from torch.testing import assert_close

from minitron_nemo.importance import Importance, ImportanceConfig, ImportanceEstimator
from minitron_nemo.parallel import Groups
from minitron_nemo.shape import ModelShape
from support.megatron import TINY, build_gpt, causal_mask, run_gpt
from support.ranks import Ranks

NUM_SAMPLES, TOKENS = 6, 12
SHAPE = dataclasses.replace(TINY, num_layers=2)
AXES = ("hidden", "ffn", "head", "group")


def make_samples(padded: bool = True) -> tuple[Tensor, Tensor]:
    """tokens [6, 12] and their mask; where padded, every sample ends elsewhere and one has a hole."""
    tokens = torch.randint(SHAPE.padded_vocab_size, (NUM_SAMPLES, TOKENS), generator=torch.Generator().manual_seed(5))
    mask = torch.ones(NUM_SAMPLES, TOKENS)
    if padded:
        for sample, length in enumerate((12, 7, 10, 3, 12, 9)):
            mask[sample, length:] = 0
        mask[4, 2:5] = 0
    return tokens, mask


def estimate(
    tokens: Tensor, mask: Tensor, *, micro_batch: int = 1, shape: ModelShape = SHAPE, head_norm: str = "before"
) -> Importance:
    """Importance on the current layout; dp ranks take every dp-th sample, cp ranks their part of each."""
    groups = Groups.from_megatron()
    context_parallel = parallel_state.get_context_parallel_world_size() > 1
    model = build_context_parallel_gpt(shape) if context_parallel else build_gpt(shape)
    first, step = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    batch = get_batch_on_this_cp_rank({"tokens": tokens[first::step], "mask": mask[first::step]})
    with ImportanceEstimator(model, shape, groups, ImportanceConfig(head_norm=head_norm)) as estimator, torch.no_grad():
        for start in range(0, len(batch["tokens"]), micro_batch):
            here = slice(start, start + micro_batch)
            estimator.sample(batch["mask"][here])
            run_gpt(model, batch["tokens"][here])
        return estimator.finish()


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


@pytest.mark.parametrize("layout", ["tp2", "tp2-sp", "pp2", "dp2", "cp2"])
def test_importance_is_the_same_on_every_layout(
    ranks: Ranks, by_hand: dict[tuple[str, str, str], Tensor], layout: str
) -> None:
    everyone = ranks(layout).run(estimate, *make_samples(), micro_batch=3)
    for rank, importance in enumerate(everyone):
        assert_same_scores(importance, by_hand, f"rank {rank} of {layout}")
        assert importance.num_samples == NUM_SAMPLES
        for axis in AXES:  # bitwise: ranks that rank differently would prune differently
            for batch, sequence in PAIRS:
                ours, first = importance.scores(axis, batch, sequence), everyone[0].scores(axis, batch, sequence)
                assert torch.equal(ours, first), f"rank {rank} of {layout} differs from rank 0 in {axis}"


def test_all_nine_aggregations_equal_loops_over_all_activations(by_hand: dict[tuple[str, str, str], Tensor]) -> None:
    assert len(PAIRS) == 9
    assert_same_scores(estimate(*make_samples()), by_hand, "one process")


def test_head_norm_after_aggregation_equals_loops_over_all_activations(ranks: Ranks) -> None:
    expected = importance_by_hand(build_gpt(SHAPE), SHAPE, *make_samples(), head_norm="after")
    assert_same_scores(estimate(*make_samples(), head_norm="after"), expected, "one process")
    for rank, importance in enumerate(ranks("tp2").run(estimate, *make_samples(), head_norm="after")):
        assert_same_scores(importance, expected, f"rank {rank} of tp2")


@pytest.mark.parametrize(
    "changes", [{"normalization": "LayerNorm1p", "gated_linear_unit": False}, {"add_bias_linear": True}]
)
def test_importance_of_other_architectures_equals_loops_over_all_activations(changes: dict[str, Any]) -> None:
    shape = dataclasses.replace(SHAPE, **changes)
    expected = importance_by_hand(build_gpt(shape), shape, *make_samples())
    assert_same_scores(estimate(*make_samples(), shape=shape), expected, str(changes))


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


def fuse_norms(model: nn.Module) -> nn.Module:
    """The same model with its norms inside the linears that follow, under transformer-engine's names."""
    for layer in model.decoder.layers:
        for name, linear in (
            ("input_layernorm", layer.self_attention.linear_qkv),
            ("pre_mlp_layernorm", layer.mlp.linear_fc1),
        ):
            norm, plain_forward = getattr(layer, name), linear.forward
            linear.register_parameter("layer_norm_weight", norm.weight)
            if norm.bias is not None:
                linear.register_parameter("layer_norm_bias", norm.bias)
            linear.forward = lambda x, norm=norm, forward=plain_forward: forward(norm(x))
            setattr(layer, name, IdentityOp())
    return model


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


def test_importance_round_trips_through_files(tmp_path: Any) -> None:
    importance = estimate(*make_samples())
    importance.save(tmp_path / "importance")
    again = Importance.load(tmp_path / "importance")
    assert_same_scores(again, importance, "read again", rtol=0)
    assert (again.shape, again.num_samples, again.origin) == (SHAPE, NUM_SAMPLES, importance.origin)
    assert again.origin["head_norm"] == "before"


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


def test_activations_that_are_not_finite_are_an_error_that_names_the_layer() -> None:
    tokens, mask = make_samples()
    model = build_gpt(SHAPE)
    with torch.no_grad():
        model.decoder.layers[1].mlp.linear_fc1.weight[3] = float("inf")
        with ImportanceEstimator(model, SHAPE, Groups()) as estimator:
            estimator.sample(mask)
            run_gpt(model, tokens)
            with pytest.raises(ValueError, match=r"axis ffn in decoder.layers.1 are not finite"):
                estimator.finish()


def test_unknown_aggregation_error_names_the_near_one() -> None:
    importance = estimate(*make_samples())
    with pytest.raises(ValueError, match=r"sequence_aggregation=means is not an aggregation; did you mean mean\?"):
        importance.scores("ffn", sequence="means")
    with pytest.raises(ValueError, match=r"importance.head_norm=befor is not known; did you mean before\?"):
        ImportanceConfig(head_norm="befor")
    with pytest.raises(ValueError, match=r"importance.num_samples=0 must be at least 1; try 1024"):
        ImportanceConfig(num_samples=0)

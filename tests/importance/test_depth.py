"""Depth importance of a real Megatron model, against models built without the layers and run whole."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.utils import get_batch_on_this_cp_rank
from torch import Tensor
from torch.testing import assert_close

from minitron_nemo.config.importance import LOGIT_METRICS, DepthConfig, GreedyConfig
from minitron_nemo.importance.block_influence import BlockInfluence
from minitron_nemo.importance.depth import DepthEstimator, DepthScores
from minitron_nemo.importance.removal import LayerSwitches, Sweep
from minitron_nemo.parallel import Groups
from support.depth_by_hand import block_influence_by_hand, costs_by_hand, whole_logits, without_layers
from support.gathering_attention import build_context_parallel_gpt
from support.megatron import TINY, build_gpt, causal_mask
from support.ranks import Ranks

SHAPE = dataclasses.replace(TINY, init_method_std=0.1)  # 4 layers
NUM_SAMPLES, TOKENS, VOCAB_SIZE = 4, 8, 61  # 61 of 66: the padding lies on the last tensor-parallel rank
SIZES = [1, 2, 3]
METRICS = ["block_influence", *LOGIT_METRICS]

RTOL = 1e-5
FLOORS = {
    "block_influence": 1e-7,
    # Float32 logits are right to 1e-6: a token's loss to about as much, and a difference of means keeps that error
    # however small it is. KL and squared error are quadratic in the logits' difference: their errors are smaller.
    "loss": 2e-6,
    "kl": 1e-7,
    "squared_error": 1e-7,
}


def make_samples() -> dict[str, Tensor]:
    """Samples of different length, one with a hole; [4, 8]."""
    generator = torch.Generator().manual_seed(3)
    text = torch.randint(VOCAB_SIZE, (NUM_SAMPLES, TOKENS + 1), generator=generator)
    mask = torch.ones(NUM_SAMPLES, TOKENS)
    for sample, length in enumerate((8, 5, 7, 2)):
        mask[sample, length:] = 0
    mask[2, 1:3] = 0
    return {
        "tokens": text[:, :-1].contiguous(),
        "labels": text[:, 1:].contiguous(),
        "loss_mask": mask,
        "position_ids": torch.arange(TOKENS).repeat(NUM_SAMPLES, 1),
    }


def forward(model: GPTModel, batch: dict[str, Tensor]) -> Tensor:
    return model(batch["tokens"], batch["position_ids"], causal_mask(batch["tokens"].shape[1]))


def estimate(
    samples: dict[str, Tensor],
    *,
    micro_batch: int = 1,
    metrics: list[str] = METRICS,
    dropped: tuple[int, ...] = (),
    model: GPTModel | None = None,
) -> tuple[DepthScores, int]:
    """Scores on the current layout, and how often this rank ran a layer; dp ranks take every dp-th sample."""
    if model is None:
        context_parallel = parallel_state.model_parallel_is_initialized() and (
            parallel_state.get_context_parallel_world_size() > 1
        )
        model = build_context_parallel_gpt(SHAPE) if context_parallel else build_gpt(SHAPE)
    first, step = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    share = get_batch_on_this_cp_rank({name: tensor[first::step] for name, tensor in samples.items()})
    ran = []
    for layer in model.decoder.layers:
        layer.self_attention.register_forward_pre_hook(lambda *_: ran.append(1))
    estimator = DepthEstimator(
        model,
        SHAPE,
        Groups.from_megatron(),
        DepthConfig(metrics=metrics, block_sizes=SIZES),
        forward,
        vocab_size=VOCAB_SIZE,
        dropped=dropped,
    )
    with estimator:
        for start in range(0, len(share["tokens"]), micro_batch):
            estimator.add({name: tensor[start : start + micro_batch] for name, tensor in share.items()})
        return estimator.finish(), len(ran)


def assert_same_scores(actual: DepthScores, expected: DepthScores, message: str) -> None:
    for metric, by_size in expected.items():
        assert actual[metric].keys() == by_size.keys()
        for size, values in by_size.items():
            assert_close(
                actual[metric][size],
                values.float(),
                rtol=RTOL,
                atol=FLOORS[metric],
                msg=lambda text, what=f"{message}: {metric} of blocks of {size}": f"{what}\n{text}",
            )


def scores_by_hand(samples: dict[str, Tensor], dropped: tuple[int, ...] = ()) -> DepthScores:
    tokens, labels, mask = samples["tokens"], samples["labels"], samples["loss_mask"]
    full = whole_logits(build_gpt(SHAPE), tokens)
    scores: dict[str, dict[int, Tensor]] = {metric: {} for metric in LOGIT_METRICS}
    for size in SIZES:
        costs = []
        for start in range(SHAPE.num_layers - size + 1):
            gone = {*dropped, *range(start, start + size)}
            removed = whole_logits(without_layers(SHAPE, gone), tokens)
            costs.append(costs_by_hand(full, removed, labels, mask, VOCAB_SIZE))
        for metric in LOGIT_METRICS:
            scores[metric][size] = torch.tensor([cost[metric] for cost in costs])
    if not dropped:
        scores["block_influence"] = block_influence_by_hand(build_gpt(SHAPE), tokens, mask)
    return scores


@pytest.fixture(scope="module")
def by_hand() -> DepthScores:
    return scores_by_hand(make_samples())


def test_every_metric_equals_models_built_without_the_layers(by_hand: DepthScores) -> None:
    scores, _ = estimate(make_samples())
    assert list(scores["block_influence"]) == [1, 2, 3]
    assert_same_scores(scores, by_hand, "one process")
    assert min(float(values.min()) for values in by_hand["kl"].values()) > 1e-3  # the floors hide nothing


@pytest.mark.parametrize("layout", ["tp2", "tp2-sp", "pp2", "dp2", "cp2", "tp2-pp2"])
def test_depth_scores_are_the_same_on_every_layout(ranks: Ranks, by_hand: DepthScores, layout: str) -> None:
    everyone = ranks(layout).run(estimate, make_samples(), micro_batch=2)
    for rank, (scores, _) in enumerate(everyone):
        assert_same_scores(scores, by_hand, f"rank {rank} of {layout}")
        for metric, by_size in scores.items():  # bitwise: ranks that rank differently would prune differently
            for size, values in by_size.items():
                assert torch.equal(values, everyone[0][0][metric][size]), f"rank {rank} differs from 0 in {metric}"


def test_block_influence_over_four_pipeline_stages_equals_one_process(ranks: Ranks, by_hand: DepthScores) -> None:
    for scores, ran in ranks("pp4").run(estimate, make_samples(), micro_batch=4, metrics=["block_influence"]):
        assert_same_scores(scores, {"block_influence": by_hand["block_influence"]}, "pp4")
        assert ran == 1  # the stage's layer, in the only pass


def test_micro_batch_size_and_order_of_samples_do_not_change_scores(by_hand: DepthScores) -> None:
    samples = make_samples()
    shuffled = {name: tensor[[2, 0, 3, 1]] for name, tensor in samples.items()}
    for micro_batch in (2, 4):
        assert_same_scores(estimate(shuffled, micro_batch=micro_batch)[0], by_hand, f"micro-batch of {micro_batch}")


def test_layers_already_dropped_stay_out_of_every_pass() -> None:
    samples = make_samples()
    for dropped in ((1,), (0, 3)):
        scores, _ = estimate(samples, dropped=dropped)
        assert_same_scores(scores, scores_by_hand(samples, dropped), f"without {dropped}")


def test_a_sweep_runs_only_the_layers_after_each_block(ranks: Ranks) -> None:
    samples, layers = make_samples(), SHAPE.num_layers
    sizes_ran = sum(layers - start - size for size in SIZES for start in range(layers - size + 1))
    assert sum(layers - start - 1 for start in range(layers)) == layers * (layers - 1) // 2
    _, ran = estimate(samples, micro_batch=4)
    assert ran == layers + sizes_ran
    _, ran = estimate(samples, micro_batch=4, metrics=["block_influence"])
    assert ran == layers
    stages = ranks("pp2").run(estimate, samples, micro_batch=4)
    assert sum(ran for _, ran in stages) == layers + sizes_ran


@pytest.mark.parametrize("training", [False, True])
def test_the_model_is_as_before_after_a_sweep(training: bool) -> None:
    samples, model = make_samples(), build_gpt(SHAPE).train(training)
    before = whole_logits(model, samples["tokens"])
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items() if tensor is not None}
    estimate(samples, model=model)
    assert torch.equal(whole_logits(model, samples["tokens"]), before)
    for name, tensor in weights.items():
        assert torch.equal(model.state_dict()[name], tensor), name
    assert all(module.training == training for module in model.modules())
    assert not any("forward" in layer.__dict__ for layer in model.decoder.layers)


def test_an_error_within_a_sweep_leaves_the_model_as_before() -> None:
    samples, model = make_samples(), build_gpt(SHAPE)
    before = whole_logits(model, samples["tokens"])
    sweep = Sweep(SHAPE.num_layers, [1])

    def fail_in_the_third_pass(number: int, _logits: Tensor) -> None:
        if number == 2:
            raise RuntimeError("stop here")

    with pytest.raises(RuntimeError, match="stop here"), LayerSwitches(model) as layers:
        layers.run(sweep.passes, samples, forward, fail_in_the_third_pass)
    assert torch.equal(whole_logits(model, samples["tokens"]), before)


def estimate_broken(samples: dict[str, Tensor]) -> str:
    """The message of a model whose layer 2 overflows for one token, which only sample 1 holds."""
    model = build_gpt(SHAPE)
    for layer in model.decoder.layers:
        if layer.layer_number == 3:
            layer.register_forward_hook(
                lambda _module, _args, output: (output[0].index_fill(1, torch.tensor([1]), float("nan")), output[1])
            )
    with pytest.raises(ValueError) as failure:
        estimate(samples, micro_batch=2, model=model)
    return str(failure.value)


def test_activations_that_are_not_finite_stop_every_rank_and_name_layer_and_sample(ranks: Ranks) -> None:
    for message in [estimate_broken(make_samples()), *ranks("pp2").run(estimate_broken, make_samples())]:
        assert "The output of decoder.layers.2 is not finite (NaN or infinity) in calibration sample 1;" in message


def test_states_of_tokens_that_do_not_count_leave_no_trace() -> None:
    """x_1 = 2 x_0 at the token that counts, infinite at the other."""
    x = torch.tensor([[[1.0, 2.0]], [[3.0, 4.0]]])  # [s=2, b=1, h=2]
    y = torch.tensor([[[2.0, 4.0]], [[float("inf"), float("nan")]]])
    influence = BlockInfluence(2, Groups(), sequence_parallel=False, device=x.device)
    influence.add({0: x, 1: y, 2: x.flip(-1)}, torch.tensor([[True], [False]]))
    assert_close(influence.finish()[1], torch.tensor([0.0, 1 - 0.8], dtype=torch.float64))


def test_no_token_that_counts_is_an_error() -> None:
    samples = make_samples()
    samples["loss_mask"].zero_()
    with pytest.raises(ValueError, match="no token counted"):
        estimate(samples, metrics=["block_influence"])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"metrics": ["block_influense"]}, r"which is not known; did you mean block_influence\?"),
        ({"block_sizes": [0]}, r"depth.block_sizes\[0\]=0 must be at least 1"),
        ({"block_sizes": []}, r"depth.block_sizes=\[\] must be different sizes"),
        ({"greedy": {"metric": "loss?"}}, r"depth.greedy.metric=loss\? is not known; did you mean loss"),
        ({"greedy": {"drop": 0}}, "depth.greedy.drop=0 must be at least 1"),
        ({"greedy": {"keep_last": -1}}, "depth.greedy.keep_last=-1 must be at least 0"),
        ({"greedy": {"metric": "accuracy"}}, "accuracy is asked for .*, but depth.task is not set"),
        ({"num_samples": 0}, "depth.num_samples=0 must be at least 1; try 256"),
        ({"metrics": ["accuracy"]}, "accuracy is asked for .*, but depth.task is not set"),
        ({"task": "questions.jsonl"}, "depth.task=questions.jsonl is read for the accuracy only"),
    ],
)
def test_a_config_that_cannot_work_says_what_to_change(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DepthConfig(**values | ({"greedy": GreedyConfig(**values["greedy"])} if "greedy" in values else {}))


def test_a_block_that_leaves_no_layer_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"depth.block_sizes holds 4, but a block of a model of 4 layers has 1 to 3"):
        Sweep(4, [1, 4])
    with pytest.raises(ValueError, match=r"dropped layers \[4\] do not exist; this model's layers are 0 to 3"):
        Sweep(4, [1], dropped=[4])

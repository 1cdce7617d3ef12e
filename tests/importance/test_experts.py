"""Importance of experts and their neurons, against every token's way through its experts written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from importance_by_hand import PAIRS
from torch import Tensor

from minitron_nemo.activations.tokens import AnnouncedBatch, mark_tokens_over
from minitron_nemo.config.importance import ImportanceConfig
from minitron_nemo.importance import ImportanceEstimator
from minitron_nemo.importance.experts import expert_moments, watch_experts
from minitron_nemo.parallel import Groups, group_rank, group_size
from minitron_nemo.scores import Importance, moments_of_sequence
from support.megatron import TINY_EXPERTS, build_gpt, random_parameter, run_gpt, smaller
from support.ranks import Ranks

SHAPE = smaller(TINY_EXPERTS, moe_router_pre_softmax=True)
GENERATOR = torch.Generator().manual_seed(7)
BATCHES = [torch.randint(0, 66, (2, 8), generator=GENERATOR) for _ in range(4)]
MASKS = [(torch.rand(2, 8, generator=GENERATOR) > 0.3).float() for _ in range(4)]
MASKS[2][1] = 0  # a sample of which nothing counts


def estimate(
    batches: list[Tensor], masks: list[Tensor], metric: str = "activations", **overrides: Any
) -> dict[str, Tensor]:
    """Moments of this rank's share of the batches, merged over all ranks."""
    model, groups = build_gpt(SHAPE, **overrides), Groups.from_megatron()
    current, handles = AnnouncedBatch(call="Call announce", give="Announce"), []
    watches = watch_experts(model, SHAPE, groups, current, handles, ImportanceConfig(metric=metric))
    mine = slice(group_rank(groups.dp), None, group_size(groups.dp))
    with torch.no_grad():
        for tokens, mask in zip(batches[mine], masks[mine], strict=True):
            current.announce(mark_tokens_over(mask, groups=[groups.cp]))
            run_gpt(model, tokens)
    for handle in handles:
        handle.remove()
    sums = expert_moments(watches, SHAPE, groups, torch.device("cpu"))
    return {axis: moments_of_sequence(tensor) for axis, tensor in sums.items()}


def by_hand(batches: list[Tensor], masks: list[Tensor], metric: str = "activations") -> dict[str, Tensor]:
    """[l, 2, 3, e] and [l, e, 2, 3, f] in float64: every token that counts, through each of its experts, one by one."""
    model, entering = build_gpt(SHAPE), {layer: [] for layer in range(SHAPE.num_layers)}
    for layer, module in enumerate(model.decoder.layers):
        module.mlp.register_forward_pre_hook(lambda _, args, layer=layer: entering[layer].append(args[0]))
    with torch.no_grad():
        for tokens in batches:
            run_gpt(model, tokens)
    experts, neurons = SHAPE.num_moe_experts or 0, SHAPE.moe_ffn_hidden_size or 0
    outputs = torch.zeros(SHAPE.num_layers, experts, 3, dtype=torch.float64)
    inside = torch.zeros(SHAPE.num_layers, experts, 3, neurons, dtype=torch.float64)
    for layer in (0, 2):
        prefix = f"decoder.layers.{layer}.mlp."
        router = random_parameter(prefix + "router.weight", SHAPE).double()
        norms: dict[int, list[Tensor]] = {expert: [] for expert in range(experts)}
        acts: dict[int, list[Tensor]] = {expert: [] for expert in range(experts)}
        for hidden, mask in zip(entering[layer], masks, strict=True):
            for position, sample in (mask.t() != 0).nonzero().tolist():
                token = hidden[position, sample].double()
                weights, chosen = (router @ token).softmax(0).topk(2)
                for weight, expert in zip(weights, chosen.tolist(), strict=True):
                    name = prefix + f"experts.local_experts.{expert}.linear_fc"
                    gate, up = (random_parameter(name + "1.weight", SHAPE).double() @ token).chunk(2)
                    act = F.silu(gate) * up * weight
                    down = random_parameter(name + "2.weight", SHAPE).double()  # [h, f]
                    written = (down * act).norm(dim=0)  # of what each neuron alone adds to the stream
                    acts[expert].append(act if metric == "activations" else written * act.sign())
                    norms[expert].append((down @ act).norm())
        for expert in range(experts):
            norm, act = torch.stack(norms[expert]), torch.stack(acts[expert])
            outputs[layer, expert] = torch.stack([norm.mean(), norm.norm(), norm.var(correction=0)])
            inside[layer, expert] = torch.stack([act.abs().mean(0), act.norm(dim=0), act.var(0, correction=0)])
    outputs = outputs.transpose(1, 2)
    return {
        "expert": torch.stack([outputs, outputs.square()], 1),
        "expert_ffn": torch.stack([inside, inside.square()], 2),
    }


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], where: str) -> None:
    for axis, tensor in expected.items():
        torch.testing.assert_close(found[axis], tensor, rtol=1e-5, atol=1e-9, msg=f"{axis}, {where}")


def test_experts_are_scored_by_what_they_add_to_the_tokens_routed_to_them() -> None:
    expected = by_hand(BATCHES, MASKS)
    assert expected["expert"][0, 0, 0].min() > 0  # each expert has tokens
    assert_same(estimate(BATCHES, MASKS), expected, "one by one")
    assert_same(estimate(BATCHES, MASKS, moe_token_dispatcher_type="alltoall"), expected, "all to all")


@pytest.mark.parametrize("layout", ["dp2-ep2", "dp2", "tp2-sp", "tp2", "tp2-sp-ep2-etp1", "pp2", "tp2-sp-dp2-ep2"])
def test_experts_score_the_same_on_every_layout(ranks: Ranks, layout: str) -> None:
    expected = by_hand(BATCHES, MASKS)
    for rank, found in enumerate(ranks(layout).run(estimate, BATCHES, MASKS)):
        assert_same(found, expected, f"rank {rank} of {layout}")


def test_contributions_of_an_experts_neurons_are_what_they_write_to_the_stream(ranks: Ranks) -> None:
    expected = by_hand(BATCHES, MASKS, "contributions")
    for layout in ("single", "tp2", "dp2-ep2"):
        for rank, found in enumerate(ranks(layout).run(estimate, BATCHES, MASKS, "contributions")):
            assert_same(found, expected, f"rank {rank} of {layout}")


def test_masked_tokens_contribute_nothing_and_the_micro_batch_size_changes_nothing() -> None:
    rows, masks = torch.cat(BATCHES), torch.cat(MASKS)
    assert_same(estimate(list(rows.split(1)), list(masks.split(1))), by_hand(BATCHES, MASKS), "one sample at a time")
    nothing = estimate(BATCHES, [torch.zeros(2, 8)] * 4)
    assert all(tensor.abs().max() == 0 for tensor in nothing.values())


def importance_of(batches: list[Tensor], masks: list[Tensor], model: Any = None) -> Importance:
    model = build_gpt(SHAPE) if model is None else model
    with ImportanceEstimator(model, SHAPE, Groups.from_megatron()) as estimator, torch.no_grad():
        for tokens, mask in zip(batches, masks, strict=True):
            estimator.sample(mask)
            run_gpt(model, tokens)
        return estimator.finish()


def test_merged_runs_weigh_an_expert_by_the_tokens_routed_to_it_in_each() -> None:
    parts = [importance_of(BATCHES[here], MASKS[here]) for here in (slice(1), slice(1, None))]
    tokens = [part.moments["expert"][0, 0] for part in parts]
    shares = tokens[0] / (tokens[0] + tokens[1])
    assert shares.max() - shares.min() > 0.05  # no number of samples would weigh all experts right
    merged, whole = Importance.merge(parts), importance_of(BATCHES, MASKS)
    for axis in ("expert", "expert_ffn", "shared_expert_ffn"):
        for batch, sequence in PAIRS:
            found, expected = (run.scores(axis, batch, sequence) for run in (merged, whole))
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9, msg=f"{axis} {batch} {sequence}")


def test_the_layer_and_the_expert_whose_activations_are_not_finite_are_named() -> None:
    model = build_gpt(SHAPE)
    model.decoder.layers[0].mlp.experts.local_experts[3].linear_fc1.weight.data[5] = float("nan")
    message = r"axis expert_ffn in decoder.layers.0 are not finite \(NaN or infinity\) in expert 3; scores from them"
    with pytest.raises(ValueError, match=message):
        importance_of(BATCHES, MASKS, model)
    model = build_gpt(SHAPE)
    model.decoder.layers[2].mlp.experts.local_experts[1].linear_fc2.weight.data[5] = float("inf")
    with pytest.raises(ValueError, match=r"axis expert in decoder.layers.2 are not finite .* in expert 1;"):
        importance_of(BATCHES, MASKS, model)

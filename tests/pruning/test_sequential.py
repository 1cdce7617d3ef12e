"""Sequential refit against float64 lstsq on every activation of a teacher and of a student of its own shape."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from test_compensation import MASK, TOKENS, Weights, assert_same_choice, calibration, full_weights
from torch import Tensor

from minitron_nemo import run_record
from minitron_nemo.axes import norm_number, norm_of
from minitron_nemo.axis_expressions import norm_gamma
from minitron_nemo.config.pruning import SequentialConfig
from minitron_nemo.least_squares.held_out import RIDGES, Sums, best_ridge
from minitron_nemo.parallel import Groups
from minitron_nemo.plan import PruningPlan
from minitron_nemo.pruning import plan_from_importance, prune_into
from minitron_nemo.pruning.composition import split
from minitron_nemo.pruning.sequential import SequentialRefit, refit_sequentially
from minitron_nemo.run_record import recording
from minitron_nemo.shape import ModelShape
from support.gathering_attention import build_context_parallel_gpt
from support.megatron import TINY, TINY_EXPERTS, build_gpt, fuse_norms, run_gpt, smaller
from support.plans import random_plan, random_scores, turned
from support.ranks import Ranks

SHAPE = smaller(TINY, num_layers=3, layernorm_epsilon=1e-9)  # epsilon weighs otherwise in a narrower norm
TIED = smaller(SHAPE, share_embeddings_and_output_weights=True)
WIDTH = {"hidden_size": 14, "ffn_hidden_size": 18, "num_attention_heads": 4}
RIDGE = {"reader_ridge": 1e-2, "writer_ridge": 2e-2}

PLANS: dict[str, PruningPlan] = {
    "channels": random_plan(SHAPE, **WIDTH),
    "channels, tied": random_plan(TIED, **WIDTH),
    "hidden alone, tied": random_plan(TIED, hidden_size=14),
    "turned": turned(random_plan(SHAPE, **WIDTH)),
    "turned, parted": turned(random_plan(TIED, **WIDTH)),
    "groups": random_plan(SHAPE, num_attention_heads=2, num_query_groups=1, hidden_size=14),
    "biases, norms of heads": random_plan(smaller(SHAPE, add_bias_linear=True, qk_layernorm=True), **WIDTH),
    "squared ReLU, turned": turned(
        random_plan(
            smaller(SHAPE, normalization="LayerNorm1p", gated_linear_unit=False, activation="squared_relu"), **WIDTH
        )
    ),
    "LayerNorm, biases, turned": turned(
        random_plan(smaller(SHAPE, normalization="LayerNorm", add_bias_linear=True, activation="gelu"), **WIDTH)
    ),
    "neurons alone": random_plan(SHAPE, ffn_hidden_size=18),
}


DEEP = smaller(TIED, num_layers=8)
KEPT = [1, 2, 5, 6]  # dropped: 0, which nothing precedes; 3 and 4, of two pipeline stages; 7


def plan_keeping(kept: list[int], **target: int) -> PruningPlan:
    shape = DEEP.keeping_layers(kept).pruned_to(**target)
    return plan_from_importance(random_scores(DEEP), DEEP, shape, layers=kept)


PLANS["layers"] = plan_keeping(KEPT, ffn_hidden_size=18)
PLANS["layers, channels"] = plan_keeping(KEPT, **WIDTH)
PLANS["layers, channels, some stages empty"] = plan_keeping([1, 2], hidden_size=14)


EXPERTS = smaller(TINY_EXPERTS, num_moe_experts=6, moe_router_pre_softmax=True, layernorm_epsilon=1e-9)
INSIDE = {"ffn_hidden_size": 18, "moe_ffn_hidden_size": 8, "moe_shared_expert_intermediate_size": 6}
WITH_EXPERTS = {
    "experts": random_plan(EXPERTS, hidden_size=14, num_moe_experts=4, **INSIDE),
    "experts, turned": turned(random_plan(EXPERTS, hidden_size=14, num_moe_experts=4)),
    "experts without a shared one": random_plan(
        smaller(EXPERTS, moe_shared_expert_intermediate_size=None), hidden_size=14, moe_ffn_hidden_size=8
    ),
}


def student_of(model: Any, found: SequentialRefit) -> Any:
    """Cut out of a refitted model as the prune stage does it."""
    student = build(found.plan.target, seed=1)
    prune_into(model, student, found.plan, Groups.from_megatron())
    found.finish(student)
    return student


def build(shape: ModelShape, **options: Any) -> Any:
    return (build_context_parallel_gpt if parallel_state.get_context_parallel_world_size() > 1 else build_gpt)(
        shape, **options
    )


def refitted(cut: str, micro_batch: int = 2, **options: Any) -> tuple[Weights, SequentialRefit]:
    """The student's full weights on the current layout, and the outcome."""
    plan = (PLANS | WITH_EXPERTS)[cut]
    model = build(plan.source)
    config = SequentialConfig(**{**RIDGE, "selection": "scores"} | options)
    run = calibration(model, micro_batch=micro_batch)
    found = refit_sequentially(model, plan, Groups.from_megatron(), run, config)
    return full_weights(student_of(model, found), plan.target), dataclasses.replace(found, output=None)


# ---- by hand ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def seen(model: Any) -> dict[str, Tensor]:
    """Every counted token at every place of interest, [t, c] float64 by the name of the place."""
    found: dict[str, list[Tensor]] = {}
    places = {"decoder.final_layernorm": model.decoder.final_layernorm}
    for index, layer in enumerate(model.decoder.layers):
        for name in ("input_layernorm", "self_attention.linear_proj", "pre_mlp_layernorm", "mlp.linear_fc2"):
            places[f"decoder.layers.{index}.{name}"] = layer.get_submodule(name)
    handles = [
        module.register_forward_pre_hook(lambda _, args, name=name: found.setdefault(name, []).append(args[0]))
        for name, module in places.items()
    ]
    run_gpt(model, TOKENS)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts)[MASK.t() != 0].double() for name, parts in found.items()}


def ridge_toward(start: Tensor, inputs: Tensor, wanted: Tensor, shift: float) -> Tensor:
    """argmin over W [o, i] of sum |wanted - W input|^2 + shift |W - start|^2."""
    pull = shift**0.5
    left = torch.cat([inputs, pull * torch.eye(inputs.shape[1], dtype=torch.float64)])
    return torch.linalg.lstsq(left, torch.cat([wanted, pull * start.t()])).solution.t()


def normed(stream: Tensor, kind: str = "RMSNorm") -> Tensor:
    if kind != "RMSNorm":
        stream = stream - stream.mean(1, keepdim=True)
    return stream / (stream.square().mean(1, keepdim=True) + SHAPE.layernorm_epsilon).sqrt()


def projection(plan: PruningPlan) -> Tensor:
    """P [h, k]."""
    return plan.hidden.double() if plan.has_basis else torch.eye(plan.source.hidden_size).double()[:, plan.hidden]


class ByHand:
    """A student that keeps heads and neurons, whose dropped ones' columns become 0; its layers are the kept ones."""

    def __init__(self, plan: PruningPlan) -> None:
        self.plan, (self.narrowing, self.blocks) = plan, split(dataclasses.replace(plan, norm_scale=None))
        self.teacher, self.student = build_gpt(plan.source), build_gpt(self.narrowing.target, seed=1)
        prune_into(self.teacher, self.student, self.narrowing, Groups())
        self.theirs = seen(self.teacher)
        self.parameters = dict(self.student.named_parameters())
        self.weights = full_weights(self.teacher, plan.source)
        self.p, self.scale = projection(plan), (plan.source.hidden_size / plan.target.hidden_size) ** 0.5
        for name, parameter in self.parameters.items():
            if norm_number(name, plan.source) is not None:
                parameter.data.fill_(self.scale - float(plan.source.normalization == "LayerNorm1p"))

    @torch.no_grad()
    def run(self) -> Weights:
        for layer, source in enumerate(self.plan.layer.tolist()):
            self.read(layer, source, "input_layernorm")
            self.write(layer, source, "self_attention.linear_proj", "input_layernorm", "pre_mlp_layernorm")
            self.read(layer, source, "pre_mlp_layernorm")
            self.write(layer, source, "mlp.linear_fc2", "pre_mlp_layernorm", None)
        self.read_at_the_end()
        cut = build_gpt(self.plan.target, seed=1)
        prune_into(self.student, cut, self.blocks, Groups())
        return full_weights(cut, self.plan.target)

    def map_at(self, mine: str, theirs: str) -> Tensor:
        kind = self.plan.source.normalization
        gamma = norm_gamma(self.weights[f"{theirs}.weight"].double(), self.plan.source)
        inputs = self.scale * normed(seen(self.student)[mine], kind)
        wanted = gamma * normed(self.theirs[theirs], kind)
        shift = RIDGE["reader_ridge"] * float(inputs.square().sum(0).mean())
        return ridge_toward(gamma.unsqueeze(1) * self.p, inputs, wanted, shift)

    def read(self, layer: int, source: int, norm: str) -> None:
        mine, theirs = (f"decoder.layers.{index}.{norm}" for index in (layer, source))
        change = self.map_at(mine, theirs)
        left = self.set_bias(mine, theirs, change)
        for name in self.weights:
            if norm_of(name) == f"{theirs}.weight" and name.endswith("weight"):
                local = name.replace(f"layers.{source}.", f"layers.{layer}.")
                self.parameters[local].data.copy_(self.weights[name].double() @ change)
                bias = self.parameters.get(local.replace("weight", "bias"))
                if bias is not None:
                    bias.data += (self.weights[name].double() @ left).float()

    def set_bias(self, mine: str, theirs: str, change: Tensor) -> Tensor:
        """Of a norm; what does not come through `change` is returned, [h]."""
        if f"{theirs}.bias" not in self.weights:
            return torch.zeros(self.plan.source.hidden_size).double()
        bias = self.weights[f"{theirs}.bias"].double()
        said = torch.linalg.pinv(change) @ bias
        self.parameters[f"{mine}.bias"].data.copy_(said)
        return bias - change @ said

    def read_at_the_end(self) -> None:
        final = "decoder.final_layernorm"
        if not self.plan.target.share_embeddings_and_output_weights:
            output = self.weights.get("output_layer.weight", self.weights["embedding.word_embeddings.weight"])
            change = self.map_at(final, final)
            self.set_bias(final, final, change)
            self.parameters["output_layer.weight"].data.copy_(output.double() @ change)
            return
        output, gamma = (
            self.weights["embedding.word_embeddings.weight"].double(),
            self.weights[f"{final}.weight"].double(),
        )
        inputs, start = self.scale * normed(seen(self.student)[final]), gamma @ self.p
        wanted = (gamma * normed(self.theirs[final])) @ output.t()
        features = torch.einsum("vk,tk->tvk", output @ self.p, inputs).flatten(0, 1)  # every logit is linear in gamma
        shift = RIDGE["reader_ridge"] * float(features.square().sum(0).mean())
        new = ridge_toward(start.unsqueeze(0), features, wanted.flatten().unsqueeze(1), shift)
        self.parameters[f"{final}.weight"].data.copy_(self.scale * new.squeeze(0))

    def write(self, layer: int, source: int, name: str, before: str, behind: str | None) -> None:
        mine, theirs = (f"decoder.layers.{index}." for index in (layer, source))
        here, inputs = seen(self.student), seen(self.student)[mine + name]
        if behind is None:  # the next kept layer's stream, whatever is dropped between
            kept = [*self.plan.layer.tolist(), self.plan.source.num_layers]
            following = kept[layer + 1]
            place = f"decoder.layers.{following}.input_layernorm"
            after = self.theirs.get(place, self.theirs["decoder.final_layernorm"])
        else:
            after = self.theirs[theirs + behind]
        wanted = after @ self.p - here[mine + before]
        if mine + name + ".bias" in self.parameters:
            wanted = wanted - self.parameters[mine + name + ".bias"].double()
        per_token = (after.square().mean(1, keepdim=True) + SHAPE.layernorm_epsilon).rsqrt()
        inputs, wanted = inputs * per_token, wanted * per_token
        start = self.p.t() @ self.weights[theirs + name + ".weight"].double()
        shift = RIDGE["writer_ridge"] * float(inputs.square().sum(0).mean())
        columns = self.columns(source, name)
        new = torch.zeros_like(start)
        new[:, columns] = ridge_toward(start[:, columns], inputs[:, columns], wanted, shift)
        self.parameters[mine + name + ".weight"].data.copy_(new)

    def columns(self, source: int, name: str) -> list[int]:
        if "linear_proj" not in name:
            return self.plan.ffn[source].tolist()
        channels = self.plan.source.kv_channels
        return [head * channels + c for head in self.plan.head[source].tolist() for c in range(channels)]


@functools.cache
def by_hand(cut: str) -> Weights:
    return ByHand(PLANS[cut]).run()


def folded(weights: Weights) -> Weights:
    """The same function with every gamma in what reads it; where nothing was missing at a norm, it was left alone."""
    return {
        name: full * weights[norm]
        if (norm := norm_of(name))
        else torch.ones_like(full)
        if "layernorm" in name
        else full
        for name, full in weights.items()
    }


def assert_near(found: Weights, expected: Weights, tolerance: float, where: str = "") -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name] - tensor).norm() <= tolerance * tensor.norm(), f"{name} {where}"


# ---- claims ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", PLANS)
def test_every_reader_and_writer_is_least_squares_on_what_the_student_says(cut: str) -> None:
    found, outcome = refitted(cut)
    expected = by_hand(cut)
    if cut == "neurons alone":
        found, expected = folded(found), folded(expected)
    assert_near(found, expected, 1e-4)  # float32 activations of another order of sums, through three layers
    assert len(outcome.places) == 4 * PLANS[cut].target.num_layers + 1
    assert all(place.error <= place.plain_error + 1e-9 for place in outcome.places)


@pytest.mark.parametrize("shape", [SHAPE, TIED])
def test_where_nothing_is_dropped_no_bit_changes(shape: ModelShape) -> None:
    plan = random_plan(shape, hidden_size=shape.hidden_size)
    model, expected = build_gpt(shape), full_weights(build_gpt(shape), shape)
    found = refit_sequentially(model, plan, Groups.from_megatron(), calibration(model))
    for name, full in full_weights(student_of(model, found), shape).items():
        assert torch.equal(full, expected[name]), name


def record_of_a_refit(output: Path) -> tuple[list[str], tuple[str, int | None, int | None] | None]:
    """What was counted, in order, and what the record says in the end, of rank 0."""
    counted: list[str] = []
    with recording("prune", output, of_chain=False), pytest.MonkeyPatch.context() as patch:
        gets_on = run_record.gets_on

        def listen(label: str, done: int, *rest: Any) -> None:
            counted.append(f"{label} {done}")
            gets_on(label, done, *rest)

        patch.setattr(run_record, "gets_on", listen)
        refitted("layers, channels")
        (pen,) = run_record._pen or [None]
        return counted, pen and (pen.record.label, pen.record.done, pen.record.total)


@pytest.mark.parametrize("layout", ["single", "pp2"])
def test_a_refit_says_how_many_layers_are_done(ranks: Ranks, layout: str, tmp_path: Path) -> None:
    (counted, record), *_ = ranks(layout).run(record_of_a_refit, tmp_path / "student")
    layers = [f"refitting layers {done}" for done in range(1, len(KEPT) + 1)]
    assert counted == (layers if layout == "single" else [*layers[:2], layers[-1]])  # a stage's layers at once
    assert record == ("refitting layers", len(KEPT), len(KEPT))


@torch.no_grad()
def test_a_stream_that_is_only_turned_says_the_same_to_float64() -> None:
    plan = turned(random_plan(SHAPE, hidden_size=SHAPE.hidden_size))
    model, whole = (build_gpt(SHAPE, dtype=torch.float64) for _ in range(2))
    found = refit_sequentially(model, plan, Groups.from_megatron(), calibration(model))
    student = build_gpt(SHAPE, dtype=torch.float64, seed=1)
    prune_into(model, student, found.plan, Groups.from_megatron())
    torch.testing.assert_close(run_gpt(student, TOKENS), run_gpt(whole, TOKENS), rtol=0, atol=1e-9)


def test_a_tie_holds_bit_for_bit() -> None:
    plan, embedding = PLANS["channels, tied"], "embedding.word_embeddings.weight"
    found, outcome = refitted("channels, tied")
    assert outcome.plan.target.share_embeddings_and_output_weights and "output_layer.weight" not in found
    assert torch.equal(found[embedding], full_weights(build_gpt(TIED), TIED)[embedding][:, plan.hidden])


@torch.no_grad()
@pytest.mark.parametrize("shape", [SHAPE, TIED])
def test_channels_that_follow_from_those_kept_are_not_missed(shape: ModelShape) -> None:
    keep = shape.hidden_size // 2
    others = torch.linalg.qr(torch.randn(keep, keep, generator=torch.Generator().manual_seed(2))).Q
    both = torch.cat([torch.eye(keep), others])  # [h, k]; as long as what it is made of, so that norms divide alike
    teacher = build_gpt(shape)
    for name, parameter in teacher.named_parameters():
        if "word_embeddings" in name:
            parameter.copy_(parameter[:, :keep] @ both.t())
        elif "linear_proj" in name or "linear_fc2" in name:
            parameter.copy_(both @ parameter[:keep])
        elif "final_layernorm" in name and shape.share_embeddings_and_output_weights:
            parameter.fill_(0.7)  # otherwise no weights of the student's norm say it
    whole = run_gpt(teacher, TOKENS)
    plan = dataclasses.replace(random_plan(shape, hidden_size=keep), hidden=torch.arange(keep))
    options = SequentialConfig(reader_ridge=1e-9, writer_ridge=1e-9)
    found = refit_sequentially(teacher, plan, Groups.from_megatron(), calibration(teacher), options)
    said = run_gpt(student_of(teacher, found), TOKENS)
    assert (said - whole).norm() < 1e-4 * whole.norm()


@torch.no_grad()
@pytest.mark.parametrize("cut", [*PLANS, *WITH_EXPERTS])
def test_what_the_last_norm_misses_is_what_it_misses_in_the_student(cut: str) -> None:
    """So all that stands before it was fitted to a stream that the student, once cut, really has."""
    plan = (PLANS | WITH_EXPERTS)[cut]
    model = build_gpt(plan.source)
    found = refit_sequentially(model, plan, Groups.from_megatron(), calibration(model), SequentialConfig(**RIDGE))
    streams = []
    for each in (build_gpt(plan.source), student_of(model, found)):
        entering: list[Tensor] = []
        each.decoder.final_layernorm.register_forward_pre_hook(lambda _, args, to=entering: to.append(args[0]))
        run_gpt(each, TOKENS)
        streams.append(normed(entering[0][MASK.t() != 0].double(), plan.source.normalization))
    stored = full_weights(build_gpt(plan.source), plan.source)["decoder.final_layernorm.weight"]
    gamma, p = norm_gamma(stored.double(), plan.source), projection(plan)
    scale = (plan.source.hidden_size / plan.target.hidden_size) ** 0.5
    missing = gamma * (streams[0] - scale * streams[1] @ p.t())
    assert found.places[-1].plain_error == pytest.approx(
        float(missing.square().sum() / (gamma * streams[0]).square().sum()), rel=1e-3
    )


@torch.no_grad()
def test_a_refitted_student_is_nearer_to_its_teacher_than_a_cut_one() -> None:
    for cut in ("channels", "channels, tied", "turned"):
        plan = PLANS[cut]
        teacher, model, plain = build_gpt(plan.source), build_gpt(plan.source), build_gpt(plan.target, seed=1)
        prune_into(teacher, plain, plan, Groups.from_megatron())
        found = refit_sequentially(model, plan, Groups.from_megatron(), calibration(model))
        whole = run_gpt(teacher, TOKENS)
        before, after = ((run_gpt(each, TOKENS) - whole).norm() for each in (plain, student_of(model, found)))
        assert after < 0.8 * before, cut


def refitted_on(plan: PruningPlan, samples: int, held_out: float) -> tuple[Any, SequentialRefit]:
    """The student after the first `samples`, in micro-batches of two."""
    model = build_gpt(plan.source)
    run = calibration(model, TOKENS[:samples], MASK[:samples], micro_batch=2)
    config = SequentialConfig(held_out=held_out, **RIDGE, selection="scores")
    found = refit_sequentially(model, plan, Groups.from_megatron(), run, config)
    return student_of(model, found), found


@pytest.mark.parametrize("cut", ["channels", "layers, channels", "experts without a shared one"])
def test_held_out_tokens_are_not_fitted(cut: str) -> None:
    plan = (PLANS | WITH_EXPERTS)[cut]
    student, _ = refitted_on(plan, 8, held_out=0.25)  # the last of four micro-batches
    expected, alone = refitted_on(plan, 6, held_out=0)
    assert_near(full_weights(student, plan.target), full_weights(expected, plan.target), 1e-6)
    assert all(place.held_out_error is None for place in alone.places)


@torch.no_grad()
def test_a_held_out_error_is_what_the_student_misses_there() -> None:
    plan = PLANS["channels"]
    student, found = refitted_on(plan, 8, held_out=0.25)
    place = next(each for each in found.places if each.name == "decoder.layers.0.mlp.linear_fc2")
    before = held_out_stream(student, "decoder.layers.0.pre_mlp_layernorm")
    theirs, mine = (
        held_out_stream(each, "decoder.layers.1.input_layernorm") for each in (build_gpt(plan.source), student)
    )
    per_token = (theirs.square().mean(1, keepdim=True) + SHAPE.layernorm_epsilon).rsqrt()
    wanted, missing = ((theirs[:, plan.hidden] - each) * per_token for each in (before, mine))
    assert place.held_out_error == pytest.approx(float(missing.square().sum() / wanted.square().sum()), rel=1e-3)


def held_out_stream(model: Any, norm: str) -> Tensor:
    """What enters a norm for the last of four micro-batches, [t, c] float64."""
    entering: list[Tensor] = []
    model.get_submodule(norm).register_forward_pre_hook(lambda _, args: entering.append(args[0]))
    run_gpt(model, TOKENS[6:])
    return entering[0][MASK[6:].t() != 0].double()


@pytest.mark.parametrize("signal", [0.0, 1.0])
def test_ridges_are_what_held_out_tokens_miss_least_with(signal: float) -> None:
    """Where all is noise, the largest."""
    generator = torch.Generator().manual_seed(7)
    inputs, map_ = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((90, 20), (5, 20)))
    noise = torch.randn(90, 5, generator=generator, dtype=torch.float64)
    missing = signal * inputs @ map_.t() + noise
    fitted, held_out = (
        Sums(each.t() @ each, rows.t() @ each, rows.square().sum())
        for each, rows in ((inputs[:60], missing[:60]), (inputs[60:], missing[60:]))
    )
    errors = {}
    for ridge in RIDGES:
        shift = ridge * float(inputs[:60].square().sum(0).mean())
        solution = ridge_toward(torch.zeros(5, 20, dtype=torch.float64), inputs[:60], missing[:60], shift)
        errors[ridge] = float((missing[60:] - inputs[60:] @ solution.t()).square().sum())
        assert float(held_out.missed_by(fitted.fit(ridge))) == pytest.approx(errors[ridge], rel=1e-9)
    assert best_ridge(fitted, held_out) == min(errors, key=lambda ridge: errors[ridge])
    assert (best_ridge(fitted, held_out) == RIDGES[-1]) == (signal == 0)


def on_this_layout(cut: str) -> tuple[Weights, SequentialRefit]:
    return refitted(
        cut, micro_batch=1, selection="compensated_error", held_out=0.5, reader_ridge=None, writer_ridge=None
    )


on_one_process = functools.cache(on_this_layout)


LAYOUTS = [
    *itertools.product(["channels, tied", "turned", "turned, parted"], ["tp2", "tp2-sp", "pp2", "dp2", "cp2"]),
    *itertools.product(["experts"], ["dp2-ep2", "tp2", "tp2-sp-ep2-etp1", "pp2"]),
    *itertools.product(["layers, channels", "layers, channels, some stages empty"], ["tp2-sp", "pp2"]),
]


@pytest.mark.parametrize(("cut", "layout"), LAYOUTS)
def test_the_refit_is_the_same_on_every_layout(ranks: Ranks, cut: str, layout: str) -> None:
    expected, outcome = on_one_process(cut)
    for rank, (weights, found) in enumerate(ranks(layout).run(on_this_layout, cut)):
        where = f"on rank {rank} of {layout}"
        assert_near(weights, expected, 3e-5 if "layers" in cut else 1e-5, where)  # of float32 sums, more the deeper
        assert_same_choice(found.plan, outcome.plan, where)
        assert [place.name for place in found.places] == [place.name for place in outcome.places]
        errors = [place.error for place in outcome.places]
        assert [place.error for place in found.places] == pytest.approx(errors, rel=1e-3), where
        assert [place.ridge for place in found.places] == [place.ridge for place in outcome.places], where


def refused(plan: PruningPlan, mask: Tensor = MASK, broken: bool = False, **options: Any) -> None:
    model = build(plan.source)
    for layer in model.decoder.layers:
        if broken and layer.layer_number == 2:
            layer.mlp.linear_fc1.weight.data[7] = float("nan")
    run = calibration(model, mask=mask)
    refit_sequentially(model, plan, Groups.from_megatron(), run, SequentialConfig(**options))


def test_what_cannot_be_refitted_is_refused() -> None:
    plan = PLANS["channels"]
    merged = dataclasses.replace(plan, head_partner=torch.full_like(plan.head, -1))
    with pytest.raises(ValueError, match=r"plan.head_partner merges dropped heads into kept ones, .* Use one of them"):
        refused(merged)
    norms = random_plan(smaller(SHAPE, normalization="LayerNorm"), **WIDTH)
    with pytest.raises(ValueError, match=r"LayerNorm takes off the mean over all channels, .*basis=rotation"):
        refused(norms)
    few = torch.zeros_like(MASK)
    few[0, :5] = 1
    message = r"decoder.layers.0.input_layernorm: the second moment of its 14 inputs is not positive definite"
    with pytest.raises(ValueError, match=message):
        refused(plan, mask=few, reader_ridge=0.0)


@pytest.mark.parametrize("layout", ["tp2", "pp2", "dp2"])
def test_activations_that_are_not_finite_are_named_on_every_rank(ranks: Ranks, layout: str) -> None:
    message = r"decoder.layers.1.mlp.linear_fc2: activations are not finite \(NaN or infinity\)"
    with pytest.raises(ValueError, match=message):
        ranks(layout).run(refused, PLANS["channels"], MASK, True)


@pytest.mark.parametrize("cut", ["channels", "LayerNorm, biases, turned"])
def test_norms_inside_linears_are_refitted_alike(cut: str) -> None:
    plan, (expected, _) = PLANS[cut], refitted(cut)
    model = fuse_norms(build_gpt(plan.source))
    config = SequentialConfig(**RIDGE, selection="scores")
    found = refit_sequentially(model, plan, Groups.from_megatron(), calibration(model), config)
    assert_near(full_weights(student_of(model, found), plan.target), expected, 1e-6)


def test_tokens_that_do_not_count_are_not_seen() -> None:
    expected, _ = refitted("channels")
    plan = PLANS["channels"]
    ends = (MASK.cumsum(1) == MASK.sum(1, keepdim=True)) & (MASK == 0)  # after the last token that counts
    model = build_gpt(plan.source)
    run = calibration(model, torch.where(ends, 3, TOKENS), MASK, micro_batch=8)
    config = SequentialConfig(**RIDGE, selection="scores")
    found = refit_sequentially(model, plan, Groups.from_megatron(), run, config)
    assert_near(full_weights(student_of(model, found), plan.target), expected, 1e-4)  # float32 sums


def test_bf16_weights_stay_bf16_and_near_the_float32_solution() -> None:
    plan, (expected, _) = PLANS["channels"], refitted("channels")
    model = build_gpt(plan.source, dtype=torch.bfloat16)
    config = SequentialConfig(**RIDGE, selection="scores")
    refit_sequentially(model, plan, Groups.from_megatron(), calibration(model), config)
    student = build_gpt(plan.target, dtype=torch.bfloat16, seed=1)
    prune_into(model, student, dataclasses.replace(plan, norm_scale=None), Groups.from_megatron())
    for name, full in full_weights(student, plan.target).items():
        if "layers.0" in name and "linear" in name:  # deeper ones see other streams
            assert full.dtype == torch.bfloat16
            assert (full.float() - expected[name]).norm() < 0.05 * expected[name].norm(), name  # 8 bits of mantissa


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reader_ridge": -0.1}, r"surgery.sequential.reader_ridge=-0.1 must be at least 0; the default is 0.1"),
        ({"writer_ridge": float("nan")}, r"surgery.sequential.writer_ridge=nan must be a finite number at least 0"),
        ({"writer_ridge": None}, r"surgery.sequential.writer_ridge=null is chosen by held-out tokens, .*=0.1\."),
        ({"num_samples": 0}, r"surgery.sequential.num_samples=0 must be at least 1; try 256"),
        ({"selection": "score"}, r"surgery.sequential.selection=score is not known; did you mean scores\?"),
    ],
)
def test_a_config_that_cannot_work_says_what_would(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SequentialConfig(**options)


@pytest.mark.parametrize("cut", ["channels", "turned", "turned, parted", "LayerNorm, biases, turned"])
def test_norms_have_the_size_of_the_teachers_again(cut: str) -> None:
    """Gammas that readers took in would leave them weights of another size, for which a learning rate is another."""
    plan = PLANS[cut]
    model = build_gpt(plan.source)
    gammas = {name: each for name, each in model.named_parameters() if norm_number(name, plan.source) is not None}
    for gamma in gammas.values():
        gamma.data.mul_(0.03)
    before = float(torch.cat([each.data for each in gammas.values()]).square().mean().sqrt())
    config = SequentialConfig(**RIDGE, selection="scores")
    found = refit_sequentially(model, plan, Groups.from_megatron(), calibration(model), config)
    student, plainly = student_of(model, found), build_gpt(plan.target, seed=1)
    prune_into(model, plainly, found.plan, Groups.from_megatron())
    dataclasses.replace(found, exponents={}).finish(plainly)

    torch.testing.assert_close(run_gpt(student, TOKENS), run_gpt(plainly, TOKENS), rtol=0, atol=1e-6)
    sizes = [each.data for name, each in student.named_parameters() if norm_number(name, plan.target) is not None]
    after = float(torch.cat(sizes).square().mean().sqrt())
    assert 0.5 < after / before / (plan.source.hidden_size / plan.target.hidden_size) ** 0.5 < 2

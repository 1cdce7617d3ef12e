"""Claims about losses between hidden states: what they are, and that no layout of the ranks changes them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.num_microbatches_calculator import init_num_microbatches_calculator
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_batch_on_this_cp_rank
from torch import Tensor
from torch.testing import assert_close

from minitron_nemo.config.distillation import DistillationConfig, HiddenStateConfig
from minitron_nemo.distillation.hidden_states import STATE_LOSSES, relation_divergence
from minitron_nemo.distillation.teacher import LiveTeacher
from minitron_nemo.distillation.teacher_student import TeacherStudent, adjust_tensor_shapes_fn
from minitron_nemo.parallel import Groups
from minitron_nemo.shape import ModelShape
from minitron_nemo.weights import local_parameters, stream_full_parameters
from support.gathering_attention import build_context_parallel_gpt
from support.megatron import TINY, build_gpt, causal_mask, smaller
from support.ranks import Ranks

TEACHER = TINY  # 4 layers, h=24, 6 heads
STUDENT = smaller(TINY, num_layers=3, hidden_size=16, ffn_hidden_size=28, num_attention_heads=4)
REAL_VOCABULARY = 61  # of 66 padded
SAMPLES, S = 4, 8
STEPS = 2  # of which the second is looked at: a dynamic balance knows its ratio by then


@dataclass
class Case:
    """A config and what it compares, written out: (name, place in the student, place in the teacher)."""

    hidden: HiddenStateConfig
    pairs: list[tuple[str, str, str]]
    cross_entropy_weight: float = 0.0
    overrides: dict[str, Any] = field(default_factory=dict)
    """Of the student's TransformerConfig."""


def fixed(weight: float, **values: Any) -> HiddenStateConfig:
    return HiddenStateConfig(enabled=True, balance="fixed", weight=weight, **values)


RELATIONS = fixed(0.6, places=["relation", "mlp_input"], loss="smooth_l1", mapping="uniform")
RELATION_PAIRS = [
    (f"{place}_{student}_to_{teacher}", f"{read} {student}", f"{read} {teacher}")
    for student, teacher in ((0, 0), (1, 1), (2, 3))
    for place, read in (("relation", "qkv"), ("mlp_input", "pre_mlp_layernorm"))
]
CASES = {
    # With two pipeline stages the projection is shared by both, and layer 0's state travels to its teacher's stage.
    "as the papers": Case(
        fixed(0.7),
        [
            ("embedding", "input_layernorm 0", "input_layernorm 0"),
            ("block_output_0_to_1", "input_layernorm 1", "input_layernorm 2"),
        ],
    ),
    "dynamic": Case(
        HiddenStateConfig(enabled=True, places=["block_output"], mapping="last_k", k=1, weight=1.5),
        [("block_output_2_to_3", "final_layernorm", "final_layernorm")],
        cross_entropy_weight=0.3,
    ),
    # With two pipeline stages states travel both ways.
    "raw, to and fro": Case(
        fixed(
            0.4,
            places=["embedding", "block_output", "attention_output"],
            loss="mse",
            after_layernorm=False,
            mapping="explicit",
            pairs=[[2, 0], [0, 3]],
            projection="per_pair",
        ),
        [
            ("embedding", "embedding", "embedding"),
            ("block_output_2_to_0", "layer 2", "layer 0"),
            ("attention_output_2_to_0", "self_attention 2", "self_attention 0"),
            ("block_output_0_to_3", "layer 0", "layer 3"),
            ("attention_output_0_to_3", "self_attention 0", "self_attention 3"),
        ],
    ),
    "relations": Case(RELATIONS, RELATION_PAIRS),
    "recomputed": Case(
        RELATIONS,
        RELATION_PAIRS,
        overrides={"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    ),
    "recomputed in part": Case(
        RELATIONS,
        RELATION_PAIRS,
        overrides={
            "recompute_granularity": "selective",
            "recompute_modules": ["core_attn", "mlp"],
        },
    ),
}


def samples() -> dict[str, Tensor]:
    """tokens, labels, loss_mask [samples, s]; each sample is supervised in another part, one nowhere."""
    generator = torch.Generator().manual_seed(11)
    tokens = torch.randint(REAL_VOCABULARY, (SAMPLES, S + 1), generator=generator)
    mask = torch.ones(SAMPLES, S)
    mask[0, 5:], mask[1, :3], mask[2] = 0, 0, 0
    positions = torch.arange(S).expand(SAMPLES, S)
    return {"tokens": tokens[:, :-1], "labels": tokens[:, 1:], "loss_mask": mask, "position_ids": positions}


def projection_weight(name: str) -> Tensor:
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    return torch.randn(TEACHER.hidden_size, STUDENT.hidden_size, generator=generator, dtype=torch.float64) / 4


# ---- on ranks --------------------------------------------------------------------------------------------------------


def build(shape: ModelShape, *, seed: int, dtype: torch.dtype = torch.float64, **overrides: Any) -> GPTModel:
    context_parallel = parallel_state.get_context_parallel_world_size() > 1
    build_model = build_context_parallel_gpt if context_parallel else build_gpt
    return build_model(shape, seed=seed, dtype=dtype, calculate_per_token_loss=True, **overrides)


def build_pair(
    hidden: HiddenStateConfig, cross_entropy_weight: float = 0.0, *, seed: int = 1, **overrides: Any
) -> TeacherStudent:
    student = build(STUDENT, seed=seed, finalize_model_grads_func=finalize_model_grads, **overrides).train()
    teacher = build(TEACHER, seed=2, dtype=student.config.params_dtype)
    config = DistillationConfig(hidden_states=hidden, cross_entropy_weight=cross_entropy_weight)
    return TeacherStudent(student, LiveTeacher(teacher), config, vocab_size=REAL_VOCABULARY)


def step(wrapped: DistributedDataParallel, micro_batch: int) -> None:
    """Forward and backward of all samples through the real schedule, DDP and reductions; ends with the step."""
    rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    batch = get_batch_on_this_cp_rank({key: value[rank::size] for key, value in samples().items()})
    micro_batches = [
        {key: value[start : start + micro_batch] for key, value in batch.items()}
        for start in range(0, SAMPLES // size, micro_batch)
    ]

    def forward_step(batches: Any, model: torch.nn.Module) -> tuple[Tensor, Any]:
        batch = next(batches)
        mask = batch["loss_mask"]
        output = model(batch["tokens"], batch["position_ids"], causal_mask(S), labels=batch["labels"], loss_mask=mask)
        return output, lambda loss: (loss.sum, loss.count.int(), {})

    wrapped.zero_grad_buffer()
    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(micro_batches),
        model=wrapped,
        num_microbatches=len(micro_batches),
        seq_length=S,
        micro_batch_size=micro_batch,
        forward_only=False,
        adjust_tensor_shapes_fn=adjust_tensor_shapes_fn(wrapped),
    )
    wrapped.module.end_step()


def run_cases(cases: dict[str, Case], micro_batch: int) -> dict[str, dict[str, Any]]:
    return {name: run_steps(case, micro_batch) for name, case in cases.items()}


def run_steps(case: Case, micro_batch: int) -> dict[str, Any]:
    """Two steps on the same weights.

    Returns: parts of the loss of each step, full gradients by name and those of the projections here.
    """
    model = build_pair(case.hidden, case.cross_entropy_weight, **case.overrides)
    model.config.deallocate_pipeline_outputs = True  # as in real runs
    model.config.grad_scale_func = lambda loss: loss * 8
    assert model.hidden_states is not None
    with torch.no_grad():
        for name, parameter in model.hidden_states.projections.items():
            parameter.copy_(projection_weight(name))
    wrapped = DistributedDataParallel(model.config, DistributedDataParallelConfig(), model)
    steps = []
    for _ in range(STEPS):
        step(wrapped, micro_batch)
        steps.append(model.step_losses())
    with torch.no_grad():
        for parameter in model.student.parameters():
            parameter.copy_(parameter.main_grad / 8)
    full = stream_full_parameters(model.student, STUDENT, Groups.from_megatron())
    return {
        "steps": steps,
        "gradients": {name: gradient.clone() for name, gradient in full},
        "projections": {name: p.main_grad / 8 for name, p in model.hidden_states.projections.items()},
    }


# ---- by hand ---------------------------------------------------------------------------------------------------------


def run_by_hand(cases: dict[str, Case]) -> dict[str, dict[str, Any]]:
    return {name: steps_by_hand(case) for name, case in cases.items()}


def steps_by_hand(case: Case) -> dict[str, Any]:
    """One process, float64, all samples in one batch, autograd through the written-out total."""
    student, teacher = build(STUDENT, seed=1), build(TEACHER, seed=2)
    student_states, teacher_states = states_of(student), states_of(teacher)
    batch = samples()
    tokens = (batch["tokens"], batch["position_ids"], causal_mask(S))
    student_logits, teacher_logits = student(*tokens), teacher(*tokens).detach()

    mask = batch["loss_mask"].double()
    log_p, log_q = (logits[..., :REAL_VOCABULARY].log_softmax(-1) for logits in (teacher_logits, student_logits))
    means = {
        "divergence": ((log_p.exp() * (log_p - log_q)).sum(-1) * mask).sum() / mask.sum(),
        "agreement": ((log_p.argmax(-1) == log_q.argmax(-1)) * mask).sum() / mask.sum(),
    }
    if case.cross_entropy_weight:
        real_logits = student_logits[..., :REAL_VOCABULARY].transpose(1, 2)
        cross_entropy = F.cross_entropy(real_logits, batch["labels"], reduction="none")
        means["cross_entropy"] = (cross_entropy * mask).sum() / mask.sum()
    projections: dict[str, Tensor] = {}
    for name, of_student, of_teacher in case.pairs:
        ours, theirs = student_states[of_student], teacher_states[of_teacher]
        if of_student.startswith("qkv"):
            per_token = sum(relation_by_hand(x, y.detach()) for x, y in zip(ours, theirs, strict=True)) / 3
        else:
            key = name if case.hidden.projection == "per_pair" else "shared"
            weight = projections.setdefault(key, projection_weight(key).requires_grad_())
            per_token = LOSSES_BY_HAND[case.hidden.loss](ours @ weight.t(), theirs.detach())
        means[f"hidden/{name}"] = (per_token * mask.t()).sum() / mask.sum()

    hidden = torch.stack([means[f"hidden/{name}"] for name, _, _ in case.pairs]).sum()
    alpha = (means["divergence"] / hidden).detach() if case.hidden.balance == "dynamic" else torch.tensor(1.0)
    loss = means["divergence"] + case.cross_entropy_weight * means.get("cross_entropy", 0)
    loss = loss + case.hidden.weight * alpha * hidden
    loss.backward()
    return {
        "last": means | {"hidden": hidden, "alpha": alpha, "hidden_weight": case.hidden.weight * alpha, "loss": loss},
        "gradients": {name: parameter.grad for name, parameter in student.named_parameters()},
        "projections": {name: weight.grad for name, weight in projections.items()},
    }


def states_of(model: GPTModel) -> dict[str, Any]:
    """Filled by the next forward pass: every module's output under "name layer" or "name", with "qkv layer"."""
    states: dict[str, Any] = {}

    def keep(key: str, module: torch.nn.Module) -> None:
        def hook(_module: Any, _args: Any, output: Any) -> None:
            states[key] = output[0] if isinstance(output, tuple) else output

        module.register_forward_hook(hook)

    keep("embedding", model.embedding)
    keep("final_layernorm", model.decoder.final_layernorm)
    for number, layer in enumerate(model.decoder.layers):
        keep(f"layer {number}", layer)
        for name in ("input_layernorm", "self_attention", "pre_mlp_layernorm"):
            keep(f"{name} {number}", getattr(layer, name))
        layer.self_attention.core_attention.register_forward_pre_hook(
            lambda _module, args, number=number: states.update({f"qkv {number}": args[:3]})
        )
    return states


LOSSES_BY_HAND = {
    "cosine": lambda x, y: 1 - F.cosine_similarity(x, y, dim=-1),
    "mse": lambda x, y: F.mse_loss(x, y, reduction="none").mean(-1),
    "smooth_l1": lambda x, y: torch.where((x - y).abs() < 1, (x - y) ** 2 / 2, (x - y).abs() - 0.5).mean(-1),
}


def relation_by_hand(student: Tensor, teacher: Tensor, heads: int = 2) -> Tensor:
    """[s, b] from [s, b, n, d]: token by token, head by head; both models' tiny query groups are 2."""
    s, b = student.shape[:2]
    rows = []
    for token in range(s):
        for sample in range(b):
            divergences = []
            for head in range(heads):
                log_p, log_q = (
                    (x @ x[token] / x.shape[-1] ** 0.5)[: token + 1].log_softmax(0)
                    for x in (states[:, sample].flatten(1).chunk(heads, dim=1)[head] for states in (teacher, student))
                )
                divergences.append((log_p.exp() * (log_p - log_q)).sum())
            rows.append(torch.stack(divergences).mean())
    return torch.stack(rows).view(s, b)


@pytest.fixture(scope="module")
def by_hand(ranks: Ranks) -> dict[str, dict[str, Any]]:
    (results,) = ranks("single").run(run_by_hand, CASES)
    return results


# ---- the claims ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layout", "micro_batch"), [("single", 2), ("tp2", 4), ("tp2-sp", 1), ("cp2", 2), ("pp2", 1), ("dp2", 1)]
)
def test_hidden_losses_and_gradients_are_those_of_one_process_by_hand(
    ranks: Ranks, by_hand: dict[str, dict[str, Any]], layout: str, micro_batch: int
) -> None:
    # The CPU platform stands aside inside a recomputation's own backward pass, where Megatron's gather asks for a GPU.
    cases = {name: case for name, case in CASES.items() if layout not in ("tp2-sp", "cp2") or not case.overrides}
    expected = {name: by_hand[name] for name in cases}
    results = ranks(layout).run(run_cases, cases, micro_batch)

    for rank, result in enumerate(results):
        for case, right in expected.items():
            where = f"case {case!r} on rank {rank} of {layout}"
            first, last = result[case]["steps"]
            assert set(last) == set(right["last"]), where
            for part, value in right["last"].items():
                assert_close(last[part], value.detach().double(), rtol=1e-6, atol=0, msg=_named(part, where))
            if cases[case].hidden.balance == "dynamic":
                assert first["alpha"] == first["hidden_weight"] == 0, where
            for kind in ("gradients", "projections"):
                for name, gradient in result[case][kind].items():
                    reference = right[kind][name]
                    tolerance = 1e-6 * reference.abs().max().item()  # Megatron's cross-entropy is float32
                    assert_close(gradient, reference, rtol=1e-5, atol=tolerance, msg=_named(name, where))
    for case, right in expected.items():
        everywhere = set().union(*(result[case]["projections"] for result in results))
        assert everywhere == set(right["projections"]), case
        for result in results[1:]:  # bitwise: ranks that disagree drift apart
            assert result[case]["steps"] == results[0][case]["steps"], case


def _named(name: str, where: str) -> Any:
    return lambda text: f"{name}, {where}: {text}"


@pytest.mark.parametrize("loss", STATE_LOSSES)
def test_float32_losses_match_float64_autograd(loss: str) -> None:
    generator = torch.Generator().manual_seed(3)
    student = torch.randn(5, 3, 40, generator=generator)
    for teacher in (3 * torch.randn(5, 3, 40, generator=generator), student * 1.001 + 0.01):
        x, y = student.clone().requires_grad_(), student.double().requires_grad_()
        value, expected = STATE_LOSSES[loss](x, teacher), LOSSES_BY_HAND[loss](y, teacher.double())
        value.sum().backward()
        expected.sum().backward()
        scale = 1.0 if loss == "cosine" else expected.abs().max().item()  # the directions have length 1
        assert_close(value.double(), expected, rtol=1e-6, atol=1e-6 * scale)
        assert_close(x.grad.double(), y.grad, rtol=1e-5, atol=1e-5 * y.grad.abs().max().item())
    assert STATE_LOSSES[loss](student, student).count_nonzero() == 0


def test_float32_relations_match_float64_autograd() -> None:
    generator = torch.Generator().manual_seed(3)
    student, teacher = (torch.randn(7, 2, heads, 8, generator=generator) for heads in (4, 6))
    x, y = student.clone().requires_grad_(), student.double().requires_grad_()
    value = relation_divergence(x, teacher, heads=2, cp_group=None)
    expected = relation_by_hand(y, teacher.double())
    value.sum().backward()
    expected.sum().backward()
    assert_close(value.double(), expected, rtol=1e-6, atol=1e-6)
    assert_close(x.grad.double(), y.grad, rtol=1e-5, atol=1e-6)


# ---- saved and resumed -----------------------------------------------------------------------------------------------

RESUMED = HiddenStateConfig(enabled=True, warmup_steps=3)


@dataclass
class Training:
    """A student in training, with what a checkpoint of it holds."""

    model: TeacherStudent
    wrapped: DistributedDataParallel
    optimizer: Any

    @classmethod
    def start(cls, *, seed: int) -> Training:
        model = build_pair(RESUMED, seed=seed, dtype=torch.float32)
        wrapped = DistributedDataParallel(model.config, DistributedDataParallelConfig(), model)
        optimizer = get_megatron_optimizer(OptimizerConfig(optimizer="adam", lr=1e-2, clip_grad=1.0), [wrapped])
        return cls(model, wrapped, optimizer)

    def step(self) -> None:
        self.optimizer.zero_grad()
        step(self.wrapped, micro_batch=2)
        self.optimizer.step()

    def state(self, *, is_loading: bool = False) -> dict[str, Any]:
        model = self.wrapped.sharded_state_dict()
        return {"model": model, "optimizer": self.optimizer.sharded_state_dict(model, is_loading=is_loading)}

    def outcome(self) -> dict[str, Tensor]:
        """Of the next step: parts of the loss, and every weight after it."""
        self.step()
        state = {name: value.clone() for name, value in self.model.state_dict().items() if isinstance(value, Tensor)}
        return self.model.step_losses() | state


def resume(directory: str) -> dict[str, Any]:
    """On ranks: two steps, saved, a third; then the third again in a training begun with other weights."""
    first = Training.start(seed=1)
    first.step()
    first.step()
    dist_checkpointing.save(first.state(), directory)
    expected = first.outcome()

    second = Training.start(seed=5)
    loaded = dist_checkpointing.load(second.state(is_loading=True), directory)
    second.wrapped.load_state_dict({key.removeprefix("module."): value for key, value in loaded["model"].items()})
    second.optimizer.load_state_dict(loaded["optimizer"])

    plain = build(STUDENT, seed=5, dtype=torch.float32)
    read = dist_checkpointing.load({"model": plain.sharded_state_dict(prefix="module.")}, directory)
    return {
        "expected": expected,
        "plain reads the student": all(
            torch.equal(read["model"][f"module.{name}"], weight)
            for name, weight in second.model.student.named_parameters()
        ),
        "actual": second.outcome(),
        "exported": sorted(local_parameters(first.wrapped)),
    }


@pytest.mark.parametrize("layout", ["single", "pp2"])
def test_projection_and_balance_resume_bitwise_with_the_optimizer(ranks: Ranks, tmp_path: Path, layout: str) -> None:
    results = ranks(layout).run(resume, str(tmp_path))
    for result in results:
        assert result["actual"].keys() == result["expected"].keys()
        for name, value in result["expected"].items():
            assert torch.equal(result["actual"][name], value), name
        assert result["expected"]["hidden_states.balance.steps"] == 3
        assert result["expected"]["alpha"] > 0
        assert result["plain reads the student"]
        assert not any("hidden_states" in name for name in result["exported"])
    projections = [result["expected"]["hidden_states.projections.shared"] for result in results]
    assert all(torch.equal(projections[0], projection) for projection in projections)  # copies stay copies


def load_across() -> dict[str, Any]:
    """On one rank: a state with hidden losses into a student without, and the reverse."""
    with_hidden, without = build_pair(RESUMED), build_pair(HiddenStateConfig(), seed=3)
    assert with_hidden.hidden_states is not None
    start = with_hidden.hidden_states.projections["shared"].clone()
    added = set(with_hidden.state_dict()) - set(without.state_dict())
    without.load_state_dict(with_hidden.state_dict(), strict=True)
    other = build_pair(HiddenStateConfig(), seed=4)
    with_hidden.load_state_dict(other.state_dict(), strict=True)
    torn = with_hidden.state_dict()
    del torn["hidden_states.balance.alpha"]
    try:
        with_hidden.load_state_dict(torn, strict=True)
        refusal = ""
    except RuntimeError as error:
        refusal = str(error)
    return {
        "added": sorted(added),
        "student follows": torch.equal(
            with_hidden.student.embedding.word_embeddings.weight, other.student.embedding.word_embeddings.weight
        ),
        "projection stays": torch.equal(with_hidden.hidden_states.projections["shared"], start),
        "refusal": refusal,
    }


def test_states_with_and_without_hidden_losses_load_into_each_other(ranks: Ranks) -> None:
    (result,) = ranks("single").run(load_across)
    balance = ["hidden_states.balance.alpha", "hidden_states.balance.steps"]
    assert result["added"] == [*balance, "hidden_states.projections.shared"]
    assert result["student follows"]
    assert result["projection stays"]
    assert 'Missing key(s) in state_dict: "hidden_states.balance.alpha"' in result["refusal"]


# ---- mistakes --------------------------------------------------------------------------------------------------------


def across_stages(place: str, overrides: dict[str, Any]) -> None:
    build_pair(fixed(1.0, places=[place], mapping="explicit", pairs=[[0, 3]]), **overrides)


@pytest.mark.parametrize(
    ("place", "overrides", "message"),
    [
        ("relation", {}, r"pair relation_0_to_3 are on pipeline stages 0 \(student\) and 1 \(teacher\); relations are"),
        ("block_output", CASES["recomputed"].overrides, "the student's would have to travel, and activation recomp"),
    ],
)
def test_pairs_that_cannot_meet_are_named(ranks: Ranks, place: str, overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ranks("pp2").run(across_stages, place, overrides)


def train_without_end_step() -> None:
    init_num_microbatches_calculator(0, None, global_batch_size=1, micro_batch_size=1, data_parallel_size=1)
    model, batch = build_pair(RESUMED), {key: value[:1] for key, value in samples().items()}
    for _ in range(2):
        model(batch["tokens"], batch["position_ids"], causal_mask(S), labels=batch["labels"])


def test_a_step_that_nobody_ended_is_an_error_not_a_silent_weight_of_0(ranks: Ranks) -> None:
    with pytest.raises(RuntimeError, match=r"micro-batch 2 of a step of 1.*Call end_step\(\) after each"):
        ranks("single").run(train_without_end_step)

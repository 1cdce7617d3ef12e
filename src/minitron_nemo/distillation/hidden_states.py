"""Losses between hidden states of student and teacher, each on the pipeline stage where the states are.

    student state   [s, b, h_student] --projection--> [s, b, h_teacher] --loss--> [s, b] --mask, sum--> scalar
    teacher state   [s, b, h_teacher]                                             constant
    relation        3 x [s/cp, b, heads/tp, d], regrouped to [s/cp, b, r/tp, .]   queries, keys, values

s is s/cp, under sequence parallelism s/(cp*tp); channels are whole, so a token's loss is local. Losses as Minitron's
(arXiv:2407.14679, section 3); relations as MiniLMv2's (arXiv:2012.15828): of each token to itself and those before it.

How a loss gets its gradient on a stage that is not the last: it is attached to the activation that passes where the
student's state is read, as auxiliary losses of a mixture of experts are, and grows with it through backward. Megatron
scales a token's loss by its grad scaler alone and divides all gradients by the global number of tokens at the step's
end (`calculate_per_token_loss`), so a sum over this rank's tokens is all that is needed, on any layout.

Where the two states of a pair lie on different stages, the earlier one rides along in the pipeline's message to the
stage of the later one; a student's state gets its gradient back the same way.

Communication: none for states of the channels; cp for relations, keys gathered, their gradients scattered. Riders
widen the messages over pp.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from math import gcd
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import make_sharded_tensor_for_checkpoint, make_viewless_tensor
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minitron_nemo import platform
from minitron_nemo.checks import require, require_divisible
from minitron_nemo.config.distillation import HiddenStateConfig
from minitron_nemo.distillation.balance import Balance, StepSums
from minitron_nemo.distillation.pairs import State, gamma_at, pairs_of, watch
from minitron_nemo.distillation.projection import SHARED, build_projections
from minitron_nemo.parallel import ProcessGroup, all_reduce_sum, group_rank, group_size
from minitron_nemo.plan import PruningPlan


@dataclass
class MicroBatch:
    """What is at hand of one micro-batch on this stage while its forward passes run; states by pair."""

    weights: Tensor
    """[s, b], of the tokens whose states this rank holds: the loss mask."""
    all_weights: Tensor
    """[s/cp, b], of all tokens of the tensor-parallel group."""
    received: dict[int, Tensor]
    """Riders from earlier stages."""
    sums: StepSums
    teacher: dict[int, State] = field(default_factory=dict)
    leaving: dict[int, Tensor] = field(default_factory=dict)
    """Riders to later stages."""


class HiddenStateLosses(nn.Module):
    """The hidden losses of one pipeline stage, with the projections and the balance that are trained and saved.

    Args:
        student, teacher: this stage's parts, side by side; they get hooks that do nothing outside `micro_batch`.
        plan: by which the student was cut from the teacher; for mapping=plan and projection_init=plan.
    Raises: ValueError: the config does not fit the two models.
    """

    def __init__(
        self,
        student: GPTModel,
        teacher: GPTModel,
        config: HiddenStateConfig,
        plan: PruningPlan | None,
    ) -> None:
        super().__init__()
        _require_trainable(student.config)
        self.config, self.student_config = config, student.config
        self._tp, self._cp = student.pg_collection.tp, student.pg_collection.cp
        self._stage = group_rank(student.pg_collection.pp)
        self.pairs = pairs_of(config, student.config, teacher.config, plan)
        self.parts = [f"hidden/{pair.name}" for pair in self.pairs]
        """The pairs' names among the parts of the loss."""
        self._stages = [(p.student.stage(student.config), p.teacher.stage(teacher.config)) for p in self.pairs]
        self._widths = [
            (student if of_student < of_teacher else teacher).config.hidden_size
            for of_student, of_teacher in self._stages
        ]
        """Channels of a pair's rider."""
        self._require_travelling_states_can()
        self.balance = Balance(config)
        here = [pair for pair, stages in zip(self.pairs, self._stages, strict=True) if max(stages) == self._stage]
        self.projections = build_projections(
            config,
            self.pairs,
            here,
            student.config,
            teacher.config,
            plan,
            (self._gammas(student, side=0), self._gammas(teacher, side=1)),
            stage=self._stage,
            like=next(student.parameters()),
        )
        self._idle_projection = SHARED in self.projections and all(pair.place == "relation" for pair in here)
        self._relation_heads = self._local_relation_heads(student.config, teacher.config)
        self._current: MicroBatch | None = None
        self._to_recompute: list[deque[tuple[State, Tensor]]] = [deque() for _ in self.pairs]
        """Teacher states and weights for student states that are computed again in backward, oldest first."""
        for index, pair in enumerate(self.pairs):
            of_student, of_teacher = self._stages[index]
            if of_teacher == self._stage:
                watch(teacher, pair.teacher, partial(self._see_teacher, index))
            if of_student == self._stage:
                watch(student, pair.student, partial(self._see_student, index))

    def _gammas(self, model: GPTModel, side: int) -> Tensor:
        """Of each pair what the student's (side 0) or the teacher's norm multiplies by, 1 in the stream itself:
        [pairs, h] float32.

        Communicates: pp (sum), once.
        """
        gammas = torch.zeros(len(self.pairs), model.config.hidden_size)
        for gamma, pair, stages in zip(gammas, self.pairs, self._stages, strict=True):
            if stages[side] == self._stage:
                found = gamma_at(model, (pair.student, pair.teacher)[side])
                gamma.copy_(torch.ones_like(gamma) if found is None else found)
        return all_reduce_sum(gammas.to(platform.device()), group=model.pg_collection.pp).cpu()

    # ---- one micro-batch -----------------------------------------------------------------------------------------

    @contextmanager
    def micro_batch(self, loss_mask: Tensor, received: dict[int, Tensor], sums: StepSums) -> Iterator[None]:
        """Around the two models' forward passes, the teacher's first, and `finish`.

        Args:
            loss_mask: [b, s/cp], weight of each token's loss.
            received: what `take_riders` gave.
            sums: get the value of each pair compared here, under its name in `parts`.
        """
        all_weights = loss_mask.t().float()
        weights = all_weights
        if self.student_config.sequence_parallel:
            weights = all_weights.chunk(group_size(self._tp))[group_rank(self._tp)]
        self._current = MicroBatch(weights, all_weights, received, sums)
        try:
            yield
        finally:
            self._current = None

    def finish(self, student_output: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The stage's output with the losses of student states that came from earlier stages, and the states that
        leave with its message, [s, b, h] each, in the order of `riders_into` the next stage."""
        batch = self._current
        assert batch is not None
        for index, stages in enumerate(self._stages):
            if stages[0] < stages[1] == self._stage:
                teacher_state, weights = self._teacher_side(index, batch)
                loss = self._compare(index, batch.received.pop(index), teacher_state, weights)
                student_output = self._attach(student_output, loss)
        batch.leaving |= batch.received
        if self._idle_projection:
            # the copy without a pair takes part in every backward pass, as overlapped reduction of gradients asks
            student_output = self._attach(student_output, self.projections[SHARED].sum() * 0.0)
        leaving = [batch.leaving[index].to(student_output.dtype) for index in self.riders_into(self._stage + 1)]
        return student_output, leaving

    def forget_recomputation(self) -> None:
        """Drop what is kept for backward passes that never came."""
        for waiting in self._to_recompute:
            waiting.clear()

    def _see_teacher(self, index: int, passing: Tensor, state: State) -> Tensor:
        batch = self._current
        if batch is not None:
            of_student, of_teacher = self._stages[index]
            if isinstance(state, Tensor):
                state = state.detach()  # a teacher that learns does so from labels alone
            else:
                query, key, value = state
                state = query.detach(), key.detach(), value.detach()
            if of_teacher < of_student:
                assert isinstance(state, Tensor)
                batch.leaving[index] = state
            else:
                batch.teacher[index] = state
        return passing

    def _see_student(self, index: int, passing: Tensor, state: State) -> Tensor:
        batch, waiting = self._current, self._to_recompute[index]
        if batch is None:  # recomputed in backward, or not in distillation
            if not (waiting and torch.is_grad_enabled()):
                return passing
            return self._attach(passing, self._compare(index, state, *waiting.popleft()))
        of_student, of_teacher = self._stages[index]
        if of_student < of_teacher:
            assert isinstance(state, Tensor)
            batch.leaving[index] = state
            return passing
        teacher_state, weights = self._teacher_side(index, batch)
        loss = self._compare(index, state, teacher_state, weights)
        if not torch.is_grad_enabled():
            waiting.append((teacher_state, weights))
            return passing
        return self._attach(passing, loss)

    def _teacher_side(self, index: int, batch: MicroBatch) -> tuple[State, Tensor]:
        of_student, of_teacher = self._stages[index]
        state = batch.received.pop(index) if of_teacher < of_student else batch.teacher.pop(index)
        return state, batch.all_weights if self.pairs[index].place == "relation" else batch.weights

    def _attach(self, passing: Tensor, loss: Tensor) -> Tensor:
        # a function that returns its argument returns a view, which Megatron's message passing refuses
        return make_viewless_tensor(_Attach.apply(passing, loss, self.student_config), True, True)

    # ---- the losses ----------------------------------------------------------------------------------------------

    def _compare(self, index: int, student: State, teacher: State, weights: Tensor) -> Tensor:
        """The pair's weighted part of the loss, a scalar. Communicates: cp, for relations."""
        is_relation = self.pairs[index].place == "relation"
        loss_of: Callable[[Any, Any, Tensor], Tensor] = self._relation_loss
        if not is_relation:
            loss_of = partial(self._state_loss, self._projection(index))
        if torch.is_grad_enabled():  # what the loss would keep for backward is several float32 copies of the state
            summed = checkpoint(loss_of, student, teacher, weights, use_reentrant=False, preserve_rng_state=False)
        else:
            summed = loss_of(student, teacher, weights)
        if self._current is not None:  # not a second time, when recomputed in backward
            same_on_tp = not is_relation and not self.student_config.sequence_parallel
            self._current.sums.add(self.parts[index], summed, copies=group_size(self._tp) if same_on_tp else 1)
        return summed * self.balance.hidden_weight().to(summed.dtype)

    def _state_loss(self, projection: Tensor | None, student: Tensor, teacher: Tensor, weights: Tensor) -> Tensor:
        if projection is not None:
            student = F.linear(student.to(projection.dtype), projection)
        return (STATE_LOSSES[self.config.loss](_wide(student), _wide(teacher)) * weights).sum()

    def _relation_loss(self, student: Sequence[Tensor], teacher: Sequence[Tensor], weights: Tensor) -> Tensor:
        losses = [
            relation_divergence(ours, theirs, heads=self._relation_heads, cp_group=self._cp)
            for ours, theirs in zip(student, teacher, strict=True)
        ]
        return (torch.stack(losses).mean(0) * weights).sum() / group_size(self._tp)  # a mean over all heads

    def _projection(self, index: int) -> Tensor | None:
        for name in (SHARED, self.pairs[index].name):
            if name in self.projections:
                return self.projections[name]
        return None

    # ---- in a checkpoint -----------------------------------------------------------------------------------------

    def sharded_state_dict(self, prefix: str) -> dict[str, ShardedTensor]:
        """Whole tensors; the balance and a shared projection are on every stage, and saved from the first."""
        data = parallel_state.get_data_parallel_rank(with_context_parallel=True)
        sharded = {}
        for name, tensor in self.state_dict(keep_vars=True).items():
            copy = self._stage if name.startswith("balance.") or name == f"projections.{SHARED}" else 0
            sharded[prefix + name] = make_sharded_tensor_for_checkpoint(
                tensor, prefix + name, replica_id=(copy, group_rank(self._tp), data)
            )
        return sharded

    # ---- riders --------------------------------------------------------------------------------------------------

    def riders_into(self, stage: int) -> dict[int, int]:
        """Pair -> channels, of the states that ride in the message from `stage` - 1 to `stage`."""
        return {i: self._widths[i] for i, stages in enumerate(self._stages) if min(stages) < stage <= max(stages)}

    def take_riders(self, columns: Tensor) -> dict[int, Tensor]:
        """The states that came with the message: [s, b, sum of channels] apart again."""
        riders = self.riders_into(self._stage)
        parts = columns.split(list(riders.values()), dim=-1)
        return {
            index: part if self._stages[index][0] < self._stages[index][1] else part.detach()
            for index, part in zip(riders, parts, strict=True)
        }

    def _require_travelling_states_can(self) -> None:
        config = self.student_config
        for pair, (of_student, of_teacher) in zip(self.pairs, self._stages, strict=True):
            where = (
                f"the states of distillation.hidden_states pair {pair.name} are on pipeline stages {of_student} "
                f"(student) and {of_teacher} (teacher)"
            )
            require(
                pair.place != "relation" or of_student == of_teacher,
                f"{where}; relations are compared within a stage only. Set distillation.hidden_states.pairs so that "
                "both layers are on one stage, or lower trainer.pipeline_model_parallel_size.",
            )
            recomputed = config.recompute_granularity == "full" or (
                config.recompute_granularity == "selective" and "layernorm" in (config.recompute_modules or [])
            )
            require(
                of_student >= of_teacher or not recomputed,
                f"{where}; the student's would have to travel, and activation recomputation "
                f"({config.recompute_granularity}) does not keep it. Map the layer to a teacher layer of stage "
                f"{of_student} or before, or recompute without it (core_attn, mlp).",
            )

    def _local_relation_heads(self, student: TransformerConfig, teacher: TransformerConfig) -> int:
        if "relation" not in self.config.places:
            return 0
        heads = self.config.relation_heads
        if heads == 0:
            heads = gcd(student.num_query_groups, teacher.num_query_groups)
        for name, model in (("student", student), ("teacher", teacher)):
            channels = model.kv_channels * model.num_query_groups
            require_divisible(
                f"the {name}'s key channels", channels, "distillation.hidden_states.relation_heads", heads
            )
        tp = group_size(self._tp)
        require_divisible("distillation.hidden_states.relation_heads", heads, "trainer.tensor_model_parallel_size", tp)
        return heads // tp


# ---- per token, in float32 (float64 for float64 states) --------------------------------------------------------------


def _wide(state: Tensor) -> Tensor:
    return state if state.dtype == torch.float64 else state.float()


def cosine_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """1 - cos of [..., h], as half the squared distance of the directions: exactly 0 for equal states."""
    return (F.normalize(student, dim=-1) - F.normalize(teacher, dim=-1)).square().sum(-1) / 2


def mean_squared_error(student: Tensor, teacher: Tensor) -> Tensor:
    return (student - teacher).square().mean(-1)


def smooth_l1(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared below a distance of 1, linear above."""
    return F.smooth_l1_loss(student, teacher, reduction="none").mean(-1)


STATE_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cosine": cosine_distance,
    "mse": mean_squared_error,
    "smooth_l1": smooth_l1,
}


def relation_divergence(student: Tensor, teacher: Tensor, *, heads: int, cp_group: ProcessGroup | None) -> Tensor:
    """KL(teacher || student) of each token's relation to the tokens up to it, a mean over this rank's relation heads.

    A relation is softmax(x x^T / sqrt(d)), with x the channels of all of this rank's attention heads, cut anew into
    `heads` pieces of d, so that both models have equally many.

    Args:
        student, teacher: [s/cp, b, heads of attention/tp, channels]; the student's receives gradient.
    Returns:
        [s/cp, b], in float32 or float64.
    Communicates: cp, one all-gather each; backward one reduce-scatter. Memory: [b, heads, s/cp, s] float32, a few.
    """
    require(
        student.dim() == 4,
        "distillation.hidden_states.places has relation, which does not keep packed documents apart. Remove it, or "
        "train without packing.",
    )
    size, rank = group_size(cp_group), group_rank(cp_group)
    positions = [positions_on(index, size, len(student), student.device) for index in range(size)]
    later = torch.cat(positions) > positions[rank].unsqueeze(1)  # [s/cp, s]
    ours, theirs = (_log_relation(states, heads, later, cp_group) for states in (student, teacher))
    divergence = (theirs.exp() * (theirs - ours).masked_fill(later, 0.0)).sum(-1)  # [b, heads, s/cp]
    return divergence.mean(1).t()


def _log_relation(states: Tensor, heads: int, later: Tensor, cp_group: ProcessGroup | None) -> Tensor:
    queries = _wide(states).flatten(2).unflatten(2, (heads, -1))
    keys = queries if group_size(cp_group) == 1 else gather_from_sequence_parallel_region(queries, group=cp_group)
    logits = torch.einsum("qbnd,kbnd->bnqk", queries, keys) * queries.shape[-1] ** -0.5
    return logits.masked_fill(later, float("-inf")).log_softmax(-1)


def positions_on(rank: int, size: int, length: int, device: torch.device) -> Tensor:
    """Positions of a context-parallel rank's `length` tokens: the rank-th of 2*size chunks, then its mirror image."""
    if size == 1:
        return torch.arange(length, device=device)
    chunks = torch.arange(length * size, device=device).chunk(2 * size)
    return torch.cat([chunks[rank], chunks[2 * size - 1 - rank]])


class _Attach(torch.autograd.Function):
    """Passes an activation on and gives a loss the gradient that Megatron's schedule gives the main loss."""

    @staticmethod
    def forward(ctx, activation: Tensor, loss: Tensor, config: TransformerConfig) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(loss)
        ctx.config = config
        return activation

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[no-untyped-def]
        (loss,) = ctx.saved_tensors
        scale = torch.ones_like(loss)
        if ctx.config.grad_scale_func is not None:
            scale = ctx.config.grad_scale_func(scale)
        return gradient, scale, None


def _require_trainable(config: TransformerConfig) -> None:
    require(
        config.calculate_per_token_loss,
        "distillation.hidden_states.enabled needs gradients that are a sum over tokens, divided by the global number "
        "of tokens. Build the student with calculate_per_token_loss=True.",
    )

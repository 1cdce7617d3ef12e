"""Forward passes without training: importance, held-out loss, logits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel as MCoreGPTModel

from minitron_nemo import platform
from minitron_nemo.config.distillation import DivergenceConfig
from minitron_nemo.config.importance import ImportanceConfig
from minitron_nemo.distillation.loss import cross_entropy_of_tokens, walk_of
from minitron_nemo.distillation.output_head import output_weight, without_logits
from minitron_nemo.divergence.fused_linear import OutputHead, fused_linear_divergence
from minitron_nemo.importance import ImportanceEstimator
from minitron_nemo.importance.baselines import random_scores, weight_magnitude
from minitron_nemo.parallel import (
    Groups,
    all_gather_shards,
    all_reduce_sum,
    broadcast_from,
    group_size,
    is_rank_zero,
)
from minitron_nemo.progress import Reporter
from minitron_nemo.resuming import OnePass, Sums, left_of
from minitron_nemo.runtime.step import forward_step, on_this_rank
from minitron_nemo.schedule import forward_only
from minitron_nemo.scores import Importance
from minitron_nemo.shape import ModelShape

R = TypeVar("R")


def run_forward(
    core: MCoreGPTModel,
    batches: Iterable[dict[str, torch.Tensor]],
    *,
    ahead: Callable[[dict[str, torch.Tensor]], None] = lambda _: None,
    before: Callable[[dict[str, torch.Tensor]], None] = lambda _: None,
    see: Callable[[dict[str, torch.Tensor], torch.Tensor], R] = lambda *_: None,  # type: ignore[assignment]
    label: str,
    total: int,
    one_pass: OnePass | None = None,
    sums: Sequence[Sums] = (),
) -> list[R]:
    """Run every micro-batch through the pipeline up to the output layer, which forms no logits.

    Args:
        batches: micro-batches of this data-parallel rank, tokens, labels, loss_mask, position_ids [b, s]; one is held
            at a time.
        ahead: called with each whole micro-batch before it enters the pipeline, on every rank; may run another model.
        before: called with each micro-batch (sliced over cp) before its forward, on every stage.
        see: called on the last stage with it and with what the output layer would read, [s/cp, b, h], with sequence
            parallelism [s/(cp*tp), b, h].
        total: number of micro-batches.
        one_pass: lets the run be stopped after any of them; None: it goes to its end.
        sums: what grows with them, to be kept then.
    Returns: on the last stage what `see` returned, of the micro-batches of this run; else nothing.
    Communicates: tp and cp inside the model, pp between stages; see `OnePass`.
    Raises: Interrupted: told to stop.
    """

    def forward(model: MCoreGPTModel, local: dict[str, Any]) -> torch.Tensor:
        before(local)
        return forward_step(model, local)

    results: list[R] = []
    with Reporter(label, total, show=is_rank_zero()) as reporter, without_logits(core):
        for done, batch in left_of(one_pass, batches, total, *sums):
            rows, seq_length = batch["tokens"].shape
            ahead(batch)
            passes = map(on_this_rank, [batch])
            results += forward_only(core, passes, forward, see, count=1, rows=rows, seq_length=seq_length)
            reporter.update(done)
    return results


def loss_sums(
    core: MCoreGPTModel,
    batches: Iterable[dict[str, torch.Tensor]],
    vocab_size: int,
    *,
    label: str,
    total: int,
    one_pass: OnePass | None = None,
    teacher: TeacherStates | None = None,
) -> list[torch.Tensor]:
    """On the last stage [loss sum in nats, tokens] float64 of each micro-batch's unmasked tokens; else nothing.

    Args:
        batches, label, total, one_pass: as those of `run_forward`.
        vocab_size: real entries of the padded vocabulary.
        teacher: of the same padded vocabulary; then the third of each is the sum of the forward KL to it, in nats.
    Communicates: as `run_forward`, of both models, and tp in the loss.
    """
    walk, found = walk_of(core, vocab_size), _Losses()

    def ahead(batch: dict[str, torch.Tensor]) -> None:
        if teacher is not None:
            teacher.read(batch)

    def see(local: dict[str, torch.Tensor], hidden: torch.Tensor) -> None:
        head = OutputHead(hidden, output_weight(core))
        per_token = [cross_entropy_of_tokens(head, local["labels"], walk)]
        if teacher is not None:
            said = OutputHead(teacher.hidden(), output_weight(teacher.core))
            per_token.append(fused_linear_divergence(head, said, DivergenceConfig(), **walk).divergence.t())
        mask = local["loss_mask"].double()
        loss, *divergence = (torch.where(mask != 0, values.double() * mask, 0.0).sum() for values in per_token)
        found.sums_of_each.append(torch.stack([loss, mask.sum(), *divergence]))

    run_forward(core, batches, ahead=ahead, see=see, label=label, total=total, one_pass=one_pass, sums=[found])
    return found.sums_of_each


class TeacherStates:
    """What a teacher's output layer would read of the micro-batch at hand, for as many students as ask."""

    def __init__(self, core: MCoreGPTModel, *, keep: bool = False) -> None:
        """
        Args:
            core: this rank's part of the teacher, on the students' layout.
            keep: read each micro-batch once and hold the answer on the host; the caller holds the micro-batches.
        """
        self.core = core
        self._kept: dict[int, list[torch.Tensor]] | None = {} if keep else None
        self._now: list[torch.Tensor] = []

    def read(self, batch: dict[str, torch.Tensor]) -> None:
        """Turn to a micro-batch. Communicates: as `run_forward`, where it was not read before."""
        if self._kept is None:
            self._now = self._run(batch)
            return
        if id(batch) not in self._kept:
            self._kept[id(batch)] = [hidden.cpu() for hidden in self._run(batch)]
        self._now = self._kept[id(batch)]

    def _run(self, batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        (rows, seq_length), passes = batch["tokens"].shape, map(on_this_rank, [batch])
        options = {"count": 1, "rows": rows, "seq_length": seq_length}
        with without_logits(self.core):
            return forward_only(self.core, passes, forward_step, lambda _, hidden: hidden, **options)

    def hidden(self) -> torch.Tensor:
        """As `run_forward` gives it to `see`; on the last stage."""
        return self._now[0].to(platform.device())


class _Losses:
    """`Sums` of the last stage: [loss sum, tokens] of each micro-batch."""

    def __init__(self) -> None:
        self.sums_of_each: list[torch.Tensor] = []

    def sums(self) -> dict[str, torch.Tensor]:
        return {"losses": torch.stack(self.sums_of_each)} if self.sums_of_each else {}

    def restore(self, sums: Mapping[str, torch.Tensor]) -> None:
        self.sums_of_each = list(sums["losses"].to(platform.device())) if sums else []


def summed(results: list[torch.Tensor], values: int = 2) -> torch.Tensor:
    """Sum [values] float64 over all ranks of what `loss_sums` gave, equal on every rank, on the host.

    Communicates: dp and cp (sum), pp (from the last stage).
    """
    sums = torch.stack(results).sum(0) if results else torch.zeros(values, dtype=torch.float64)
    sums = sums.to(platform.device())
    total = all_reduce_sum(sums, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    pp = Groups.from_megatron().pp
    return broadcast_from(total, source=group_size(pp) - 1, group=pp).cpu()


def estimate_importance(
    core: MCoreGPTModel,
    shape: ModelShape,
    batches: Iterable[dict[str, torch.Tensor]],
    config: ImportanceConfig,
    *,
    total: int = 0,
    seed: int = 0,
    origin: dict[str, Any] | None = None,
    label: str = "importance",
    one_pass: OnePass | None = None,
) -> Importance:
    """Width scores from one forward pass over `batches`, the same on every layout and equal on every rank.

    Args:
        batches: not read where `config.metric` is a baseline.
        seed: of random scores.
        label: of the progress line.
        one_pass: as in `run_forward`.
    Communicates: see `importance.estimate` and `importance.baselines`.
    """
    if config.metric == "random":
        return random_scores(shape, seed=seed)
    if config.metric == "weight_magnitude":
        return weight_magnitude(core, shape, Groups.from_megatron())
    with ImportanceEstimator(core, shape, Groups.from_megatron(), config) as estimator:
        run_forward(
            core,
            batches,
            before=lambda batch: estimator.sample(batch["loss_mask"]),
            label=label,
            total=total,
            one_pass=one_pass,
            sums=[estimator],
        )
        return estimator.finish(origin)


def last_logits(core: MCoreGPTModel, tokens: torch.Tensor) -> torch.Tensor:
    """Logits [b, s, v] float32 of `tokens` [b, s], equal on every rank.

    Communicates: tp inside the model and to gather the vocabulary, pp between stages and to hand the result round.
    """
    rows, seq_length = tokens.shape
    batch = {
        "tokens": tokens,
        "position_ids": torch.arange(seq_length).repeat(rows, 1),
        "loss_mask": torch.ones(rows, seq_length),
    }
    passes, see = map(on_this_rank, [batch]), lambda local, logits: logits
    local_logits = forward_only(core, passes, forward_step, see, count=1, rows=rows, seq_length=seq_length)
    groups = Groups.from_megatron()
    if local_logits:
        logits = torch.cat(all_gather_shards(local_logits[0].float(), group=groups.tp), dim=-1)
    else:
        vocab = core.vocab_size
        logits = torch.empty(rows, seq_length, vocab, device=platform.device())
    return broadcast_from(logits.contiguous(), source=group_size(groups.pp) - 1, group=groups.pp)

"""Log-likelihood of continuations on a model's layout, and whether each is what the model itself would say.

    continuations    tokens of which the last ones are scored      all of them on every rank
    logits           [b, s, v/tp] of the last stage

Communication: tp inside the model and in the loss; at the end cp and dp (sum) and pp (from the last stage).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel as MCoreGPTModel
from torch import Tensor

from minitron_nemo.checks import require
from minitron_nemo.divergence.cross_entropy import token_losses
from minitron_nemo.divergence.vocabulary import Vocabulary
from minitron_nemo.parallel import (
    Groups,
    all_reduce_max,
    all_reduce_sum,
    broadcast_from,
    group_rank,
    group_size,
    is_rank_zero,
)
from minitron_nemo.progress import Reporter
from minitron_nemo.runtime.step import forward_step, on_this_rank
from minitron_nemo.schedule import forward_only
from minitron_nemo.text.questions import Continuation, micro_batches


def likelihoods(
    core: MCoreGPTModel,
    continuations: Sequence[Continuation],
    *,
    rows: int,
    vocab_size: int | None = None,
    label: str = "likelihood",
    after: Callable[[int, int], None] = lambda done, total: None,
) -> list[tuple[float, bool]]:
    """Of each continuation the sum over its scored tokens in nats, and whether each was the likeliest; on every rank.

    Args:
        rows: b of the micro-batches.
        vocab_size: real entries of the padded vocabulary; None: all are real.
        label: for the progress line.
        after: called on every rank with the number of micro-batches done and of all.
    Communicates: as the module.
    Raises: ValueError: a likelihood is not finite.
    """
    groups = Groups.from_megatron()
    device = next(core.parameters()).device
    found = torch.zeros(2, len(continuations), dtype=torch.float64, device=device)  # nats, and tokens it would not say
    shares, total = shares_of(core, continuations, rows)

    def forward(model: MCoreGPTModel, local: dict[str, Any]) -> Tensor:
        return forward_step(model, {name: each for name, each in local.items() if name != "labels"})

    def see(local: dict[str, Any], logits: Tensor) -> Tensor:
        counts = local["loss_mask"] != 0
        said = _likeliest(logits, vocab_size, groups) == local["labels"]
        losses = token_losses(logits, local["labels"], vocab_size=vocab_size, tp_group=groups.tp).double()
        return torch.stack([-torch.where(counts, losses, 0.0).sum(1), (counts & ~said).sum(1).double()])

    with Reporter(label, total, show=is_rank_zero()) as reporter:
        for done, (places, batch) in enumerate(shares, start=1):
            batch_rows, seq_length = batch["tokens"].shape
            passes = map(on_this_rank, [batch])
            for sums in forward_only(core, passes, forward, see, count=1, rows=batch_rows, seq_length=seq_length):
                found[:, places] = sums[:, : len(places)]
            reporter.update(done)
            after(done, total)
    found = on_every_rank(found)
    require(
        bool(found.isfinite().all()),
        "The log-likelihood of a text is not finite (NaN or infinity). Check the checkpoint and its dtype with a "
        "held-out loss, or try trainer.precision=fp32.",
    )
    nats, unlike = found.tolist()
    return [(each, count == 0) for each, count in zip(nats, unlike, strict=True)]


def shares_of(
    core: MCoreGPTModel, continuations: Sequence[Continuation], rows: int
) -> tuple[Iterator[tuple[list[int], dict[str, Tensor]]], int]:
    """This data-parallel rank's micro-batches of `rows`, of a length that its layout splits, and how many there are.

    See `text.questions.micro_batches`.
    """
    groups, config = Groups.from_megatron(), core.config
    splits = config.tensor_model_parallel_size if config.sequence_parallel else 1
    if config.context_parallel_size > 1:
        splits *= 2 * config.context_parallel_size
    dp_rank, dp_size = group_rank(groups.dp), group_size(groups.dp)
    shares = micro_batches(continuations, rows, multiple_of=splits, dp_rank=dp_rank, dp_size=dp_size)
    return shares, -(-len(continuations) // (rows * dp_size))


def on_every_rank(found: Tensor) -> Tensor:
    """Likelihoods that each data- and context-parallel rank's last stage has of its share, 0 elsewhere; of all on all.

    Communicates: cp and dp (sum), pp (from the last stage).
    """
    groups = Groups.from_megatron()
    for group in (groups.cp, groups.dp):
        found = all_reduce_sum(found, group=group)
    return broadcast_from(found, source=group_size(groups.pp) - 1, group=groups.pp)


def _likeliest(logits: Tensor, vocab_size: int | None, groups: Groups) -> Tensor:
    """Index of the largest entry of logits [b, s, v/tp], of equal ones the first; [b, s] int64. Communicates: tp."""
    vocabulary = Vocabulary.split(logits.shape[-1], vocab_size, groups.tp)
    here = logits[..., : vocabulary.local].float()
    if vocabulary.local == 0:
        here = logits[..., :1].float().fill_(float("-inf"))
    largest, column = here.max(-1)
    everywhere = all_reduce_max(largest, group=groups.tp)
    nobody = torch.iinfo(torch.int64).max
    index = torch.where(largest == everywhere, column + vocabulary.first, nobody)
    return -all_reduce_max(-index, group=groups.tp)

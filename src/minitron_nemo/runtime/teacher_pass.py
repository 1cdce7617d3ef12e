"""The teacher's one pass over the data: forward only, on any layout, shard by shard.

Each data-parallel rank takes a shard at a time and runs its samples through its pipeline; where shards run out before
ranks do, a rank runs one of the others along, since experts on several ranks need all of them, and lets it go.

    hidden      what the output layer would read     [s/cp, b, h], [s/(cp*tp), b, h] with sequence parallel
    answer      of a micro-batch                     [b, s, k] and [b, s], whole on every rank of the last stage

Communication: what the model does; tp to choose the k tokens; cp, a gather of the answers; all ranks once, to agree on
which shards are missing, and once at the end.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel as MCoreGPTModel
from torch import Tensor

from minitron_nemo.distillation.output_head import output_weight, without_logits
from minitron_nemo.distillation.stored_teacher import top_k_of_head
from minitron_nemo.divergence.fused_linear import OutputHead
from minitron_nemo.divergence.top_k import TopKTeacher
from minitron_nemo.parallel import (
    Groups,
    all_gather_shards,
    barrier,
    group_rank,
    group_size,
    is_rank_zero,
    rank_zero_works,
)
from minitron_nemo.progress import Reporter
from minitron_nemo.runtime.step import forward_step, on_this_rank
from minitron_nemo.schedule import forward_only
from minitron_nemo.text.teacher_store import Shards, StoreFormat
from minitron_nemo.text.windows import Windows


@torch.no_grad()
def write_missing(core: MCoreGPTModel, windows: Windows, shards: Shards, *, micro_batch_size: int) -> None:
    """Write the shards that are not there yet. Every rank calls.

    Args:
        core: this rank's part of the teacher.
        windows: the text of the samples.
    """
    groups = Groups.from_megatron()
    mine, ranks = group_rank(groups.dp), group_size(groups.dp)
    missing = rank_zero_works(shards.missing)
    rounds = [missing[start : start + ranks] for start in range(0, len(missing), ranks)]
    steps = [-(-max(len(shards.samples(shard)) for shard in each) // micro_batch_size) for each in rounds]
    writes = parallel_state.is_pipeline_last_stage() and group_rank(groups.tp) == group_rank(groups.cp) == 0
    with Reporter("teacher logits", sum(steps), show=is_rank_zero()) as reporter, without_logits(core):
        done = itertools.count(1)
        for taken, micro_batches in zip(rounds, steps, strict=True):
            samples = shards.samples(taken[min(mine, len(taken) - 1)])
            records = _records_of(
                core,
                _micro_batches(windows, samples, micro_batch_size, micro_batches),
                shards.format,
                groups,
                rows=micro_batch_size,
                micro_batches=micro_batches,
                before=lambda: reporter.update(next(done), f"shards to write: {len(missing)}"),
            )
            if writes and mine < len(taken):
                shards.write(taken[mine], np.concatenate(records)[: len(samples)])
    barrier()


def _records_of(
    core: MCoreGPTModel,
    batches: Iterator[dict[str, Tensor]],
    format: StoreFormat,
    groups: Groups,
    *,
    rows: int,
    micro_batches: int,
    before: Callable[[], None],
) -> list[np.ndarray]:
    """Records [rows] of every micro-batch, on the last stage; none elsewhere. Communicates: pp, tp, cp."""

    def forward(model: MCoreGPTModel, local: dict[str, Any]) -> Tensor:
        before()
        return forward_step(model, local)

    def records(local: dict[str, Any], hidden: Tensor) -> np.ndarray:
        answer = top_k_of_head(
            OutputHead(hidden, output_weight(core)),
            format.divergence,
            tp_group=groups.tp,
            vocab_size=format.vocab_size,
            sequence_parallel=core.config.sequence_parallel,
        )
        return format.encode(_gather_over_cp(answer, local["position_ids"], groups))

    passes = map(on_this_rank, batches)
    options = {"count": micro_batches, "rows": rows, "seq_length": format.seq_length}
    return forward_only(core, passes, forward, records, **options)


def _gather_over_cp(local: TopKTeacher, position_ids: Tensor, groups: Groups) -> TopKTeacher:
    """[b, s, k] in the order of the tokens, of [s/cp, b, k] at these positions [b, s/cp]."""
    assert local.log_tail_mass is not None
    order = torch.cat(all_gather_shards(position_ids[0], group=groups.cp)).argsort()
    indices, log_probs, tail = (
        torch.cat(all_gather_shards(part.contiguous(), group=groups.cp))[order].transpose(0, 1)
        for part in (local.indices, local.log_probs, local.log_tail_mass)
    )
    return TopKTeacher(indices, log_probs, tail, local.temperature)


def _micro_batches(windows: Windows, samples: range, rows: int, micro_batches: int) -> Iterator[dict[str, Tensor]]:
    """The samples, `rows` at a time; the last stands in where they run out."""
    for first in range(0, rows * micro_batches, rows):
        texts = [windows.read(samples[min(place, len(samples) - 1)]) for place in range(first, first + rows)]
        batch = {key: torch.stack([text[key] for text in texts]) for key in texts[0]}
        del batch["labels"]  # with them the model would return a loss
        yield batch

"""The teacher's one pass over the data: forward only, on any layout, shard by shard.

Each data-parallel rank takes a shard at a time and runs its samples through its pipeline; where shards run out before
ranks do, a rank runs one of the others along, since experts on several ranks need all of them, and lets it go.

    hidden      what the output layer would read     [s/cp, b, h], [s/(cp*tp), b, h] with sequence parallel
    answer      of a micro-batch                     [b, s, ...], whole on every rank of the last stage

Communication: what the model does; tp to choose tokens or draw them; cp, a gather of the answers; all ranks once, to
agree on which shards are missing, once at the end, and now and then to hear whether to stop.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NoReturn

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel as MCoreGPTModel
from torch import Tensor

from minitron_nemo.checks import Interrupted
from minitron_nemo.distillation.output_head import output_weight, without_logits
from minitron_nemo.distillation.stored_teacher import draws_of_head, top_k_of_head
from minitron_nemo.divergence.fused_linear import OutputHead
from minitron_nemo.divergence.known_teacher import KnownTeacher
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
from minitron_nemo.runtime.step import OFFSETS, forward_step, on_this_rank
from minitron_nemo.schedule import forward_only
from minitron_nemo.stopping import Stop
from minitron_nemo.text.teacher_records import SampledFormat, StoreFormat
from minitron_nemo.text.teacher_store import Shards
from minitron_nemo.text.windows import Windows


@torch.no_grad()
def write_missing(core: MCoreGPTModel, windows: Windows, shards: Shards, *, micro_batch_size: int) -> None:
    """Write the shards that are not there yet. Every rank calls.

    Args:
        core: this rank's part of the teacher.
        windows: the text of the samples.
    Raises: Interrupted: told to stop; shards that were begun are kept as far as they are.
    """
    groups = Groups.from_megatron()
    mine, ranks = group_rank(groups.dp), group_size(groups.dp)
    left = rank_zero_works(lambda: {shard: shards.samples_left(shard) for shard in shards.missing()})
    missing = list(left)
    rounds = [missing[start : start + ranks] for start in range(0, len(missing), ranks)]
    steps = [-(-max(len(left[shard]) for shard in each) // micro_batch_size) for each in rounds]
    writes = parallel_state.is_pipeline_last_stage() and group_rank(groups.tp) == group_rank(groups.cp) == 0
    stages = group_size(groups.pp)
    at_once = 1 if stages == 1 else _AT_ONCE * stages
    stop, done = Stop(), 0
    with Reporter("teacher logits", sum(steps), show=is_rank_zero()) as reporter, without_logits(core):
        for taken, micro_batches in zip(rounds, steps, strict=True):
            shard = taken[min(mine, len(taken) - 1)]
            samples, owns = left[shard], writes and mine < len(taken)
            begun = shards.begun(shard) if owns else []
            records, whole = list(begun), len(begun) + len(samples)
            batches = _micro_batches(windows, shards.format, samples, micro_batch_size, micro_batches)
            for first in range(0, micro_batches, at_once):
                count = min(at_once, micro_batches - first)
                options = {"rows": micro_batch_size, "micro_batches": count}
                records += _records_of(core, batches, shards.format, groups, **options)
                done += count
                reporter.update(done, f"shards to write: {len(missing)}")
                told = done < sum(steps) and stop.asked()
                if owns and (told or first + count == micro_batches):  # the last sample stands in where they run out
                    shards.write(shard, records[:whole])
                if told:
                    _leave(shards, f"stopped after {done} of {sum(steps)} micro-batches, as it was asked to")
    barrier()


_AT_ONCE = 16  # micro-batches a stage between two questions, where a question empties the pipeline


def _leave(shards: Shards, message: str) -> NoReturn:
    """Communicates: all ranks. Raises: Interrupted."""
    barrier()  # all have written
    raise Interrupted(f"{message}; what is there is kept in {shards.directory}. The same command goes on there.")


def _records_of(
    core: MCoreGPTModel,
    batches: Iterator[dict[str, Tensor]],
    format: StoreFormat,
    groups: Groups,
    *,
    rows: int,
    micro_batches: int,
) -> list[bytes]:
    """Records of the next micro-batches' samples, on the last stage; none elsewhere. Communicates: pp, tp, cp."""

    def records(local: dict[str, Any], hidden: Tensor) -> list[bytes]:
        answer = _answer(OutputHead(hidden, output_weight(core)), local, format, core, groups)
        return format.encode(_gather_over_cp(answer, local["position_ids"], groups))

    passes = map(on_this_rank, batches)
    options = {"count": micro_batches, "rows": rows, "seq_length": format.seq_length}
    return list(itertools.chain.from_iterable(forward_only(core, passes, forward_step, records, **options)))


def _answer(
    head: OutputHead, local: dict[str, Any], format: StoreFormat, core: MCoreGPTModel, groups: Groups
) -> KnownTeacher:
    """[s/cp, b, ...]. Communicates: tp."""
    walk: dict[str, Any] = {
        "tp_group": groups.tp,
        "vocab_size": format.vocab_size,
        "sequence_parallel": core.config.sequence_parallel,
    }
    if isinstance(format, SampledFormat):
        return draws_of_head(head, local[OFFSETS].t(), format.draws, format.divergence, **walk)
    return top_k_of_head(head, format.divergence, **walk)


def _gather_over_cp(local: KnownTeacher, position_ids: Tensor, groups: Groups) -> KnownTeacher:
    """[b, s, ...] in the order of the tokens, of [s/cp, b, ...] at these positions [b, s/cp]."""
    order = torch.cat(all_gather_shards(position_ids[0], group=groups.cp)).argsort()
    return local.each(
        lambda part: torch.cat(all_gather_shards(part.contiguous(), group=groups.cp))[order].transpose(0, 1)
    )


def _micro_batches(
    windows: Windows, format: StoreFormat, samples: range, rows: int, micro_batches: int
) -> Iterator[dict[str, Tensor]]:
    """The samples, `rows` at a time; the last stands in where they run out."""
    for first in range(0, rows * micro_batches, rows):
        numbers = [samples[min(place, len(samples) - 1)] for place in range(first, first + rows)]
        texts = [windows.read(number) for number in numbers]
        batch = {key: torch.stack([text[key] for text in texts]) for key in texts[0]}
        del batch["labels"]  # with them the model would return a loss
        if isinstance(format, SampledFormat):
            batch[OFFSETS] = torch.stack([torch.from_numpy(format.offsets(number)) for number in numbers])
        yield batch

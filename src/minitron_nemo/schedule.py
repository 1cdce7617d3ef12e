"""Megatron's pipeline schedule, forward only: the one way in which models are run without being trained.

Every stage of the pipeline takes part in every pass and hands its activation on; the last one has the model's output.

Communication: what the model does by itself (tp, cp, ep), and pp between stages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

T = TypeVar("T")
R = TypeVar("R")


@torch.no_grad()
def forward_only(
    core: GPTModel,
    passes: Iterable[T],
    forward: Callable[[GPTModel, T], Tensor],
    see: Callable[[T, Tensor], R],
    *,
    count: int,
    rows: int,
    seq_length: int,
) -> list[R]:
    """Take every pass through the pipeline, stages overlapping.

    Args:
        core: this rank's part of the model.
        passes: what each pass is about, most often a micro-batch; `count` of them are taken, one before each forward.
        forward: runs this rank's part: the model's output on the last stage, the passing activation elsewhere.
        see: called with the pass and the model's output on the last stage.
        rows, seq_length: b and s of every pass, over all ranks of context and sequence parallelism.
    Returns: what `see` returned, in order, on the last stage; empty elsewhere.
    Communicates: as the module.
    """

    def step(upcoming: Iterator[T], model: GPTModel) -> tuple[Tensor, Callable[..., R]]:
        now = next(upcoming)
        return forward(model, now), lambda output, non_loss_data: see(now, output)

    seen: list[R] = get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=iter(passes),
        model=[core],
        num_microbatches=count,
        seq_length=seq_length,
        micro_batch_size=rows,
        forward_only=True,
        collect_non_loss_data=True,
    )
    return seen

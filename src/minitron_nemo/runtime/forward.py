"""Forward passes without training: importance, held-out loss, logits. Megatron's pipeline schedule drives them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel as MCoreGPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func

from minitron_nemo import platform
from minitron_nemo.config.importance import ImportanceConfig
from minitron_nemo.config.trainer import Loading
from minitron_nemo.importance import Importance, ImportanceEstimator
from minitron_nemo.importance.baselines import random_scores, weight_magnitude
from minitron_nemo.nemo.models import build_core, data_step, forward_step, nemo_config
from minitron_nemo.parallel import Groups, all_gather_shards, all_reduce_sum, broadcast_from, group_size
from minitron_nemo.progress import Reporter
from minitron_nemo.runtime.distributed_checkpoint import load_weights
from minitron_nemo.runtime.model_artifact import ModelInput
from minitron_nemo.shape import ModelShape


def new_core(shape: ModelShape, trainer: Loading, *, dtype: torch.dtype | None = None) -> MCoreGPTModel:
    """This rank's part of a model of `shape` on the trainer's layout: random weights in `dtype` (the trainer's)."""
    dtype = dtype or platform.dtype_of(trainer.precision)
    config = nemo_config(
        shape,
        tensor_model_parallel_size=trainer.tensor_model_parallel_size,
        pipeline_model_parallel_size=trainer.pipeline_model_parallel_size,
        context_parallel_size=trainer.context_parallel_size,
        expert_model_parallel_size=trainer.expert_model_parallel_size,
        expert_tensor_parallel_size=trainer.tensor_model_parallel_size,
        sequence_parallel=trainer.sequence_parallel,
        pipeline_dtype=dtype,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
    )
    return build_core(config, shape).to(device=platform.device(), dtype=dtype).eval()


def open_core(source: ModelInput, trainer: Loading, *, dtype: torch.dtype | None = None) -> MCoreGPTModel:
    """This rank's part of the model at `source`, ready for forward passes."""
    core = new_core(source.shape, trainer, dtype=dtype)
    load_weights(core, source.path)
    return core


@torch.no_grad()
def run_forward(
    core: MCoreGPTModel,
    batches: Iterable[dict[str, torch.Tensor]],
    *,
    before: Callable[[dict[str, torch.Tensor]], None] | None = None,
    label: str,
    total: int,
) -> list[torch.Tensor]:
    """Run every micro-batch through the pipeline.

    Args:
        batches: micro-batches of this data-parallel rank, tokens, labels, loss_mask, position_ids [b, s].
        before: called with each micro-batch (sliced over cp) before its forward, on every stage.
        total: number of micro-batches, for the progress line.
    Returns: on the last stage [loss sum in nats, tokens] float64 of each micro-batch's unmasked tokens; else nothing.
    Communicates: tp and cp inside the model, pp between stages.
    """
    results: list[torch.Tensor] = []
    first = dist.get_rank() == 0
    with Reporter(label, total, show=first) as reporter:
        for done, batch in enumerate(batches, start=1):
            results += _one(core, batch, before)
            reporter.update(done)
    return results


def _one(core: MCoreGPTModel, batch: dict[str, torch.Tensor], before: Any) -> list[torch.Tensor]:
    def step(iterator: Iterator[Any], model: MCoreGPTModel) -> tuple[torch.Tensor, Callable]:
        local = data_step(iterator)
        if before is not None:
            before(local)

        def sums(losses: torch.Tensor, non_loss_data: bool) -> torch.Tensor:
            mask = local["loss_mask"].double()
            return torch.stack([(losses.double() * mask).sum(), mask.sum()])

        return forward_step(model, local), sums

    rows, seq_length = batch["tokens"].shape
    return get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=iter([batch]),
        model=[core],
        num_microbatches=1,
        seq_length=seq_length,
        micro_batch_size=rows,
        forward_only=True,
        collect_non_loss_data=True,
    )


def mean_loss(results: list[torch.Tensor]) -> tuple[float, int]:
    """Nats per token and number of tokens over all ranks, from `run_forward`'s results, equal on every rank.

    Communicates: dp and cp (sum), pp (from the last stage).
    """
    sums = torch.stack(results).sum(0) if results else torch.zeros(2, dtype=torch.float64)
    sums = sums.to(platform.device())
    total = all_reduce_sum(sums, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    pp = Groups.from_megatron().pp
    total = broadcast_from(total, source=group_size(pp) - 1, group=pp)
    return float(total[0] / total[1]), int(total[1])


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
) -> Importance:
    """Width scores from one forward pass over `batches`, the same on every layout and equal on every rank.

    Args:
        batches: not read where `config.metric` is a baseline.
        seed: of random scores.
        label: of the progress line.
    Communicates: see `importance.estimate` and `importance.baselines`.
    """
    if config.metric == "random":
        return random_scores(shape, seed=seed)
    if config.metric == "weight_magnitude":
        return weight_magnitude(core, shape, Groups.from_megatron())
    with ImportanceEstimator(core, shape, Groups.from_megatron(), config) as estimator:
        run_forward(core, batches, before=lambda batch: estimator.sample(batch["loss_mask"]), label=label, total=total)
        return estimator.finish(origin)


@torch.no_grad()
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

    def step(iterator: Iterator[Any], model: MCoreGPTModel) -> tuple[torch.Tensor, Callable]:
        local = data_step(iterator)
        return forward_step(model, local), lambda logits, non_loss_data: logits

    local_logits = get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=iter([batch]),
        model=[core],
        num_microbatches=1,
        seq_length=seq_length,
        micro_batch_size=rows,
        forward_only=True,
        collect_non_loss_data=True,
    )
    groups = Groups.from_megatron()
    if local_logits:
        logits = torch.cat(all_gather_shards(local_logits[0].float(), group=groups.tp), dim=-1)
    else:
        vocab = core.vocab_size
        logits = torch.empty(rows, seq_length, vocab, device=platform.device())
    return broadcast_from(logits.contiguous(), source=group_size(groups.pp) - 1, group=groups.pp)

"""How evenly the routers of a mixture spread the tokens: the loss that Megatron-core minimises beside a run's own.

Its routers add `moe_aux_loss_coeff` x their loss to the gradients, not to the loss that a run reports, and keep the
values in a tracker of the process, which nobody empties. Here they are read once a step.
"""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from megatron.core.transformer.moe.moe_utils import clear_aux_losses_tracker, get_moe_layer_wise_logging_tracker

from minitron_nemo import platform
from minitron_nemo.parallel import all_reduce_sum, world
from minitron_nemo.shape import ModelShape

LOAD_BALANCING = "load_balancing_loss"
"""Megatron-core's name of it."""


class LoadBalancing(pl.Callback):
    """Holds the last step's load-balancing loss, 1 where every expert gets as many tokens: without its coefficient, the
    mean over layers of experts, micro-batches and data-parallel ranks, as in Megatron-LM's own logs."""

    def __init__(self, shape: ModelShape, *, micro_batches: int) -> None:
        """
        Args:
            micro_batches: of a step, of all data-parallel ranks.
        """
        self._terms = micro_batches * sum(shape.has_experts(layer) for layer in range(shape.num_layers))
        self.of_last_step = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        clear_aux_losses_tracker()  # of an earlier run in this process

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Communicates: over all ranks, one all-reduce of a number."""
        kept = get_moe_layer_wise_logging_tracker().get(LOAD_BALANCING)  # none on a stage without experts
        mine = torch.zeros((), device=platform.device()) if kept is None else kept["values"].sum()
        self.of_last_step = float(all_reduce_sum(mine, group=world())) / self._terms
        clear_aux_losses_tracker()

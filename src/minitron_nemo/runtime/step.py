"""One micro-batch on this rank, and one step of a model over it: what training and every forward pass share.

    batch    tokens, labels, loss_mask, position_ids                        [b, s]      as the data gives it
    local    the same on this rank's device, its share of the sequence      [b, s/cp]
    output   loss of each token, or logits where there are no labels        [b, s/cp], [b, s/cp, v/tp]

No attention mask is made: transformer-engine and `attention.FusedCausalAttention` are causal by themselves.

Communication: tp and cp inside the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from megatron.core import parallel_state
from megatron.core.utils import get_batch_on_this_cp_rank
from torch import Tensor

from minitron_nemo.by_source import SOURCE
from minitron_nemo.distillation.loss import Loss
from minitron_nemo.distillation.stored_teacher import StoredTeacher
from minitron_nemo.text.documents import DOCUMENT_STARTS, documents_of, documents_on_rank

OFFSETS = "teacher_offsets"
"""Key of a batch that holds where the draws of a teacher's distribution begin, [b, s]."""


def on_this_rank(batch: Mapping[str, Tensor]) -> dict[str, Any]:
    """One micro-batch on this rank's device: tokens, labels, loss_mask, position_ids, each [b, s/cp].

    Where the teacher's answers are stored or drawn, these or the draws' OFFSETS too, [b, s/cp, ...]; where samples hold
    several documents that do not see each other, also packed_seq_params; where text is blended, SOURCE [b].
    """
    wanted = {"tokens", "position_ids", "labels", "loss_mask", OFFSETS, *StoredTeacher.reads}
    on_device = {key: value.cuda(non_blocking=True) for key, value in batch.items() if key in wanted}
    if DOCUMENT_STARTS in batch:
        local = documents_on_rank(
            on_device,
            documents_of(batch[DOCUMENT_STARTS]),
            rank=parallel_state.get_context_parallel_rank(),
            size=parallel_state.get_context_parallel_world_size(),
        )
    else:
        local = get_batch_on_this_cp_rank(on_device)
    if SOURCE in batch:
        local[SOURCE] = batch[SOURCE].long().cuda(non_blocking=True)
    return local


def data_step(dataloader_iter: Iterator[Any]) -> dict[str, Any]:
    """`on_this_rank` of a data loader's next micro-batch."""
    batch = next(dataloader_iter)
    return on_this_rank(batch[0] if isinstance(batch, tuple) else batch)


def forward_step(model: Any, batch: Mapping[str, Any]) -> Tensor:
    """Per-token loss [b, s/cp] on the last stage (logits without labels), the passing activation on the others."""
    output: Tensor = model(**model_inputs(batch))
    return output


def distillation_step(model: Any, batch: Mapping[str, Any]) -> Tensor | Loss:
    """As `forward_step`, of a model that forms its gradients with the loss and must know how tokens are weighed."""
    stored = {key: batch[key] for key in StoredTeacher.reads if key in batch}
    output: Tensor | Loss = model(
        **model_inputs(batch), loss_mask=batch["loss_mask"], source=batch.get(SOURCE), **stored
    )
    return output


def model_inputs(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a Megatron-core model's forward pass."""
    return {
        "input_ids": batch["tokens"],
        "position_ids": batch["position_ids"],
        "attention_mask": None,
        "labels": batch.get("labels"),
        **({"packed_seq_params": batch["packed_seq_params"]} if "packed_seq_params" in batch else {}),
    }

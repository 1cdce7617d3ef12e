"""Cross-entropy on labels from a model's whole logits, over the entries of the vocabulary that are tokens.

    logits    [b, s, v/tp] or [s, b, v/tp]    v padded; rows from vocab_size on are padding and do not exist for a loss
    loss      of each token, in nats          [b, s] or [s, b] float32

Megatron-core's own takes all rows for tokens: what a model's loss is would go by `make_vocab_size_divisible_by`.

Communication: tp, in Megatron-core's cross-entropy.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from megatron.core import tensor_parallel
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from minitron_nemo.divergence.vocabulary import Vocabulary
from minitron_nemo.parallel import ProcessGroup


def token_losses(logits: Tensor, labels: Tensor, *, vocab_size: int | None, tp_group: ProcessGroup | None) -> Tensor:
    """Cross-entropy of each token, shaped as the labels: 0 for a negative label (ignored), infinite for one that is no
    token; neither has a gradient.

    Args:
        logits: receive gradient; overwritten.
        vocab_size: real entries of the padded vocabulary; None: all are real.
        tp_group: Megatron's tensor-parallel group.
    Communicates: tp, three all-reduces of a value a token.
    """
    return _over_tokens(tensor_parallel.vocab_parallel_cross_entropy, logits.contiguous(), labels, vocab_size, tp_group)


def leave_out_padding(core: GPTModel, vocab_size: int | None) -> None:
    """From now on a model's own loss, in whatever kernel its config asks for, is over the real entries alone."""
    if vocab_size in (None, core.vocab_size):
        return
    own = core.compute_language_model_loss

    def loss(labels: Tensor, logits: Tensor) -> Tensor:
        def swapped(logits_sbv: Tensor, labels_sb: Tensor) -> Tensor:
            return own(labels_sb.t(), logits_sbv).t()

        return _over_tokens(swapped, logits, labels.t(), vocab_size, core.pg_collection.tp).t().contiguous()

    core.compute_language_model_loss = loss


def _over_tokens(
    cross_entropy: Callable[[Tensor, Tensor], Tensor],
    logits: Tensor,
    labels: Tensor,
    vocab_size: int | None,
    tp_group: ProcessGroup | None,
) -> Tensor:
    vocabulary = Vocabulary.split(logits.shape[-1], vocab_size, tp_group)
    with torch.no_grad():  # exp(-inf) is 0, and so is the gradient there: autograd need not know
        logits.detach()[..., vocabulary.local :] = float("-inf")
    losses = cross_entropy(logits, labels)
    of_no_token = torch.where(labels < 0, 0.0, float("inf")).to(losses.dtype)
    return torch.where((labels >= 0) & (labels < vocabulary.size), losses, of_no_token)

"""The divergence from the two models' last hidden states, without the logits of more than a few tokens at a time.

    hidden      student and teacher, after the final layernorm    [s/cp, b, h], [s/(cp*tp), b, h] with sequence parallel
    weight      of the output layers (tied: of the embedding)     [v/tp, h]
    logits      of one chunk of tokens, both models               [n, v/tp]       in the dtype of hidden
    divergence  one value per token                               [s/cp, b]       float32, equal on every tp rank

Chunk by chunk, both output layers are applied, and the rows of logits go through `divergence.row_losses`, the same
arithmetic as that of whole logits. There are two ways to a gradient:

    token_weights given   the weighted sum is the loss. The gradients of hidden and weight are formed in the forward
                          pass, while the chunk's logits are there: 4 matrix products in all.
    not given             values per token, with any gradient to come; the backward pass forms the logits again: 6.

Memory beyond inputs and returned gradients: the logits of a chunk (LOGITS_BYTES), what `row_losses` takes of them at a
time in float32 (token_rows.py; forward KL has three such pieces at once, others up to seven), 4 bytes x v/tp x h where
the weight's gradient is summed up over chunks in more precision than it is returned in, and with sequence parallelism
the gathered hidden states. Where the weight's gradient goes to a float32 `main_grad`, the second way sums it up there
and needs nothing of its size; in the first it waits from the forward to the backward pass for its factor.

Communication: tp; forward that of `row_losses` per chunk and with sequence parallelism a gather of the hidden states;
backward a sum of the student hidden's gradient, which the ranks' vocabularies share (all-reduce, or reduce-scatter).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region, gather_from_sequence_parallel_region
from torch import Tensor
from torch.autograd.function import once_differentiable

from minitron_nemo.checks import require
from minitron_nemo.config.distillation import TOP_K, DivergenceConfig
from minitron_nemo.divergence.agreement import top_1_agreement
from minitron_nemo.divergence.known_teacher import KnownTeacher
from minitron_nemo.divergence.streamed import row_losses, top_k_of_rows
from minitron_nemo.divergence.token_rows import Rows, TeacherRows, even_slices
from minitron_nemo.divergence.vocabulary import Reduced, Vocabulary
from minitron_nemo.parallel import ProcessGroup, group_size

LOGITS_BYTES = 256 << 20
"""Of one chunk, both models: at a vocabulary of 128k, 512 tokens in bf16. Fewer tokens make thin matrix products."""


class OutputHead(NamedTuple):
    """What a model's logits are made of: hidden @ weight.T"""

    hidden: Tensor
    """[s, b, h], or [s/tp, b, h] under sequence parallelism"""
    weight: Tensor
    """[v/tp, h], without bias"""


class FusedLosses(NamedTuple):
    """Values per token, as those of `divergence.TokenLosses`."""

    divergence: Tensor
    """[s, b]"""
    cross_entropy: Tensor | None
    """[s, b]; None without labels"""
    agreement: Tensor | None
    """[s, b], constant; None where it was not asked for"""


class WeightedLoss(NamedTuple):
    """The loss, and what it is made of."""

    total: Tensor
    """scalar float32, differentiable, once"""
    divergence: Tensor
    """[s, b], detached"""
    cross_entropy: Tensor | None
    """[s, b], detached; None without labels"""
    agreement: Tensor | None
    """[s, b], constant; None where it was not asked for"""


def fused_linear_loss(
    student: OutputHead,
    teacher: OutputHead | KnownTeacher,
    config: DivergenceConfig,
    token_weights: Tensor,
    *,
    tp_group: ProcessGroup | None,
    vocab_size: int | None = None,
    labels: Tensor | None = None,
    cross_entropy_weight: float = 0.0,
    sequence_parallel: bool = False,
    gradient_accumulation_fusion: bool = False,
    with_agreement: bool = False,
    tokens_per_chunk: int | None = None,
) -> WeightedLoss:
    """sum over tokens of token_weights * (divergence + cross_entropy_weight * cross_entropy), with 4 matrix products.

    Args:
        student: receives gradient, the weight in its dtype, summed up over the chunks in float32. Both gradients are
            formed here; the backward pass multiplies them by the gradient of the total.
        teacher: constant; also what was stored of it, of [s, b].
        token_weights: [s, b], the loss mask, or it divided by its sum; constant.
        tp_group: None where the vocabulary is whole.
        vocab_size: real entries of the whole vocabulary; rows of the weights from there on are padding. None: all real.
        labels: [s, b]; a negative one has cross-entropy 0.
        sequence_parallel: hidden states arrive split over tp along the sequence, and so does their gradient.
        gradient_accumulation_fusion: add the weight's gradient to `weight.main_grad`, where it has one, as Megatron's
            ColumnParallelLinear does under the option of this name.
        with_agreement: say of each token whether both models find the same token likeliest; see agreement.py.
        tokens_per_chunk: at least 1; None: as many as LOGITS_BYTES allows.
    Returns: s of all tp ranks, equal on every rank of `tp_group`.
    Communicates: see the module's text.
    Raises: ValueError: the two models' tokens or vocabularies differ, or a weight has no labels to weigh.
    """
    of_rows = (tp_group, vocab_size, sequence_parallel, with_agreement, tokens_per_chunk)
    job, inputs = _prepare(student, teacher, config, labels, *of_rows)
    require(
        token_weights.shape == job.tokens,
        f"token_weights {list(token_weights.shape)} are not one a token {list(job.tokens)}, [s, b].",
    )
    require(
        cross_entropy_weight == 0 or labels is not None,
        f"cross_entropy_weight={cross_entropy_weight} needs labels; give them, or set it to 0.",
    )
    rows = [token_weights.detach().reshape(-1)]
    weights = torch.stack(rows + [cross_entropy_weight * row for row in rows if labels is not None])
    total, losses = _Weighted.apply(*inputs, weights, job, gradient_accumulation_fusion)
    return WeightedLoss(total, *job.per_token(losses))


def fused_linear_divergence(
    student: OutputHead,
    teacher: OutputHead | KnownTeacher,
    config: DivergenceConfig,
    *,
    tp_group: ProcessGroup | None,
    vocab_size: int | None = None,
    labels: Tensor | None = None,
    sequence_parallel: bool = False,
    gradient_accumulation_fusion: bool = False,
    with_agreement: bool = False,
    tokens_per_chunk: int | None = None,
) -> FusedLosses:
    """`divergence.divergence` of student.hidden @ student.weight.T and teacher.hidden @ teacher.weight.T.

    The arguments are those of `fused_linear_loss`. The values [s, b] are differentiable, with any gradient; the
    backward pass forms the logits again, and communicates nothing for it.
    """
    of_rows = (tp_group, vocab_size, sequence_parallel, with_agreement, tokens_per_chunk)
    job, inputs = _prepare(student, teacher, config, labels, *of_rows)
    return FusedLosses(*job.per_token(_PerToken.apply(*inputs, job, gradient_accumulation_fusion)))


# ---- what both ways share --------------------------------------------------------------------------------------------


@dataclass
class _Job:
    """What a walk over the chunks needs beside tensors."""

    config: DivergenceConfig
    vocabulary: Vocabulary
    tokens: torch.Size
    """[s, b]"""
    tokens_per_chunk: int
    stored: KnownTeacher | None
    agreement: list[Tensor] | None
    """Of each chunk, once its logits were there; None: not asked for."""

    def chunks(self) -> list[slice]:
        return list(even_slices(self.tokens.numel(), self.tokens_per_chunk))

    def per_token(self, losses: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        divergence, *cross_entropy = (row.view(self.tokens) for row in losses)
        agreement = torch.cat(self.agreement).view(self.tokens) if self.agreement is not None else None
        return divergence, cross_entropy[0] if cross_entropy else None, agreement


_Inputs: TypeAlias = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]
"""Student hidden [n, h] and weight, teacher hidden and weight or None, labels [n] or None."""


def _prepare(
    student: OutputHead,
    teacher: OutputHead | KnownTeacher,
    config: DivergenceConfig,
    labels: Tensor | None,
    tp_group: ProcessGroup | None,
    vocab_size: int | None,
    sequence_parallel: bool,
    with_agreement: bool,
    tokens_per_chunk: int | None,
) -> tuple[_Job, _Inputs]:
    """Communicates: tp, with sequence parallelism, a gather of the hidden states."""
    hidden, weight = _for_autocast(*student)
    if group_size(tp_group) > 1:
        # Backward: the sum over the ranks' parts of the vocabulary.
        if sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True, group=tp_group)
        else:
            hidden = copy_to_tensor_model_parallel_region(hidden, group=tp_group)
    tokens = hidden.shape[:-1]
    stored = teacher if isinstance(teacher, KnownTeacher) else None
    teacher_hidden = teacher_weight = None
    if isinstance(teacher, KnownTeacher):
        teacher.require_fits(tokens, config)
    else:
        require(
            teacher.weight.shape[0] == weight.shape[0],
            f"the teacher's output weight has {teacher.weight.shape[0]} rows of the padded vocabulary, the student's "
            f"{weight.shape[0]}; distillation compares them token by token. If the tokenizer is the same, pad both "
            "vocabularies alike.",
        )
        with torch.no_grad():
            teacher_hidden, teacher_weight = _for_autocast(*teacher)
            if sequence_parallel and group_size(tp_group) > 1:
                teacher_hidden = gather_from_sequence_parallel_region(teacher_hidden, group=tp_group)
        require(
            teacher_hidden.shape[:-1] == tokens,
            f"the student has tokens {list(tokens)}, the teacher {list(teacher_hidden.shape[:-1])}; both must see the "
            "same batch, and both or neither be split by sequence parallelism.",
        )
        teacher_hidden = teacher_hidden.reshape(-1, teacher_hidden.shape[-1])
    require(
        labels is None or labels.shape == tokens,
        f"labels {list(labels.shape) if labels is not None else None} are not one a token {list(tokens)}, [s, b].",
    )
    if tokens_per_chunk is None:
        models = 1 if stored is not None else 2
        tokens_per_chunk = max(1, LOGITS_BYTES // (models * weight.shape[0] * weight.element_size()))
    require(tokens_per_chunk >= 1, f"tokens_per_chunk={tokens_per_chunk} must be at least 1; leave it out.")
    vocabulary = Vocabulary.split(weight.shape[0], vocab_size, tp_group)
    flat_store = stored.of_tokens(-1) if stored is not None else None
    job = _Job(config, vocabulary, tokens, tokens_per_chunk, flat_store, [] if with_agreement else None)
    flat_labels = labels.reshape(-1) if labels is not None else None
    return job, (hidden.reshape(-1, hidden.shape[-1]), weight, teacher_hidden, teacher_weight, flat_labels)


def _for_autocast(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """As a linear layer would read them: in autocast's dtype where it is on."""
    kind = hidden.device.type
    if not _knows_autocast(kind) or not torch.is_autocast_enabled(kind) or hidden.dtype == torch.float64:
        return hidden, weight
    return hidden.to(torch.get_autocast_dtype(kind)), weight.to(torch.get_autocast_dtype(kind))


def _knows_autocast(kind: str) -> bool:
    return torch.amp.is_autocast_available(kind)  # the meta device, where launches are counted, does not


class _Reread(NamedTuple):
    """What a chunk's backward pass reads again of its forward pass."""

    reduced: Reduced
    known: KnownTeacher | None
    """of kind=top_k and of a stored teacher, so that the teacher's logits are not formed a second time"""


def _walk(
    job: _Job,
    inputs: _Inputs,
    *,
    reread: list[_Reread] | None = None,
    weights: Tensor | None = None,
    gradients: _Gradients | None = None,
) -> tuple[Tensor, list[_Reread]]:
    """The losses [1 or 2, n] of all chunks; with weights of that shape, also the gradients of their weighted sum."""
    student_hidden, student_weight, teacher_hidden, teacher_weight, labels = inputs
    local = job.vocabulary.local

    def walk_chunk(chunk: slice, before: _Reread | None) -> tuple[Tensor, _Reread]:  # its logits die with it
        student = student_hidden[chunk] @ student_weight[:local].t()
        teacher: TeacherRows
        if before is not None and before.known is not None:
            teacher = before.known
        elif job.stored is not None:
            teacher = job.stored[chunk]
        else:
            assert teacher_hidden is not None and teacher_weight is not None
            teacher = teacher_hidden[chunk] @ teacher_weight[:local].t()
            if job.config.kind == TOP_K:
                teacher = top_k_of_rows(teacher, job.config, job.vocabulary)
        if job.agreement is not None and before is None:  # now: the student's logits make room for their gradient
            job.agreement.append(top_1_agreement(student, teacher, job.vocabulary))
        rows = Rows(
            student,
            teacher,
            labels[chunk] if labels is not None else None,
            weights[:, chunk] if weights is not None else None,
            student if weights is not None else None,
        )
        reduced = before.reduced if before is not None else None
        losses, reduced = row_losses(rows, job.config, job.vocabulary, reduced=reduced)
        if gradients is not None:
            gradients.add(chunk, student)
        return losses, _Reread(reduced, teacher if isinstance(teacher, KnownTeacher) else None)

    kind = student_hidden.device.type
    with torch.no_grad(), torch.autocast(kind, enabled=False) if _knows_autocast(kind) else nullcontext():
        parts = [
            walk_chunk(chunk, reread[number] if reread is not None else None)
            for number, chunk in enumerate(job.chunks())
        ]
    return torch.cat([losses for losses, _ in parts], -1), [read for _, read in parts]


class _Gradients:
    """Of student hidden [n, h] and output weight [v/tp, h], where asked for; this rank's part of the former."""

    def __init__(self, job: _Job, inputs: _Inputs, needs: Sequence[bool], *, main_grad: Tensor | None = None) -> None:
        """
        Args:
            main_grad: what the weight's gradient is to be added to, as it comes; `weight` is then this very tensor,
                unless it is too coarse to sum up in.
        """
        hidden, weight = inputs[:2]
        self._hidden, self._weight, self._local = hidden, weight, job.vocabulary.local
        self.hidden = torch.empty_like(hidden) if needs[0] else None
        self.weight = None
        if needs[1]:
            # One chunk's product is summed in float32 by itself.
            dtype = torch.promote_types(weight.dtype, torch.float32) if len(job.chunks()) > 1 else weight.dtype
            fine = main_grad is not None and torch.promote_types(main_grad.dtype, dtype) == main_grad.dtype
            self.weight = main_grad if fine else torch.zeros_like(weight, dtype=dtype)

    def add(self, chunk: slice, of_logits: Tensor) -> None:
        if self.hidden is not None:
            torch.mm(of_logits, self._weight[: self._local], out=self.hidden[chunk])
        if self.weight is not None:
            _add_product(self.weight[: self._local], of_logits.t(), self._hidden[chunk])


@functools.cache
def _adds_unrounded(device: str, total: torch.dtype, inputs: torch.dtype) -> bool:
    if device == "cpu":
        return False
    one, two = (torch.ones(16, 16, dtype=dtype, device=device) for dtype in (total, inputs))
    try:
        torch.addmm(one, two, two, out_dtype=total, out=one)
    except (RuntimeError, TypeError):  # torch has it since 2.8, and with a total of more precision since later
        return False
    return True


PRODUCT_ELEMENTS = 1 << 22  # of a block that is formed before it is added: 8 MiB in bf16


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right. A total of more precision gets the product in its own, unrounded, where torch has such a
    product: not on a CPU, nor in an older one. There blocks are rounded to the inputs' dtype and added.
    """
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    elif _adds_unrounded(total.device.type, total.dtype, left.dtype):
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        for rows in even_slices(total.shape[0], max(1, PRODUCT_ELEMENTS // right.shape[1])):
            total[rows] += left[rows] @ right


def _hand_over(
    weight: Tensor, gradient: Tensor | None, to_main_grad: bool, factor: Tensor | None = None
) -> Tensor | None:
    """The weight's gradient, times `factor`, as autograd wants it; where Megatron's DDP keeps a main_grad, it is added
    there, unless it was summed up there already.
    """
    if gradient is None:
        return None
    if not to_main_grad:
        return (gradient if factor is None else gradient.mul_(factor)).to(weight.dtype)
    main_grad: Tensor = weight.main_grad  # type: ignore[attr-defined]
    if factor is not None:
        main_grad.addcmul_(gradient, factor)  # in the precision of main_grad
    elif gradient is not main_grad:
        main_grad.add_(gradient)
    if not hasattr(weight, "grad_added_to_main_grad"):
        return None
    # DDP's hook waits for some gradient, and adds it only where the weight has other uses too (zero_out_wgrad).
    weight.grad_added_to_main_grad = True
    return torch.zeros_like(weight)


class _PerToken(torch.autograd.Function):
    """[1 or 2, n] losses per token."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        *inputs, ctx.job, fusion = arguments
        losses, ctx.reread = _walk(ctx.job, tuple(inputs))
        ctx.save_for_backward(*inputs)
        ctx.to_main_grad = fusion and hasattr(inputs[1], "main_grad")
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, weights: Tensor) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors
        main_grad = inputs[1].main_grad if ctx.to_main_grad else None
        gradients = _Gradients(ctx.job, inputs, ctx.needs_input_grad, main_grad=main_grad)
        _walk(ctx.job, inputs, reread=ctx.reread, weights=weights, gradients=gradients)
        return gradients.hidden, _hand_over(inputs[1], gradients.weight, ctx.to_main_grad), *[None] * 5


class _Weighted(torch.autograd.Function):
    """The weighted sum of the losses, and the losses; the gradients wait for their factor."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        *inputs, weights, job, fusion = arguments
        ctx.to_main_grad = fusion and hasattr(inputs[1], "main_grad")
        ctx.gradients, ctx.weight = None, inputs[1]
        if any(ctx.needs_input_grad[:2]):
            ctx.gradients = _Gradients(job, tuple(inputs), ctx.needs_input_grad)
        losses, _ = _walk(
            job, tuple(inputs), weights=weights if ctx.gradients is not None else None, gradients=ctx.gradients
        )
        if ctx.gradients is not None and ctx.gradients.weight is not None and not ctx.to_main_grad:
            ctx.gradients.weight = ctx.gradients.weight.to(inputs[1].dtype)
        ctx.mark_non_differentiable(losses)
        # A cross-entropy may be infinite, on a label that is no token; one that does not count is none.
        return torch.where(weights != 0, weights * losses, 0.0).sum(), losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factor: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        require(
            gradients is not None,
            "fused_linear_loss was differentiated a second time, and its gradients are gone; add up what is to be "
            "differentiated, or use fused_linear_divergence.",
            RuntimeError,
        )
        hidden = gradients.hidden.mul_(factor) if gradients.hidden is not None else None
        return hidden, _hand_over(ctx.weight, gradients.weight, ctx.to_main_grad, factor), *[None] * 6

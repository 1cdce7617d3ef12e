"""Launches and host syncs at the real shapes of Llama-3.1-8B, counted on the meta device.

`BEFORE` are those of revision d72c2fd, counted in the same way with what an accelerator took there.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from minitron_nemo.activations.tokens import AnnouncedBatch, mark_tokens_over
from minitron_nemo.config.distillation import DivergenceConfig
from minitron_nemo.divergence.fused_linear import OutputHead, fused_linear_loss
from minitron_nemo.importance.block_influence import BlockInfluence
from minitron_nemo.importance.statistics import head_norms
from minitron_nemo.importance.watches import Watch
from minitron_nemo.parallel import Groups
from support.launches import Launches

TOKENS, STUDENT, TEACHER, VOCAB = 4096, 3072, 4096, 128256
LAYERS, FFN, HEADS = 32, 14336, 32

BEFORE = {
    ("forward_kl", False): 8619,
    ("forward_kl", True): 13408,
    ("reverse_kl", False): 9002,
    ("jensen_shannon", False): 11662,
    ("symmetric_kl", False): 10066,
    ("top_k", False): 20743,
    "block influence": 2742,
}
LIMITS = {"forward_kl": 0.1, "reverse_kl": 0.1, "block influence": 0.1, "top_k": 0.2}
OTHER_LIMIT = 0.12


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16, grad: bool = False) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta", requires_grad=grad)


def loss_forward_and_backward(kind: str, with_labels: bool) -> Launches:
    """Of a micro-batch, into a float32 main_grad, with the agreement that every step reports."""
    weight = torch.nn.Parameter(meta(VOCAB, STUDENT))
    weight.main_grad = meta(VOCAB, STUDENT, dtype=torch.float32)
    student = OutputHead(meta(TOKENS, 1, STUDENT, grad=True), weight)
    teacher = OutputHead(meta(TOKENS, 1, TEACHER), meta(VOCAB, TEACHER))
    config = DivergenceConfig(kind=kind, **({"k": 56} if kind == "top_k" else {}))
    labels = meta(TOKENS, 1, dtype=torch.int64) if with_labels else None
    with Launches() as launches:
        fused_linear_loss(
            student,
            teacher,
            config,
            meta(TOKENS, 1, dtype=torch.float32),
            tp_group=None,
            labels=labels,
            cross_entropy_weight=float(with_labels),
            gradient_accumulation_fusion=True,
            with_agreement=True,
        ).total.backward()
    return launches


@pytest.mark.parametrize(("kind", "with_labels"), [key for key in BEFORE if isinstance(key, tuple)])
def test_a_loss_takes_few_of_the_launches_it_took_and_never_waits_for_the_device(kind: str, with_labels: bool) -> None:
    launches = loss_forward_and_backward(kind, with_labels)
    assert not launches.syncs
    assert launches.total <= LIMITS.get(kind, OTHER_LIMIT) * BEFORE[kind, with_labels], (
        launches.total,
        launches.kernels.most_common(12),
    )


def test_the_output_weights_gradient_is_one_unrounded_product_a_chunk() -> None:
    launches = loss_forward_and_backward("forward_kl", False)
    assert launches.kernels["addmm"] * 3 == launches.kernels["mm"]  # both logits and the hidden's gradient


def test_block_influence_takes_a_tenth_of_the_launches_it_took_and_never_waits_for_the_device() -> None:
    influence = BlockInfluence(LAYERS, Groups(), sequence_parallel=False, device=torch.device("meta"))
    states = {row: meta(TOKENS, 1, TEACHER) for row in range(LAYERS + 1)}
    with Launches() as launches:
        influence.add(states, meta(TOKENS, 1, dtype=torch.bool))
    assert not launches.syncs
    assert launches.total <= LIMITS["block influence"] * BEFORE["block influence"], (
        launches.total,
        launches.kernels.most_common(12),
    )


@pytest.mark.parametrize("counted", [TOKENS, TOKENS - 100])
def test_the_hooks_of_an_importance_pass_take_few_launches_and_never_wait_for_the_device(counted: int) -> None:
    """Per place that is watched."""
    current = AnnouncedBatch(call="", give="")
    mask = torch.zeros(1, TOKENS)
    mask[:, :counted] = 1
    current.announce(mark_tokens_over(mask, groups=[], device=torch.device("meta")))
    for channels, measure in ((TEACHER, None), (FFN, None), (TEACHER, lambda values: head_norms(values, HEADS))):
        watch = Watch("", 0, 0, current, measure=measure)
        with Launches() as launches:
            watch.see(meta(TOKENS, 1, channels))
        assert not launches.syncs and launches.total <= 16, launches.kernels

"""The kernels of a GPU, interpreted on a CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from divergences_by_hand import (
    GRADIENTS,
    REAL,
    SETTINGS,
    Case,
    Expected,
    assert_near,
    by_hand,
    config_of,
)
from test_not_finite import forbidding
from torch import Tensor

from minitron_nemo.config.distillation import DivergenceConfig
from minitron_nemo.divergence.fused_linear import OutputHead, fused_linear_loss
from minitron_nemo.divergence.streamed import divergence


def check_kernels() -> None:
    """In a process where Triton interprets: forward KL and cross-entropy as the kernels compute them, on the CPU."""
    from minitron_nemo.divergence import triton_kernels

    calls, chunk_losses = [0], triton_kernels.chunk_losses

    def counted(*arguments: Any) -> Tensor:
        calls[0] += 1
        return chunk_losses(*arguments)

    triton_kernels.chunk_losses = counted
    triton_kernels.BLOCK = 32  # two blocks, the last with columns past the end
    for setting, dtype in (("plain", torch.bfloat16), ("hot", torch.float32), ("capped", torch.float32)):
        config, case = config_of("forward_kl", **SETTINGS[setting]), Case.random()
        student, teacher = (logits.to(dtype) for logits in case.logits())
        case.logits = lambda pair=(student, teacher): [logits.double() for logits in pair]  # type: ignore[method-assign]
        expected = Expected.of(case, config, student)
        student.requires_grad_()
        losses = divergence(student, teacher, config, tp_group=None, vocab_size=REAL, labels=case.labels)
        (gradient,) = torch.autograd.grad(list(losses), student, list(case.weights.float()))
        assert_near(losses.divergence, expected.divergence, f"kernel, {setting}, {dtype}", rtol=2e-6)
        assert_near(losses.cross_entropy, expected.cross_entropy, f"kernel, {setting}, {dtype}", rtol=2e-6)
        rtol = GRADIENTS if dtype == torch.float32 else 1e-2  # the interpreter cuts bf16 off
        assert_near(gradient, expected.gradients[0], f"kernel, {setting}, {dtype}", rtol=rtol)
        case = case.to(torch.float32)
        whole_value = by_hand(*(logits.double() for logits in case.logits()), config, REAL)
        loss = fused_linear_loss(
            OutputHead(*(tensor.requires_grad_() for tensor in case.student)),
            case.teacher,
            config,
            case.weights[0].float(),
            tp_group=None,
            vocab_size=REAL,
            tokens_per_chunk=7,
        )
        loss.total.backward()
        assert_near(loss.divergence, whole_value, f"kernel from hidden states, {setting}", rtol=5e-6)
    student, _ = Case.random().logits()
    same = student.float()
    assert not divergence(same, same.clone(), DivergenceConfig(), tp_group=None).divergence.any()
    # Tokens that are never said, whole blocks of them; in float64 the kernels take no part.
    results = []
    for dtype in (torch.float32, torch.float64):
        student, teacher = (logits.to(dtype) for logits in forbidding(Case.random()))
        value = divergence(student.requires_grad_(), teacher, DivergenceConfig(), tp_group=None, vocab_size=REAL)
        results.append((value.divergence, *torch.autograd.grad(value.divergence.sum(), student)))
    for found, expected in zip(*results, strict=True):
        assert_near(found, expected, "kernel, where tokens are never said", rtol=GRADIENTS)
    assert calls[0] > 0


@pytest.mark.skipif(sys.platform != "linux", reason="triton is made for Linux only")
def test_the_kernels_give_what_autograd_gives_in_float64() -> None:
    # TRITON_INTERPRET is read when the kernels are made, so a process of its own.
    code = "from test_triton_kernels import check_kernels; check_kernels()"
    paths = [str(Path(__file__).parent), *sys.path]
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

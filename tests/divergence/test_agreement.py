"""Whether both models find the same token likeliest."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from divergences_by_hand import (
    REAL,
    Case,
    config_of,
    shard,
)
from megatron.core import parallel_state

from minitron_nemo.divergence.agreement import max_of_rows
from minitron_nemo.divergence.fused_linear import OutputHead, fused_linear_divergence, fused_linear_loss
from support.ranks import Ranks


def check_agreement(group: Any) -> None:
    """Both ways, of a teacher whose likeliest token is the student's for some tokens and not for others."""
    case = Case.random(7)
    teacher = OutputHead(case.student.hidden, case.student.weight + 0.5 * Case.random(8).student.weight)
    teacher.weight[REAL:] *= 100  # padding that would win
    teacher.weight[40], teacher.weight[45] = teacher.weight[3], teacher.weight[4]  # ties across ranks: the first counts
    student_logits, teacher_logits = (head.hidden @ head.weight[:REAL].t() for head in (case.student, teacher))
    expected = (student_logits.argmax(-1) == teacher_logits.argmax(-1)).float()
    assert 0.2 < expected.mean() < 0.8 and (teacher_logits.argmax(-1) <= 4).any()
    heads = [OutputHead(head.hidden, shard(head.weight, 0, group)) for head in (case.student, teacher)]
    for kind in ("forward_kl", "cosine", "top_k"):
        options: dict[str, Any] = {"tp_group": group, "vocab_size": REAL, "tokens_per_chunk": 7, "with_agreement": True}
        assert torch.equal(fused_linear_divergence(*heads, config_of(kind), **options).agreement, expected), kind
        loss = fused_linear_loss(heads[0], heads[1], config_of(kind), case.weights[0], **options)
        assert torch.equal(loss.agreement, expected), kind


def test_agreement_is_where_both_models_find_the_same_token_likeliest() -> None:
    check_agreement(None)


def check_agreement_on_ranks() -> None:
    check_agreement(parallel_state.get_tensor_model_parallel_group())


@pytest.mark.parametrize("layout", ["tp2", "tp4"])
def test_agreement_is_the_same_over_a_split_vocabulary(ranks: Ranks, layout: str) -> None:
    ranks(layout).run(check_agreement_on_ranks)


@pytest.mark.parametrize("columns", [1, 255, 256, 257, 1000, 0])
def test_the_maximum_of_blocks_is_the_first_maximum_of_the_row(columns: int) -> None:
    rows = torch.randn(5, columns, generator=torch.Generator().manual_seed(columns)).mul(2).round()  # many ties
    values, first = max_of_rows(rows)
    if columns == 0:
        assert torch.equal(values, torch.full((5,), float("-inf"))) and torch.equal(first, torch.zeros(5).long())
    else:
        assert torch.equal(values, rows.amax(-1)) and torch.equal(first, rows.argmax(-1))

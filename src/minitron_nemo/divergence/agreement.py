"""Whether the student would say what the teacher would: the share of tokens whose likeliest next token is the same.

    student, teacher   logits of a chunk of tokens                [n, v/tp]
    agreement          1 or 0 for each token                      [n]          float32, equal on every tp rank

Read off the logits as they are: scale, soft cap and temperature change no order. Where the teacher finds several tokens
equally likely the first counts; the student agrees if it finds none likelier, so that a model agrees with itself also
where the rounding of bf16 makes equals.

Communication: tp, a gather of two values a token and a maximum of two.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minitron_nemo.divergence.known_teacher import KnownTeacher
from minitron_nemo.divergence.vocabulary import Vocabulary, row_max
from minitron_nemo.parallel import all_gather_shards, all_reduce_max, group_size

BLOCK = 256  # columns; at a vocabulary of 128k the maximum of maxima takes a fifth of the time of torch.max on a CPU


def top_1_agreement(student: Tensor, teacher: Tensor | KnownTeacher, vocabulary: Vocabulary) -> Tensor:
    """[n] float32: 1 where the student's likeliest token is the teacher's, else 0.

    Args:
        student, teacher: [n, real columns]; of a teacher known by less, `KnownTeacher.likeliest`.
    Communicates: tp.
    """
    here, columns = vocabulary.local_columns(_likeliest(teacher, vocabulary).unsqueeze(-1))
    local_top = row_max(student) if student.device.type != "cpu" else max_of_rows(student)[0]
    local_score = torch.full_like(local_top, float("-inf"))
    if vocabulary.local > 0:
        local_score = torch.where(here, student.gather(-1, columns), float("-inf")).squeeze(-1)
    score, top = all_reduce_max(torch.stack([local_score, local_top]), group=vocabulary.group)
    return (score >= top).float()


def _likeliest(teacher: Tensor | KnownTeacher, vocabulary: Vocabulary) -> Tensor:
    """[n] int64, global: the first of the teacher's largest logits. Communicates: tp, unless it is known."""
    if isinstance(teacher, KnownTeacher):
        return teacher.likeliest(vocabulary)
    local_top, column = max_of_rows(teacher)
    if group_size(vocabulary.group) == 1:
        return column
    tops = torch.stack(all_gather_shards(local_top, group=vocabulary.group))  # [tp, n]
    indices = torch.stack(all_gather_shards(column + vocabulary.first, group=vocabulary.group))
    return indices.gather(0, tops.argmax(0, keepdim=True)).squeeze(0)


def max_of_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Maximum [n] of each row of [n, columns] and the first column that has it; -inf and 0 of no columns."""
    if rows.shape[1] == 0:
        return rows.new_full(rows.shape[:1], float("-inf")), torch.zeros(len(rows), dtype=torch.int64).to(rows.device)
    if rows.device.type != "cpu":
        values, first = rows.max(-1)
        return values, first
    whole = rows.shape[1] // BLOCK * BLOCK
    parts = []
    if whole > 0:
        blocks = rows[:, :whole].unflatten(-1, (-1, BLOCK))
        block = blocks.amax(-1).argmax(-1)
        values, column = blocks[torch.arange(len(rows), device=rows.device), block].max(-1)
        parts.append((values, block * BLOCK + column))
    if whole < rows.shape[1]:
        values, column = rows[:, whole:].max(-1)
        parts.append((values, whole + column))
    values, first = torch.stack([values for values, _ in parts]).max(0)
    return values, torch.stack([column for _, column in parts]).gather(0, first.unsqueeze(0)).squeeze(0)

"""A teacher known by less than its logits: what every such answer can do.

    fields      tensors of the tokens' leading dimensions      [..., anything]      constant
    divergence  of the student from it                         [n]

Communication: tp, in `divergence` alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import TypeVar

import torch
from torch import Tensor

from minitron_nemo.config.distillation import DivergenceConfig
from minitron_nemo.divergence.formulas import Result
from minitron_nemo.divergence.vocabulary import Reductions, Vocabulary

Known = TypeVar("Known", bound="KnownTeacher")


@dataclass(frozen=True)
class KnownTeacher(ABC):
    """Of tokens in any leading dimensions; constant."""

    indices: Tensor
    """[..., k] integer, global: tokens of the vocabulary that the answer is of"""

    @abstractmethod
    def divergence(
        self, student: Tensor, config: DivergenceConfig, vocabulary: Vocabulary, reduce: Reductions
    ) -> Result:
        """Of the student's tempered scores [n, v/tp] from this, of n tokens."""

    @abstractmethod
    def likeliest(self, vocabulary: Vocabulary) -> Tensor:
        """[n] int64, global: the token that the teacher finds likeliest, as far as this tells."""

    @abstractmethod
    def require_fits(self, tokens: torch.Size, config: DivergenceConfig) -> None:
        """Raises: ValueError: of other tokens than these, or the divergence needs what this does not have."""

    def __getitem__(self: Known, tokens: slice) -> Known:
        return self.each(lambda tensor: tensor[tokens])

    def of_tokens(self: Known, *shape: int) -> Known:
        """With these leading dimensions; -1 makes them one."""
        leading = self.indices.dim() - 1
        return self.each(lambda tensor: tensor.reshape(*shape, *tensor.shape[leading:]))

    def each(self: Known, change: Callable[[Tensor], Tensor]) -> Known:
        """With every tensor changed."""
        return replace(self, **{name: change(tensor) for name, tensor in self._tensors().items()})

    @staticmethod
    def joined(parts: Sequence[Known]) -> Known:
        """Of all their tokens [n, ...], in this order."""
        first, *_ = (tensors := [part._tensors() for part in parts])
        return replace(parts[0], **{name: torch.cat([each[name] for each in tensors]) for name in first})

    def _tensors(self) -> dict[str, Tensor]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

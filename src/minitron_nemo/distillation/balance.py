"""What the parts of the loss are in a step, and what the hidden losses weigh against the divergence.

    loss = divergence + cross_entropy_weight * cross-entropy + hidden_weight * sum of hidden losses
    hidden_weight = weight * ramp(step) * alpha,   alpha = divergence / sum of hidden losses, both of the step before

Means over the supervised tokens of the global batch. Minitron recomputes alpha dynamically and found it better than a
constant (arXiv:2407.14679, section 3). Here it is one number per step, from numbers all ranks have agreed on, so that
no layout changes it, and it stays on the device.

Communication: one all-reduce over all ranks at a step's end, a float64 for each part of the loss and one for the
number of tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from minitron_nemo.config.distillation import HiddenStateConfig
from minitron_nemo.parallel import all_reduce_sum, world

_TOKENS = "tokens"


class StepSums:
    """Sums over the supervised tokens of the running step, one for each part of the loss.

    What several ranks hold alike, each adds its share of, so that the sum over all ranks counts it once.
    """

    def __init__(self, parts: Sequence[str]) -> None:
        self.parts = [*parts, _TOKENS]
        self.micro_batches = 0
        """Of this rank in the running step; for the caller's use."""
        self._local: Tensor | None = None

    def add(self, part: str, local_sum: Tensor, *, copies: int) -> None:
        """Add a scalar.

        Args:
            copies: ranks that add this same value.
        """
        self._sums(local_sum.device)[self.parts.index(part)] += local_sum.detach() / copies

    def add_tokens(self, count: Tensor, *, copies: int) -> None:
        self.add(_TOKENS, count, copies=copies)

    def close(self, device: torch.device) -> dict[str, Tensor]:
        """End the step: the mean of each part per token, float64 scalars, equal on every rank.

        Communicates: over all ranks, one all-reduce.
        """
        sums = all_reduce_sum(self._sums(device), group=world())
        self._local, self.micro_batches = None, 0
        means = sums / sums[-1].clamp(min=1)  # a step without a supervised token has sums of 0
        return dict(zip(self.parts[:-1], means.unbind(), strict=False))

    def _sums(self, device: torch.device) -> Tensor:
        if self._local is None:
            self._local = torch.zeros(len(self.parts), dtype=torch.float64, device=device)
        return self._local


class Balance(nn.Module):
    """The hidden losses' weight in the running step; its state is saved with the student's."""

    alpha: Tensor
    """[1] float64; of dynamic balance, 0 in the first step."""
    steps: Tensor
    """[1] int64; optimizer steps so far."""

    def __init__(self, config: HiddenStateConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("alpha", torch.full((1,), float(config.balance == "fixed"), dtype=torch.float64))
        self.register_buffer("steps", torch.zeros(1, dtype=torch.int64))

    def hidden_weight(self) -> Tensor:
        """Scalar float64."""
        config, weight = self.config, self.alpha * self.config.weight
        if config.warmup_steps:
            weight = weight * ((self.steps + 1) / config.warmup_steps).clamp(max=1)
        if config.decay_steps:
            weight = weight * (1 - (self.steps - config.decay_start) / config.decay_steps).clamp(0, 1)
        return weight.squeeze(0)

    def end_step(self, divergence: Tensor, hidden: Tensor) -> None:
        """Weigh the next step by this one's means. A step whose ratio is not finite leaves alpha as it was."""
        if self.config.balance == "dynamic":
            ratio = divergence / hidden
            self.alpha.copy_(torch.where(ratio.isfinite(), ratio, self.alpha))
        self.steps += 1

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Balance:
        alpha = self.alpha
        super()._apply(fn, recurse)
        self.alpha = alpha.to(self.alpha.device)  # a model's conversion to bf16 is not meant for it
        return self

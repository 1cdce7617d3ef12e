"""What is left of the teacher in a candidate: its held-out loss and its distance from the teacher, without training.

The teacher stands once, and reads the samples once for all; a candidate is cut out of it, measured on them, and let go.

Communication: what the models do; all ranks, for the sums.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel as MCoreGPTModel

from minitron_nemo.parallel import agree
from minitron_nemo.platform import device
from minitron_nemo.runtime.forward import TeacherStates, loss_sums, summed
from minitron_nemo.search.ledger import Entry, Ledger

Cut = Callable[[MCoreGPTModel, Mapping[str, int]], MCoreGPTModel]
"""A teacher and the dims that shrink -> this rank's part of the student."""


class Measuring:
    """Measures candidates, each once."""

    def __init__(
        self, teacher: MCoreGPTModel, held_out: list[dict[str, torch.Tensor]], vocab_size: int, cut: Cut, ledger: Ledger
    ) -> None:
        """
        Args:
            held_out: this data-parallel rank's micro-batches.
            cut: may change the teacher's parameters, which are put back from a copy on the host.
        """
        self._teacher, self._held_out, self._vocab_size, self._cut = teacher, held_out, vocab_size, cut
        self._ledger, self._states = ledger, TeacherStates(teacher, keep=True)
        self._intact: list[torch.Tensor] = []
        """The teacher's parameters, from the first cut on."""

    def teacher_loss(self) -> float:
        """Nats per token. Communicates: as `of`."""
        if "teacher" not in self._ledger:
            self._ledger.put("teacher", self._measure(self._teacher, "teacher", None))
        return self._ledger["teacher"]["loss"]

    def of(self, name: str, dims: Mapping[str, int]) -> Entry:
        """{loss, kl} in nats per token of the student with these dims. Communicates: all ranks."""
        if name not in self._ledger:
            self._intact = self._intact or [each.detach().to("cpu", copy=True) for each in self._teacher.parameters()]
            student = self._cut(self._teacher, dims)
            with torch.no_grad():
                for each, before in zip(self._teacher.parameters(), self._intact, strict=True):
                    each.copy_(before)
            self._ledger.put(name, self._measure(student, name, self._states))
        return self._ledger[name]

    def _measure(self, core: MCoreGPTModel, label: str, teacher: TeacherStates | None) -> Entry:
        options: dict[str, Any] = {"label": label, "total": len(self._held_out), "teacher": teacher}
        sums = summed(loss_sums(core, self._held_out, self._vocab_size, **options), values=3 if teacher else 2)
        loss, tokens, *kl = agree(sums.to(device())).tolist()
        return {"loss": loss / tokens} | ({"kl": kl[0] / tokens} if kl else {})

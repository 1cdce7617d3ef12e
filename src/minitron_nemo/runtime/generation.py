"""Text from a model on its layout: greedy or drawn, with a cache of keys and values.

The cache is Megatron-core's `StaticInferenceContext`, which knows no padding: rows of unequal prompts are read together
up to the shortest one's end, and go on a token at a time, of the prompt where there is one and of the model after it.

    prompts      tokens, one list a prompt
    cache        keys and values [n, b, g/tp, d] of each layer of this stage, n the longest prompt and answer
    logits       [b, v] of the last token, whole on every tensor-parallel rank of the last stage

Data-parallel ranks share the prompts out, unless experts are spread over them: those meet in every layer, and each rank
generates all. A prompt's answer does not depend on which others it stands beside.

Communication: tp inside the model; pp between stages, and to hand the token round; dp at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.models.gpt import GPTModel as MCoreGPTModel
from torch import Tensor

from minitron_nemo import platform
from minitron_nemo.checks import require
from minitron_nemo.parallel import Groups, broadcast_from, gather_objects, group_rank, group_size, is_rank_zero
from minitron_nemo.progress import Reporter
from minitron_nemo.schedule import forward_only


@dataclass(frozen=True)
class Sampling:
    """How a text goes on, and where it ends."""

    new_tokens: int
    """At most."""
    temperature: float = 0.0
    """0 takes the likeliest token; else one is drawn from the softmax of logits / temperature."""
    top_p: float = 1.0
    """Draw from the likeliest tokens that have this share of the probability together (arXiv:1904.09751)."""
    seed: int = 0
    stop: tuple[str, ...] = ()
    """Texts that end it; they are not part of it."""


def generate(
    core: MCoreGPTModel,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    rows: int,
    decode: Callable[[list[int]], str],
    end_of_text: int | None,
    vocab_size: int | None = None,
    label: str = "generate",
    after: Callable[[int, int], None] = lambda done, total: None,
) -> list[str]:
    """How the model continues each prompt, without the prompt; equal on every rank.

    Args:
        core: in evaluation mode.
        prompts: none of them empty; all of them on every rank.
        rows: prompts that are run at once on a data-parallel rank.
        decode: tokens -> text.
        end_of_text: the token that ends a text, which is not part of it; None: none does.
        vocab_size: real entries of the padded vocabulary; None: all are real.
        label: for the progress line.
        after: called on every rank with the number of micro-batches done and of all, as often on each.
    Communicates: as the module.
    Raises: ValueError: the layout splits the sequence.
    """
    config, groups = core.config, Groups.from_megatron()
    require(
        not config.sequence_parallel and config.context_parallel_size == 1,
        "Text is generated a token at a time, which cannot be split. Set trainer.sequence_parallel=false and "
        "trainer.context_parallel_size=1.",
    )
    shared = group_size(groups.ep) == 1
    dp_rank, dp_size = (group_rank(groups.dp), group_size(groups.dp)) if shared else (0, 1)
    order = sorted(range(len(prompts)), key=lambda place: -len(prompts[place]))
    total = -(-len(order) // (rows * dp_size))
    texts: dict[int, str] = {}
    with Reporter(label, total, show=is_rank_zero()) as reporter:
        for done in range(1, total + 1):
            places = order[(done - 1) * rows * dp_size : done * rows * dp_size][dp_rank::dp_size]
            if places:
                writing = _Writing(places, [list(prompts[place]) for place in places], sampling, decode, end_of_text)
                _write(core, writing, groups, vocab_size)
                texts |= writing.texts()
            reporter.update(done)
            after(done, total)
    for others in gather_objects(texts, group=groups.dp) if shared else ():
        texts |= others
    return [texts[place] for place in range(len(prompts))]


def _write(core: MCoreGPTModel, writing: _Writing, groups: Groups, vocab_size: int | None) -> None:
    rows, last_stage = len(writing.prompts), group_size(groups.pp) - 1
    context = StaticInferenceContext(rows, writing.longest)
    device = platform.device()
    for read in writing.steps():  # [b, s]
        position = context.sequence_len_offset
        seq_length = read.shape[1]

        def forward(model: MCoreGPTModel, now: Tensor, position: int = position) -> Tensor:
            positions = torch.arange(position, position + now.shape[1], device=device).repeat(rows, 1)
            output: Tensor = model(now, positions, None, inference_context=context, runtime_gather_output=True)
            return output

        def see(_: Tensor, logits: Tensor) -> Tensor:
            return writing.choose(logits[:, -1, :vocab_size].float())

        found = forward_only(core, [read.to(device)], forward, see, count=1, rows=rows, seq_length=seq_length)
        context.sequence_len_offset += seq_length
        context.enable_decode_mode()
        chosen = found[0].to(device) if found else torch.zeros(rows, dtype=torch.int64, device=device)
        chosen = broadcast_from(chosen, source=0, group=groups.tp)
        writing.add(broadcast_from(chosen, source=last_stage, group=groups.pp).tolist())


class _Writing:
    """Prompts of one micro-batch and what has been written after each."""

    def __init__(
        self,
        places: Sequence[int],
        prompts: list[list[int]],
        sampling: Sampling,
        decode: Callable[[list[int]], str],
        end_of_text: int | None,
    ) -> None:
        self.places, self.prompts, self.sampling = places, prompts, sampling
        self._decode, self._end = decode, end_of_text
        self._written: list[list[int]] = [[] for _ in prompts]
        self._over = [sampling.new_tokens == 0 for _ in prompts]
        self._read = 0
        self._draws = [torch.Generator().manual_seed(_mixed(sampling.seed, place)) for place in places]

    @property
    def longest(self) -> int:
        return max(map(len, self.prompts)) + self.sampling.new_tokens

    def steps(self) -> Iterator[Tensor]:
        """Tokens to be read next, [b, s] int64, until every text is over."""
        self._read = min(map(len, self.prompts))
        if not all(self._over):
            yield torch.tensor([prompt[: self._read] for prompt in self.prompts])
        while not all(self._over):
            self._read += 1
            yield torch.tensor([[self._token(row, self._read - 1)] for row in range(len(self.prompts))])

    def _token(self, row: int, position: int) -> int:
        text = self.prompts[row] + self._written[row]
        return text[min(position, len(text) - 1)]  # a text that is over reads its last token again, for nobody

    def choose(self, logits: Tensor) -> Tensor:
        """The next token of each row, [b] int64, from logits [b, v] float32."""
        if self.sampling.temperature == 0:
            return logits.argmax(-1)
        probabilities = (logits.cpu() / self.sampling.temperature).softmax(-1)
        if self.sampling.top_p < 1:
            largest, tokens = probabilities.sort(dim=-1, descending=True, stable=True)
            before = largest.cumsum(-1) - largest
            largest = torch.where(before < self.sampling.top_p, largest, 0.0)  # the first is always there
            probabilities = torch.zeros_like(probabilities).scatter(-1, tokens, largest)
        drawn = [
            torch.multinomial(row, 1, generator=draw) if self._goes_on(number) else torch.zeros(1, dtype=torch.int64)
            for number, (row, draw) in enumerate(zip(probabilities, self._draws, strict=True))
        ]
        return torch.cat(drawn)

    def _goes_on(self, row: int) -> bool:
        """Whether the next token is the model's."""
        return not self._over[row] and self._read >= len(self.prompts[row])

    def add(self, chosen: Sequence[int]) -> None:
        """What the model says after what was read, of each row."""
        for row, token in enumerate(chosen):
            if not self._goes_on(row):
                continue
            if token == self._end:
                self._over[row] = True
                continue
            self._written[row].append(token)
            text = self._decode(self._written[row]) if self.sampling.stop else ""
            self._over[row] = len(self._written[row]) == self.sampling.new_tokens or any(
                stop in text for stop in self.sampling.stop
            )

    def texts(self) -> dict[int, str]:
        """By the prompts' places."""
        return {
            place: cut_at(self._decode(written), self.sampling.stop)
            for place, written in zip(self.places, self._written, strict=True)
        }


def cut_at(text: str, stop: Sequence[str]) -> str:
    """The text before the first of the texts that end it."""
    for each in stop:
        text = text.split(each)[0]
    return text


def _mixed(seed: int, place: int) -> int:
    return (seed * 1_000_003 + place) % 2**63

"""Generated text is what a model that reads everything again would say, on every layout."""

from __future__ import annotations

import pytest
import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from minitron_nemo.checks import Mistake
from minitron_nemo.runtime.forward import last_logits
from minitron_nemo.runtime.generation import Sampling, generate
from support.megatron import TINY, TINY_EXPERTS, build_gpt
from support.ranks import Ranks

PROMPTS = [[5, 3, 9], [7], [2, 4, 8, 1, 6], [11, 12], [3, 3, 3, 3]]


def _model(experts: bool) -> tuple[GPTModel, int]:
    shape = TINY_EXPERTS if experts else TINY
    return build_gpt(shape), shape.padded_vocab_size - 3


def _spell(tokens: list[int]) -> str:
    return "".join(f"<{token}>" for token in tokens)


def write(sampling: Sampling, rows: int, experts: bool = False) -> list[str]:
    core, vocab_size = _model(experts)
    return generate(core, PROMPTS, sampling, rows=rows, decode=_spell, end_of_text=None, vocab_size=vocab_size)


def write_by_reading_again(new_tokens: int, experts: bool = False) -> list[str]:
    core, vocab_size = _model(experts)
    found = []
    for prompt in PROMPTS:
        text = list(prompt)
        for _ in range(new_tokens):
            logits: Tensor = last_logits(core, torch.tensor([text]))[0, -1, :vocab_size]
            text.append(int(logits.argmax()))
        found.append(_spell(text[len(prompt) :]))
    return found


def write_until(stop: str, end_of_text: int) -> list[str]:
    core, vocab_size = _model(experts=False)
    sampling = Sampling(new_tokens=6, stop=(stop,))
    return generate(core, PROMPTS, sampling, rows=3, decode=_spell, end_of_text=end_of_text, vocab_size=vocab_size)


@pytest.mark.parametrize(
    ("layout", "experts"),
    [("single", False), ("tp2", False), ("pp2", False), ("dp2", False), ("single", True), ("dp2-ep2", True)],
)
def test_greedy_text_is_that_of_a_model_that_reads_all_again(ranks: Ranks, layout: str, experts: bool) -> None:
    [expected] = ranks("single").run(write_by_reading_again, 6, experts)
    assert len(set(expected)) > 1
    for found in ranks(layout).run(write, Sampling(new_tokens=6), 3, experts):
        assert found == expected


def test_a_drawn_text_is_the_same_beside_any_others_and_another_by_another_seed(ranks: Ranks) -> None:
    drawn = Sampling(new_tokens=8, temperature=1.0, top_p=0.9, seed=5)
    [alone] = ranks("single").run(write, drawn, 1)
    assert ranks("single").run(write, drawn, 4) == [alone]
    assert ranks("pp2").run(write, drawn, 2) == [alone, alone]
    assert ranks("dp2").run(write, drawn, 2) == [alone, alone]
    [other] = ranks("single").run(write, Sampling(new_tokens=8, temperature=1.0, top_p=0.9, seed=6), 1)
    assert other != alone
    [narrow] = ranks("single").run(write, Sampling(new_tokens=8, temperature=1.0, top_p=1e-6), 2)
    assert [narrow] == ranks("single").run(write, Sampling(new_tokens=8), 2)


def test_a_text_ends_before_a_stop_string_and_at_the_end_of_text(ranks: Ranks) -> None:
    [whole] = ranks("single").run(write_by_reading_again, 6)
    tokens = [text.strip("<>").split("><") for text in whole]
    stop, end = f"<{tokens[0][2]}>", int(tokens[1][3])
    [found] = ranks("single").run(write_until, stop, end)
    assert found == [text.split(f"<{end}>")[0].split(stop)[0] for text in whole]


def test_a_split_sequence_is_refused(ranks: Ranks) -> None:
    with pytest.raises(Mistake, match=r"trainer\.sequence_parallel=false"):
        ranks("tp2-sp").run(write, Sampling(new_tokens=2), 2)

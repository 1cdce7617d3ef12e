"""What lm_eval asks of a model: likelihoods, likelihoods of whole texts, and answers.

    MegatronLM    our model on its layout; every question of lm_eval is a task for all ranks
    HuggingFace   lm_eval's own class for transformers, in one process

Texts become tokens by lm_eval's own rules in both, but for whole texts: there lm_eval puts the beginning-of-text token
before a text and lets a tokenizer that adds one do so again, and counts log P(BOS | BOS), a number that no training has
taught. Whole texts are read without the tokenizer's own special tokens here, as with lm_eval's add_bos_token=False.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import handle_stop_sequences, has_bos_prefix, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from megatron.core.models.gpt import GPTModel as MCoreGPTModel

from minitron_nemo.checks import require
from minitron_nemo.runtime.generation import Sampling, cut_at, generate
from minitron_nemo.runtime.likelihood import likelihoods
from minitron_nemo.text.questions import Continuation

if TYPE_CHECKING:
    from minitron_nemo.text.tokenizer import Tokenizer

Score = Callable[[Sequence[Continuation]], list[tuple[float, bool]]]
Write = Callable[[list[list[int]], Sampling], list[str]]


@dataclass(frozen=True)
class Scoring:
    """A task for all ranks: likelihoods of texts."""

    continuations: list[Continuation]


@dataclass(frozen=True)
class Writing:
    """A task for all ranks: continue prompts."""

    prompts: list[list[int]]
    sampling: Sampling


def take_part(
    task: Scoring | Writing,
    core: MCoreGPTModel,
    tokenizer: Tokenizer,
    *,
    rows: int,
    vocab_size: int,
    after: Callable[[int, int], None],
) -> list[Any]:
    """What a question of lm_eval is on this rank; the answer is equal on every rank."""
    if isinstance(task, Scoring):
        return likelihoods(core, task.continuations, rows=rows, vocab_size=vocab_size, after=after)

    def decode(tokens: list[int]) -> str:
        text: str = tokenizer.decode(tokens, skip_special_tokens=True)
        return text

    return generate(
        core,
        task.prompts,
        task.sampling,
        rows=rows,
        decode=decode,
        end_of_text=tokenizer.eos_token_id,
        vocab_size=vocab_size,
        after=after,
    )


@register_model("minitron_megatron")
class MegatronLM(TemplateLM):
    """Our model, by what all ranks do together.

    Args:
        together: gives a task to every rank and returns the answer.
        max_length: tokens the model reads at once.
        template: name of the chat template; None: the tokenizer's default.
    """

    def __init__(
        self,
        together: Callable[[Scoring | Writing], list[Any]],
        tokenizer: Tokenizer,
        max_length: int,
        template: str | None = None,
    ) -> None:
        super().__init__()
        self._together, self.tokenizer, self.max_length = together, tokenizer, max_length
        self._template = template
        self.max_gen_toks = 256  # as lm_eval's own class for transformers

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        if add_special_tokens is None:
            add_special_tokens = not has_bos_prefix(string, self.tokenizer.decode(self.prefix_token_id))
        ids: list[int] = self.tokenizer.encode(string, add_special_tokens=add_special_tokens)
        return ids

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        text: str = self.tokenizer.apply_chat_template(
            chat_history,
            chat_template=self._template,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return text

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return found

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        asked = []
        for text, context, scored in requests:
            require(
                0 < len(scored) <= self.max_length,
                f"evaluate.tasks: {len(scored)} tokens are to be scored of {text!r:.80}, and the model reads "
                f"{self.max_length} at once. Leave the task out.",
            )
            tokens = (context + scored)[-(self.max_length + 1) :]
            asked.append(Continuation(tuple(tokens), len(scored), 0))
        return self._together(Scoring(asked))

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        windows, of_request = [], []
        for number, request in enumerate(requests):
            rolling = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0], add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            found = [(request.args[0], *make_disjoint_window(window)) for window in rolling]
            windows += found
            of_request += [number] * len(found)
        sums = [0.0] * len(requests)
        for number, (nats, _) in zip(of_request, self._loglikelihood_tokens(windows), strict=True):
            sums[number] += nats
        return sums

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        end = self.tokenizer.decode(self.eot_token_id)
        groups: dict[Sampling, list[int]] = {}
        for place, request in enumerate(requests):
            options = normalize_gen_kwargs(request.args[1], self.max_gen_toks)
            stop = handle_stop_sequences(options.pop("until", None), eos=end)
            sampling = Sampling(
                new_tokens=options["max_gen_toks"],
                temperature=options["temperature"] if options["do_sample"] else 0.0,
                top_p=float(options.get("top_p", 1.0)),
                seed=_SEED,
                stop=tuple(each for each in stop if each),
            )
            groups.setdefault(sampling, []).append(place)
        answers = [""] * len(requests)
        for sampling, places in groups.items():
            room = self.max_length - sampling.new_tokens
            require(
                room > 0,
                f"evaluate.tasks: an answer may have {sampling.new_tokens} tokens, and the model reads "
                f"{self.max_length} at once, question and answer together. Set generation_kwargs.max_gen_toks in the "
                "task, or leave it out.",
            )
            prompts = [self.tok_encode(requests[place].args[0])[-room:] for place in places]
            prompts = [prompt or [self.prefix_token_id] for prompt in prompts]
            for place, answer in zip(places, self._together(Writing(prompts, sampling)), strict=True):
                answers[place] = cut_at(answer, sampling.stop)
        return answers


_SEED = 1234  # lm_eval's own for torch


class HuggingFace(HFLM):
    """lm_eval's own, where whole texts begin with one beginning-of-text token; see the module's text."""

    add_bos_token: bool | None

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        before = self.add_bos_token
        self.add_bos_token = False
        try:
            found: list[float] = super().loglikelihood_rolling(requests, disable_tqdm=True)
            return found
        finally:
            self.add_bos_token = before

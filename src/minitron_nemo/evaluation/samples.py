"""What a model writes: continuations of a few prompts, greedy and sampled.

    prompt      as it was given; with a chat template, what a user says    text
    tokens      of the prompt and what was added so far                    [1, s]
    logits      of the next token, over the real vocabulary                [v]        float32, equal on every rank

Every token costs a forward pass over all before it, as nothing is kept between them: meant for a look, not for speed.

Communication: that of `runtime.forward.last_logits`, a token at a time. Every rank draws the same tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from megatron.core.models.gpt import GPTModel as MCoreGPTModel

from minitron_nemo.checks import require
from minitron_nemo.config.stages import EvaluateConfig
from minitron_nemo.runtime.forward import last_logits

if TYPE_CHECKING:
    from minitron_nemo.text.tokenizer import Tokenizer

GREEDY, SAMPLED = "greedy", "sampled"


def require_can_sample(config: EvaluateConfig, tokenizer: Tokenizer) -> None:
    """Raises: ValueError: a layout, a tokenizer or a prompt that cannot be continued."""
    if not config.prompts:
        return
    trainer = config.trainer
    require(
        trainer.context_parallel_size == 1,
        f"evaluate.prompts with trainer.context_parallel_size={trainer.context_parallel_size}: a continuation is not "
        "split along its tokens. Set it to 1, or leave the prompts out.",
    )
    require(
        not config.chat_template or bool(tokenizer.chat_template),
        f"evaluate.chat_template=true, and the tokenizer of evaluate.model={config.model} has no chat template. Set it "
        "to false.",
    )
    for prompt in config.prompts:
        tokens = len(_ids_of(prompt, config, tokenizer))
        require(tokens > 0, f"evaluate.prompts: {prompt!r} is no token to this tokenizer. Leave it out.")
        require(
            tokens + config.new_tokens <= trainer.seq_length,
            f"evaluate.prompts: {prompt[:40]!r} has {tokens} tokens, and with evaluate.new_tokens={config.new_tokens} "
            f"it is longer than trainer.seq_length={trainer.seq_length}. Shorten the prompt, or lower new_tokens.",
        )


def write_samples(
    core: MCoreGPTModel, tokenizer: Tokenizer, vocab_size: int, config: EvaluateConfig
) -> list[dict[str, str]]:
    """`prompt`, `mode` and `text`, what was added, of every prompt in both modes. Every rank calls and gets the same."""
    found = []
    for prompt in config.prompts:
        ids = _ids_of(prompt, config, tokenizer)
        for mode in (GREEDY, SAMPLED):
            generator = torch.Generator().manual_seed(config.seed) if mode == SAMPLED else None
            added = _continued(core, ids, tokenizer.eos_token_id, vocab_size, config, generator)
            text = tokenizer.decode(added, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            found.append({"prompt": prompt, "mode": mode, "text": text})
    return found


def _ids_of(prompt: str, config: EvaluateConfig, tokenizer: Tokenizer) -> list[int]:
    if not config.chat_template:
        ids: list[int] = tokenizer(prompt).input_ids
        return ids
    said = [{"role": "user", "content": prompt}]
    text: Any = tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
    templated: list[int] = tokenizer(text, add_special_tokens=False).input_ids
    return templated


def _continued(
    core: MCoreGPTModel,
    ids: list[int],
    end: int,
    vocab_size: int,
    config: EvaluateConfig,
    generator: torch.Generator | None,
) -> list[int]:
    """What is added to the prompt's `ids`: at most config.new_tokens, up to the end of text. Communicates: as the
    module does."""
    step = config.trainer.tensor_model_parallel_size  # sequence parallelism splits the tokens evenly
    added: list[int] = []
    with torch.no_grad():
        while len(added) < config.new_tokens:
            tokens = ids + added
            padding = [end] * (-len(tokens) % step)  # no token sees what comes after it
            logits = last_logits(core, torch.tensor([tokens + padding]))[0, len(tokens) - 1, :vocab_size].cpu()
            chosen = int(logits.argmax()) if generator is None else drawn(logits, config, generator)
            if chosen == end:
                break
            added.append(chosen)
    return added


def drawn(logits: torch.Tensor, config: EvaluateConfig, generator: torch.Generator) -> int:
    """A token drawn from the likeliest [v] that make up config.top_p of the probability together."""
    ordered, tokens = (logits.double() / config.temperature).softmax(-1).sort(descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered
    kept = torch.where(before < config.top_p, ordered, 0.0)
    return int(tokens[torch.multinomial(kept, 1, generator=generator)])

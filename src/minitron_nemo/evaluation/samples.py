"""What a model writes: continuations of a few prompts, greedy and sampled, for a look.

    prompt      as it was given; with a chat template, what a user says

Communication: that of `runtime/generation.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from megatron.core.models.gpt import GPTModel as MCoreGPTModel

from minitron_nemo.checks import did_you_mean, require
from minitron_nemo.config.stages import EvaluateConfig
from minitron_nemo.runtime.generation import Sampling, generate

if TYPE_CHECKING:
    from minitron_nemo.text.tokenizer import Tokenizer

GREEDY, SAMPLED = "greedy", "sampled"


def require_chat_template(config: EvaluateConfig, tokenizer: Tokenizer) -> None:
    """Raises: ValueError: the tokenizer has none, or none of the name."""
    name, templates = config.chat_template, tokenizer.chat_template
    if name is None:
        return
    said = f"evaluate.chat_template={name}, and the tokenizer of evaluate.model={config.model} has"
    require(bool(templates), f"{said} no chat template. Set it to null.")
    known = list(templates) if isinstance(templates, dict) else []
    require(
        name in ("default", *known),
        f"{said} no template of that name; {did_you_mean(name, ['default', *known])}",
    )


def require_can_sample(config: EvaluateConfig, tokenizer: Tokenizer) -> None:
    """Raises: ValueError: a layout, a tokenizer or a prompt that cannot be continued."""
    if not config.prompts:
        return
    trainer = config.trainer
    require(
        trainer.context_parallel_size == 1 and not trainer.sequence_parallel,
        "evaluate.prompts are continued a token at a time, which cannot be split. Set trainer.sequence_parallel=false "
        "and trainer.context_parallel_size=1, or leave the prompts out.",
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
    """`prompt`, `mode` and `text`, what was added, of every prompt in both modes. Every rank gets the same."""
    if not config.prompts:
        return []
    prompts = [_ids_of(prompt, config, tokenizer) for prompt in config.prompts]
    drawn = Sampling(config.new_tokens, config.temperature, config.top_p, config.seed)
    texts = {
        mode: generate(
            core,
            prompts,
            sampling,
            rows=config.trainer.micro_batch_size,
            decode=lambda ids: tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False),
            end_of_text=tokenizer.eos_token_id,
            vocab_size=vocab_size,
            label=f"samples, {mode}",
        )
        for mode, sampling in ((GREEDY, Sampling(config.new_tokens)), (SAMPLED, drawn))
    }
    return [
        {"prompt": prompt, "mode": mode, "text": texts[mode][number]}
        for number, prompt in enumerate(config.prompts)
        for mode in texts
    ]


def _ids_of(prompt: str, config: EvaluateConfig, tokenizer: Tokenizer) -> list[int]:
    if config.chat_template is None:
        ids: list[int] = tokenizer(prompt).input_ids
        return ids
    said = [{"role": "user", "content": prompt}]
    name = None if config.chat_template == "default" else config.chat_template
    text: Any = tokenizer.apply_chat_template(said, chat_template=name, tokenize=False, add_generation_prompt=True)
    templated: list[int] = tokenizer(text, add_special_tokens=False).input_ids
    return templated

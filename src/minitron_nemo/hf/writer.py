"""A Hugging Face folder under transformers, to be timed: prompts in, so and so many new tokens out. One process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

Write = Callable[[list[list[int]], int], list[list[int]]]
"""(prompts of one length, number of new tokens) -> the new tokens of each, likeliest first, past the end of text."""


def has_weights(folder: Path | str) -> bool:
    """Whether a folder with a config.json also holds what `transformers_writer` loads; pickles are never loaded."""
    return any(Path(folder).glob("*.safetensors"))


def transformers_writer(folder: Path | str, dtype: torch.dtype, device: torch.device) -> Write:
    """The model with its weights, or random ones where the folder has none; it lives as long as the function does."""
    model: Any = _model(folder, dtype, device)
    _writes_on(model)

    @torch.inference_mode()
    def write(prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        tokens = torch.tensor(prompts, device=device)
        written = model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=new_tokens)
        answer: list[list[int]] = written[:, tokens.shape[1] :].tolist()  # waits for the device
        return answer

    return write


def _model(folder: Path | str, dtype: torch.dtype, device: torch.device) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    if has_weights(folder):
        loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True, use_safetensors=True)
        return loaded.to(device).eval()
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def _writes_on(model: Any) -> None:
    """Greedy, and the end of text ends nothing, whatever the folder's generation_config.json says."""
    from transformers import GenerationConfig

    model.generation_config = GenerationConfig(do_sample=False, eos_token_id=None, pad_token_id=0)

"""A Hugging Face folder under vLLM, to be timed; written after vLLM's documentation, and run by nobody yet.

vLLM takes most of the device's memory for its cache whatever the model needs, and queues what does not fit: neither
peak memory nor a largest batch means anything of it.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

from minitron_nemo.checks import require
from minitron_nemo.hf.writer import Write, has_weights


def require_vllm() -> None:
    """Raises: Mistake: it is not installed."""
    require(
        importlib.util.find_spec("vllm") is not None,
        "throughput.engine=vllm needs vLLM, which is not installed. Install it (pip install vllm, in an environment of "
        "its own if it asks for another torch), or set throughput.engine=transformers.",
    )


def vllm_writer(folder: Path | str, dtype: torch.dtype, longest: int) -> Write:
    """The model with its weights, or random ones where the folder has none.

    Args:
        longest: tokens of a prompt and what follows it.
    """
    from vllm import LLM, SamplingParams

    engine = LLM(
        model=str(folder),
        dtype=str(dtype).removeprefix("torch."),
        load_format="auto" if has_weights(folder) else "dummy",
        skip_tokenizer_init=True,
        max_model_len=longest,
        enable_prefix_caching=False,  # a second run would find the prompts of the first
    )

    def write(prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        greedy = SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
        asked = [{"prompt_token_ids": prompt} for prompt in prompts]
        return [list(each.outputs[0].token_ids) for each in engine.generate(asked, greedy, use_tqdm=False)]

    return write

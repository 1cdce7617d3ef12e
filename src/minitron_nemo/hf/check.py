"""The last look at a written Hugging Face checkpoint: is it what transformers will build, and does it say the same?

Names and shapes cost no memory: transformers makes the model of the written config.json on the meta device, and only
the headers of the safetensors are read. For logits and a continued prompt it loads the whole model in float32. Nothing
communicates.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from minitron_nemo.checks import require


def require_as_transformers_builds(path: Path | str) -> None:
    """ValueError unless the tensors in `path` are exactly the parameters of the model its config.json describes.

    Tied weights are written once, under the name of the embedding.
    """
    expected, written = _parameters_of_config(Path(path)), _written_tensors(Path(path))
    problems = [f"{name} is missing" for name in expected if name not in written]
    problems += [f"{name} is not a parameter of the model" for name in written if name not in expected]
    problems += [
        f"{name} has shape {list(written[name])} where config.json makes it {list(shape)}"
        for name, shape in expected.items()
        if name in written and written[name] != shape
    ]
    require(
        not problems,
        f"{path} is not what transformers builds from its config.json: {'; '.join(problems[:5])}"
        f"{f'; and {len(problems) - 5} more' if len(problems) > 5 else ''}. Do not use it; please report the model's "
        "shape.",
    )


@torch.no_grad()
def largest_relative_difference(path: Path | str, tokens: Tensor, logits: Tensor) -> float:
    """max |transformers - logits| / max |logits| over `logits` [b, s, v], another implementation's for `tokens` [b, s].

    Relative, as rounding grows with the logits: real models have logits of 20 to 30 where random ones have about 1.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, local_files_only=True)
    logits = logits.cpu()
    return float((model(tokens).logits - logits).abs().max() / logits.abs().max())


@torch.no_grad()
def continuation(path: Path | str, prompt: str, *, new_tokens: int, seed: int) -> str:
    """The prompt and what the model goes on to say, drawn at temperature 0.7, as far as its context reaches."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, local_files_only=True)
    torch.manual_seed(seed)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    room = max(1, min(new_tokens, model.config.max_position_embeddings - ids.shape[1]))
    written = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        pad_token_id=tokenizer.eos_token_id,
        max_new_tokens=room,
        do_sample=True,
        temperature=0.7,
        top_p=0.9,
    )
    text: str = tokenizer.decode(written[0], skip_special_tokens=True)
    return text


def number_of_parameters(path: Path | str) -> int:
    """Of the model that the folder's config.json describes; a tied weight counts once."""
    return sum(math.prod(shape) for shape in _parameters_of_config(Path(path)).values())


def _parameters_of_config(path: Path) -> dict[str, tuple[int, ...]]:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(path, local_files_only=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}  # tied ones once


def _written_tensors(path: Path) -> dict[str, tuple[int, ...]]:
    written: dict[str, tuple[int, ...]] = {}
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, framework="pt") as shard:
            written |= {name: tuple(shard.get_slice(name).get_shape()) for name in shard.keys()}  # noqa: SIM118
    return written

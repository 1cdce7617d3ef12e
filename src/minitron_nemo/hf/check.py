"""The last look at a written Hugging Face checkpoint: is it, tensor by tensor, what transformers will build?

transformers makes the model of the written config.json on the meta device, which costs no memory, and its parameters'
names and shapes are compared with the headers of the safetensors. Nothing is read but headers; nothing communicates.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open

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

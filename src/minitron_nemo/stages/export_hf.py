"""export-hf: a model artifact in, a Hugging Face checkpoint out.

It counts once its tensors are those that transformers builds from its config.json, and transformers has loaded it and
agrees with Megatron on the logits. One process writes it from the artifact's files, several from the loaded model.

The logits are compared in float32, of a model of plain torch modules without TF32: whatever is left is the order of
sums. Ranks of context parallelism are replicas here: a sample of the check is short, and weights do not know them.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from torch.nn.attention import SDPBackend, sdpa_kernel

from minitron_nemo import engine, platform
from minitron_nemo.artifact import Artifact, open_artifact, writing
from minitron_nemo.checks import require
from minitron_nemo.config.stages import ExportHfConfig
from minitron_nemo.hf.check import continuation, largest_relative_difference, require_as_transformers_builds
from minitron_nemo.hf.checkpoint import save_hf, write_hf
from minitron_nemo.hf.config import hf_config
from minitron_nemo.parallel import Groups, rank_zero_works, world_size
from minitron_nemo.runtime.bridge import stored_parameters
from minitron_nemo.runtime.distributed_checkpoint import stored_dtype
from minitron_nemo.runtime.forward import last_logits
from minitron_nemo.runtime.layout import prepare_layout
from minitron_nemo.runtimes import as_family, opening_problem, renaming

logger = logging.getLogger(__name__)

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def run(config: ExportHfConfig) -> Artifact:
    """Raises: ValueError: config.json and tensors disagree. RuntimeError: transformers and Megatron do. Nothing is left
    behind."""
    source = engine.open_model(config.model, key="export_hf.model", verify=True)
    shape = as_family(source.shape, config.family)
    problem = opening_problem(shape)
    require(
        config.family is not None or problem is None,
        f"{config.model} is {problem}.{renaming(shape)} export_hf.family={shape.family} writes it all the same.",
    )
    dtype = DTYPES[config.dtype]
    hf_config(shape, vocab_size=source.vocab_size, dtype=dtype)  # raises before a model is loaded
    layout = replace(config.trainer, context_parallel_size=1)
    prepare_layout(layout, source.shape, seed=config.seed)
    stored = stored_dtype(source.path)
    if stored.itemsize > dtype.itemsize:
        logger.warning("The weights are stored in %s and exported in %s.", stored, dtype)
    on_disk = world_size() == 1
    core: Any = None
    if config.verify or not on_disk:
        core = engine.open_core(source, layout, torch.float32 if config.verify else dtype, plain=True)
        _round_to(core, dtype)
    output = Path(config.output)
    with writing(output, stage="export-hf", config=config, inputs=source.artifacts) as draft:
        written: dict[str, Any] = {"dtype": dtype, "vocab_size": source.vocab_size, "tokenizer_dir": source.tokenizer}
        if on_disk:
            parameters = stored_parameters(source.path, source.shape, meta_core=engine.meta_core)
            write_hf(parameters, draft.path, shape, **written)
        else:
            save_hf(core, draft.path, shape, Groups.from_megatron(), **written)
        rank_zero_works(partial(require_as_transformers_builds, draft.path))
        draft.metrics.update(parameters=source.shape.num_parameters)
        if config.verify:
            difference = _largest_difference(core, source.vocab_size, draft.path, source.shape.seq_length)
            require(
                difference <= config.tolerance,
                f"The exported model's logits differ from Megatron's by up to {difference:.2e} of the largest logit, "
                f"more than export_hf.tolerance={config.tolerance}. Nothing was exported; please report the model's "
                "shape.",
                RuntimeError,
            )
            draft.metrics["max_relative_logit_difference"] = difference
        if config.prompt is not None:
            write = partial(continuation, draft.path, config.prompt, new_tokens=config.new_tokens, seed=config.seed)
            draft.facts["sample"] = rank_zero_works(write)
    return open_artifact(output)


@torch.no_grad()
def _round_to(core: Any, dtype: torch.dtype) -> None:
    """Give a float32 core the values that are written: a check is of what was made, not of what rounding cost."""
    for parameter in core.parameters():
        parameter.copy_(parameter.to(dtype))


def _largest_difference(core: Any, vocab_size: int, path: Path, seq_length: int) -> float:
    """max |Megatron - transformers| / max |logit| of a fixed random sample, float32, equal on every rank."""
    generator = torch.Generator().manual_seed(0)
    length = min(seq_length, 128) // parallel_state.get_tensor_model_parallel_world_size()
    length *= parallel_state.get_tensor_model_parallel_world_size()  # sequence parallelism splits it
    tokens = torch.randint(0, vocab_size, (2, length), generator=generator)
    with platform.true_float32(), sdpa_kernel(SDPBackend.MATH):  # fused kernels of attention choose their own products
        ours = last_logits(core, tokens)
    return rank_zero_works(lambda: largest_relative_difference(path, tokens, ours[..., :vocab_size]))

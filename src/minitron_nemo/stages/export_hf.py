"""export-hf: a model artifact in, a Hugging Face checkpoint out.

It counts once its tensors are those that transformers builds from its config.json, and transformers has loaded it and
agrees with Megatron on the logits.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state

from minitron_nemo import engine
from minitron_nemo.artifact import Artifact, open_artifact, writing
from minitron_nemo.checks import require
from minitron_nemo.config.stages import ExportHfConfig
from minitron_nemo.hf.check import continuation, largest_logit_difference, require_as_transformers_builds
from minitron_nemo.hf.checkpoint import save_hf
from minitron_nemo.parallel import Groups, rank_zero_works
from minitron_nemo.runtime.forward import last_logits
from minitron_nemo.runtime.layout import prepare_layout

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def run(config: ExportHfConfig) -> Artifact:
    """Raises: ValueError: config.json and tensors disagree. RuntimeError: transformers and Megatron do. Nothing is left
    behind."""
    source = engine.open_model(config.model, key="export_hf.model", trust_checkpoint=config.trust_checkpoint)
    prepare_layout(config.trainer, source.shape, seed=config.seed)
    core = engine.open_core(source, config.trainer, DTYPES[config.dtype])
    output = Path(config.output)
    with writing(output, stage="export-hf", config=config, inputs=source.artifacts) as draft:
        save_hf(
            core,
            draft.path,
            source.shape,
            Groups.from_megatron(),
            vocab_size=source.vocab_size,
            tokenizer_dir=source.tokenizer,
            dtype=DTYPES[config.dtype],
        )
        rank_zero_works(partial(require_as_transformers_builds, draft.path))
        draft.metrics.update(parameters=source.shape.num_parameters)
        if config.verify:
            difference = _largest_difference(core.float(), source.vocab_size, draft.path, source.shape.seq_length)
            require(
                difference <= config.tolerance,
                f"The exported model's logits differ from Megatron's by up to {difference:.2e}, more than "
                f"export_hf.tolerance={config.tolerance}. Nothing was exported; please report the model's shape.",
                RuntimeError,
            )
            draft.metrics["max_logit_difference"] = difference
        if config.prompt is not None:
            write = partial(continuation, draft.path, config.prompt, new_tokens=config.new_tokens, seed=config.seed)
            draft.facts["sample"] = rank_zero_works(write)
    return open_artifact(output)


def _largest_difference(core: Any, vocab_size: int, path: Path, seq_length: int) -> float:
    """max |Megatron - transformers| over the logits of a fixed random sample, float32, equal on every rank."""
    generator = torch.Generator().manual_seed(0)
    length = min(seq_length, 128) // parallel_state.get_tensor_model_parallel_world_size()
    length *= parallel_state.get_tensor_model_parallel_world_size()  # sequence parallelism splits it
    tokens = torch.randint(0, vocab_size, (2, length), generator=generator)
    ours = last_logits(core, tokens)
    return rank_zero_works(lambda: largest_logit_difference(path, tokens, ours[..., :vocab_size]))

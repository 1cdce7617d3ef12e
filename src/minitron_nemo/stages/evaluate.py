"""evaluate: held-out loss and perplexity of a model, over all of the validation text or its first samples."""

from __future__ import annotations

import math
from pathlib import Path

from megatron.core import parallel_state

from minitron_nemo import engine, platform
from minitron_nemo.artifact import Artifact, open_artifact, writing
from minitron_nemo.config.stages import EvaluateConfig
from minitron_nemo.resuming import Unfinished
from minitron_nemo.runtime.forward import loss_sums, mean_loss
from minitron_nemo.runtime.layout import prepare_layout
from minitron_nemo.text.blend import open_blend, require_tokenizer_of, split_prefixes
from minitron_nemo.text.corpus import VALIDATION
from minitron_nemo.text.tokenizer import load_tokenizer
from minitron_nemo.text.windows import batches


def run(config: EvaluateConfig) -> Artifact:
    source = engine.open_model(config.model, key="evaluate.model", trust_checkpoint=config.trust_checkpoint)
    blend = [artifact for artifact, _ in open_blend(config.data)]
    require_tokenizer_of(blend[0], load_tokenizer(source.tokenizer))
    prepare_layout(config.trainer, source.shape, seq_length=config.trainer.seq_length)
    held_out = batches(
        [prefix for artifact in blend for prefix in split_prefixes(artifact, VALIDATION)],
        config.trainer.seq_length,
        config.trainer.micro_batch_size,
        config.num_samples,
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=parallel_state.get_data_parallel_world_size(),
    )
    core = engine.open_core(source, config.trainer, platform.dtype_of(config.trainer.precision))
    name = Path(config.output).name
    output = Path(config.output)
    inputs = [*source.artifacts, *blend]
    unfinished = Unfinished(output, config, inputs)
    one_pass = unfinished.one_pass("held-out loss")
    losses = loss_sums(core, held_out, source.vocab_size, label=name, total=len(held_out), one_pass=one_pass)
    loss, tokens = mean_loss(losses)
    with writing(output, stage="evaluate", config=config, inputs=inputs) as draft:
        draft.facts["model"] = str(source.path)
        draft.metrics.update(
            held_out_loss=loss, perplexity=math.exp(loss), tokens=tokens, parameters=source.shape.num_parameters
        )
    unfinished.clear()
    return open_artifact(output)

"""evaluate: held-out loss and perplexity of a model, over all of the validation text or its first samples.

Beside them, of each source of a blend its own; with a teacher how far the model is from it; and what it writes.
"""

from __future__ import annotations

import json
from pathlib import Path

from minitron_nemo import engine, platform
from minitron_nemo.artifact import Artifact, open_artifact, writing
from minitron_nemo.config.stages import EvaluateConfig
from minitron_nemo.evaluation.held_out import measure_held_out
from minitron_nemo.evaluation.samples import require_can_sample, write_samples
from minitron_nemo.parallel import rank_zero_works
from minitron_nemo.resuming import Unfinished
from minitron_nemo.runtime.layout import prepare_layout
from minitron_nemo.text.blend import held_out_sources, open_blend, require_tokenizer_of
from minitron_nemo.text.tokenizer import load_tokenizer

SAMPLES = "samples.json"


def run(config: EvaluateConfig) -> Artifact:
    source = engine.open_model(config.model, key="evaluate.model")
    teacher = None if config.teacher is None else engine.open_model(config.teacher, key="evaluate.teacher")
    blend = open_blend(config.data)
    tokenizer = load_tokenizer(source.tokenizer)
    require_tokenizer_of(blend[0][0], tokenizer)
    if teacher is not None:
        require_tokenizer_of(blend[0][0], load_tokenizer(teacher.tokenizer))
    require_can_sample(config, tokenizer)
    prepare_layout(config.trainer, source.shape, seq_length=config.trainer.seq_length)
    core = engine.open_core(source, config.trainer, platform.dtype_of(config.trainer.precision))
    output = Path(config.output)
    inputs = [*source.artifacts, *(teacher.artifacts if teacher else []), *(artifact for artifact, _ in blend)]
    unfinished = Unfinished(output, config, inputs)
    texts = held_out_sources(blend, config.trainer.seq_length)
    held_out = measure_held_out(core, source, texts, config, unfinished, teacher=teacher, label=output.name)
    samples = write_samples(core, tokenizer, source.vocab_size, config)
    with writing(output, stage="evaluate", config=config, inputs=inputs) as draft:
        draft.facts["model"] = str(source.path)
        draft.metrics.update(held_out.metrics(), parameters=source.shape.num_parameters)
        if samples:
            rank_zero_works(lambda: (draft.path / SAMPLES).write_text(json.dumps(samples, indent=1) + "\n"))
    unfinished.clear()
    return open_artifact(output)

"""estimate-importance: one forward-only pass over calibration samples; scores for every named axis out."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

from minitron_nemo import engine, platform
from minitron_nemo.artifact import Artifact, open_artifact, writing
from minitron_nemo.config.importance import ACCURACY
from minitron_nemo.config.stages import EstimateImportanceConfig
from minitron_nemo.evaluation.questions import open_questions
from minitron_nemo.importance.depth import require_depth_fits
from minitron_nemo.parallel import rank_zero_works
from minitron_nemo.resuming import Unfinished
from minitron_nemo.runtime.depth_sweep import estimate_depth
from minitron_nemo.runtime.layout import prepare_layout
from minitron_nemo.stages.scoring import Calibration


def run(config: EstimateImportanceConfig) -> Artifact:
    source = engine.open_model(config.model, key="estimate_importance.model")
    trainer, depth, samples = config.trainer, config.depth, config.importance.num_samples
    calibration = Calibration(
        config.importance,
        config.data,
        source.tokenizer,
        seq_length=trainer.seq_length,
        micro_batch_size=trainer.micro_batch_size,
        seed=config.seed,
    )
    blend, questions = calibration.blend, []
    require_depth_fits(depth, source.shape)
    if depth.task is not None:
        questions = open_questions(
            depth.task, calibration.encoder, seq_length=source.shape.seq_length, key="depth.task"
        )
    prepare_layout(trainer, source.shape, seq_length=trainer.seq_length, seed=config.seed)
    width_samples = calibration.samples(samples)
    depth_samples = calibration.samples(depth.num_samples) if depth.reads_samples else []
    core = engine.open_core(source, trainer, platform.dtype_of(trainer.precision))
    output, inputs = Path(config.output), [*source.artifacts, *blend]
    unfinished = Unfinished(output, config, inputs)
    started = time.time()
    importance = calibration.score(
        core, source.shape, width_samples, {"model": source.path.name}, unfinished.one_pass("width")
    )
    seconds = time.time() - started
    if depth.is_asked_for:
        started = time.time()
        scores = estimate_depth(
            core,
            source.shape,
            depth_samples,
            depth,
            questions=questions,
            micro_batch_size=trainer.micro_batch_size,
            vocab_size=source.vocab_size,
            total=calibration.num_batches(depth.num_samples),
            unfinished=unfinished,
        )
        means_over = {metric: len(questions) if metric == ACCURACY else depth.num_samples for metric in depth.metrics}
        importance = replace(importance, depth=scores, depth_samples=means_over)
        depth_seconds = time.time() - started
    with writing(output, stage="estimate-importance", config=config, inputs=inputs) as draft:
        rank_zero_works(lambda: importance.save(draft.path))
        draft.metrics.update(samples=samples, tokens=samples * trainer.seq_length, estimation_seconds=round(seconds, 1))
        if depth.is_asked_for:
            draft.metrics.update(
                depth_samples=depth.num_samples if depth.reads_samples else 0,
                depth_questions=len(questions),
                depth_seconds=round(depth_seconds, 1),
            )
    unfinished.clear()
    return open_artifact(output)

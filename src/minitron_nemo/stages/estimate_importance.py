"""estimate-importance: one forward-only pass over calibration samples; scores for every named axis out."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

from megatron.core import parallel_state
from torch import Tensor

from minitron_nemo.artifact import Artifact, open_artifact, writing
from minitron_nemo.engine.calibration import calibration_batches
from minitron_nemo.engine.checkpoint import open_model
from minitron_nemo.engine.data import TRAIN, DataConfig, batches, require_tokenizer_of, split_prefixes
from minitron_nemo.engine.depth import estimate_depth
from minitron_nemo.engine.distributed import is_rank_zero
from minitron_nemo.engine.forward import estimate_importance, open_core
from minitron_nemo.engine.multiple_choice import read_questions
from minitron_nemo.engine.tokenizer import load_tokenizer, tokenizer_digest
from minitron_nemo.engine.training import TrainerConfig
from minitron_nemo.importance import ImportanceConfig
from minitron_nemo.importance.depth import DepthConfig
from minitron_nemo.stages.training import config_dict, prepare_layout


@dataclass
class EstimateImportanceConfig:
    model: str = ""
    """Model artifact to score; the corrected teacher."""
    importance: ImportanceConfig = field(default_factory=ImportanceConfig)
    depth: DepthConfig = field(default_factory=DepthConfig)
    """Scores of layers and blocks of layers; none unless it names metrics."""
    trust_checkpoint: bool = False
    seed: int = 1234
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    output: str = "runs/importance"


def run(config: EstimateImportanceConfig) -> Artifact:
    source = open_model(config.model, key="estimate_importance.model", trust_checkpoint=config.trust_checkpoint)
    tokenizer, from_file = load_tokenizer(source.tokenizer), config.importance.calibration
    blend = [artifact for artifact, _ in config.data.blend()] if from_file is None else []
    for artifact in blend[:1]:
        require_tokenizer_of(artifact, tokenizer)
    depth, questions = config.depth, []
    depth.require_fits(source.shape)
    if depth.task is not None:
        questions = read_questions(
            depth.task,
            lambda text: tokenizer.tokenizer.encode(text, add_special_tokens=False),
            end_of_text=tokenizer.tokenizer.eos_token_id,
            seq_length=source.shape.seq_length,
        )
    prepare_layout(config.trainer, source.shape, seed=config.seed)
    trainer, samples = config.trainer, config.importance.num_samples
    dp_size = parallel_state.get_data_parallel_world_size()

    def calibration(num_samples: int) -> Iterable[dict[str, Tensor]]:
        share = {"dp_rank": parallel_state.get_data_parallel_rank(), "dp_size": dp_size, "seed": config.seed}
        if from_file is not None:
            return calibration_batches(
                from_file,
                lambda text: tokenizer.tokenizer.encode(text, add_special_tokens=False),
                end_of_text=tokenizer.tokenizer.eos_token_id,
                seq_length=trainer.seq_length,
                micro_batch_size=trainer.micro_batch_size,
                num_samples=num_samples,
                count_prompts=config.importance.count_prompts,
                **share,
            )
        prefixes = [prefix for artifact in blend for prefix in split_prefixes(artifact, TRAIN)]
        return batches(prefixes, trainer.seq_length, trainer.micro_batch_size, num_samples, **share)

    width_samples, depth_samples = calibration(samples), calibration(depth.num_samples) if depth.reads_samples else []
    core = open_core(source, trainer)
    started = time.time()
    importance = estimate_importance(
        core,
        source.shape,
        width_samples,
        config.importance,
        total=-(-samples // (trainer.micro_batch_size * dp_size)),
        seed=config.seed,
        origin={"model": str(source.path), "seq_length": trainer.seq_length, "seed": config.seed},
    )
    importance = replace(importance, tokenizer_digest=tokenizer_digest(source.tokenizer))
    seconds = time.time() - started
    if depth.metrics:
        started = time.time()
        scores = estimate_depth(
            core,
            source.shape,
            depth_samples,
            depth,
            questions=questions,
            micro_batch_size=trainer.micro_batch_size,
            vocab_size=source.vocab_size,
            total=depth.num_samples // (trainer.micro_batch_size * dp_size),
        )
        importance = replace(importance, depth=scores)
        depth_seconds = time.time() - started
    output = Path(config.output)
    inputs = [*source.artifacts, *blend]
    with writing(output, stage="estimate-importance", config=config_dict(config), inputs=inputs) as draft:
        if is_rank_zero():
            importance.save(draft.path)
        draft.metrics.update(samples=samples, tokens=samples * trainer.seq_length, estimation_seconds=round(seconds, 1))
        if depth.metrics:
            draft.metrics.update(
                depth_samples=depth.num_samples if depth.reads_samples else 0,
                depth_questions=len(questions),
                depth_seconds=round(depth_seconds, 1),
            )
    return open_artifact(output)

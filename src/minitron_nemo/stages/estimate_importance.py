"""estimate-importance: one forward-only pass over calibration samples; scores for every named axis out."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

from megatron.core import parallel_state

from minitron_nemo.artifact import Artifact, open_artifact, writing
from minitron_nemo.engine.checkpoint import open_model
from minitron_nemo.engine.data import TRAIN, DataConfig, batches, require_tokenizer_of, split_prefixes
from minitron_nemo.engine.distributed import is_rank_zero
from minitron_nemo.engine.forward import estimate_importance, open_core
from minitron_nemo.engine.tokenizer import load_tokenizer
from minitron_nemo.engine.training import TrainerConfig
from minitron_nemo.importance import ImportanceConfig
from minitron_nemo.stages.training import config_dict, prepare_layout


@dataclass
class EstimateImportanceConfig:
    model: str = ""
    """Model artifact to score; the corrected teacher."""
    importance: ImportanceConfig = field(default_factory=ImportanceConfig)
    trust_checkpoint: bool = False
    seed: int = 1234
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    output: str = "runs/importance"


def run(config: EstimateImportanceConfig) -> Artifact:
    source = open_model(config.model, key="estimate_importance.model", trust_checkpoint=config.trust_checkpoint)
    blend = [artifact for artifact, _ in config.data.blend()]
    require_tokenizer_of(blend[0], load_tokenizer(source.tokenizer))
    prepare_layout(config.trainer, source.shape, seed=config.seed)
    trainer, samples = config.trainer, config.importance.num_samples
    dp_size = parallel_state.get_data_parallel_world_size()
    calibration = batches(
        [prefix for artifact in blend for prefix in split_prefixes(artifact, TRAIN)],
        trainer.seq_length,
        trainer.micro_batch_size,
        samples,
        seed=config.seed,
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=dp_size,
    )
    core = open_core(source, trainer)
    started = time.time()
    importance = estimate_importance(
        core,
        source.shape,
        calibration,
        config.importance,
        total=samples // (trainer.micro_batch_size * dp_size),
        origin={"model": str(source.path), "seq_length": trainer.seq_length, "seed": config.seed},
    )
    seconds = time.time() - started
    output = Path(config.output)
    inputs = [*source.artifacts, *blend]
    with writing(output, stage="estimate-importance", config=config_dict(config), inputs=inputs) as draft:
        if is_rank_zero():
            importance.save(draft.path)
        draft.metrics.update(samples=samples, tokens=samples * trainer.seq_length, estimation_seconds=round(seconds, 1))
    return open_artifact(output)

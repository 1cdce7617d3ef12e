"""prune: importance and a target shape in; the plan and the smaller model out. The teacher is not changed."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minitron_nemo.artifact import Artifact, open_artifact, writing
from minitron_nemo.checks import require
from minitron_nemo.engine.checkpoint import open_model, save_model
from minitron_nemo.engine.distributed import is_rank_zero
from minitron_nemo.engine.forward import new_core, open_core
from minitron_nemo.engine.training import TrainerConfig
from minitron_nemo.importance import Importance
from minitron_nemo.parallel import Groups
from minitron_nemo.pruning import plan_from_importance, prune_into
from minitron_nemo.stages.training import config_dict, prepare_layout


@dataclass
class PruneConfig:
    model: str = ""
    """Model artifact to prune; the corrected teacher."""
    importance: str = ""
    """estimate-importance artifact of a model of the same shape."""
    target: dict[str, int] = field(default_factory=dict)
    """Dims of the student: num_layers, hidden_size, ffn_hidden_size, num_attention_heads, num_query_groups. Those left
    out stay as they are."""
    layers: list[int] | None = None
    """Kept layers, from 0; needed where target.num_layers is smaller than the model's."""
    batch_aggregation: str = "l2"
    sequence_aggregation: str = "mean"
    trust_checkpoint: bool = False
    seed: int = 1234
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    output: str = "runs/student_pruned"


def run(config: PruneConfig) -> Artifact:
    """Raises: ValueError, FileNotFoundError: a target or an importance that does not fit; nothing is written then."""
    source = open_model(config.model, key="prune.model", trust_checkpoint=config.trust_checkpoint)
    scores = open_artifact(config.importance, made_by=["estimate-importance"], key="prune.importance")
    require(
        bool(config.target) or config.layers is not None,
        "prune.target is empty: nothing would be pruned. Set for example prune.target.hidden_size=3072.",
    )
    dims: dict[str, Any] = dict(config.target)
    if config.layers is not None:
        dims.setdefault("num_layers", len(config.layers))
    target = source.shape.pruned_to(**dims)
    target.require_splits_over(config.trainer.tensor_model_parallel_size, config.trainer.pipeline_model_parallel_size)
    plan = plan_from_importance(
        Importance.load(scores.path),
        source.shape,
        target,
        batch_aggregation=config.batch_aggregation,
        sequence_aggregation=config.sequence_aggregation,
        layers=config.layers,
    )
    prepare_layout(config.trainer, source.shape, seed=config.seed)
    teacher, student = open_core(source, config.trainer), new_core(target, config.trainer)
    prune_into(teacher, student, plan, Groups.from_megatron())
    output = Path(config.output)
    inputs = [*source.artifacts, scores]
    with writing(output, stage="prune", config=config_dict(config), inputs=inputs) as draft:
        save_model(student, target, source.tokenizer, draft.path)
        if is_rank_zero():
            plan.save(draft.path)
        draft.facts["vocab_size"] = source.vocab_size
        draft.metrics.update(
            parameters=target.num_parameters,
            non_embedding_parameters=target.num_non_embedding_parameters,
            parameters_of_source=source.shape.num_parameters,
            tokens=0,
        )
    return open_artifact(output)

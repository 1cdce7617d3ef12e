"""prune: importance and a target in; the plan and the smaller model out. The teacher is not changed."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path

from megatron.core.models.gpt import GPTModel as MCoreGPTModel
from torch import Tensor

from minitron_nemo.artifact import Artifact, open_artifact, writing
from minitron_nemo.checks import require
from minitron_nemo.engine.checkpoint import ModelInput, open_model, save_model
from minitron_nemo.engine.distributed import is_rank_zero
from minitron_nemo.engine.forward import new_core, open_core
from minitron_nemo.engine.offline import prune_checkpoint
from minitron_nemo.engine.tokenizer import tokenizer_digest
from minitron_nemo.engine.training import TrainerConfig
from minitron_nemo.importance import Importance
from minitron_nemo.parallel import Groups
from minitron_nemo.pruning import DepthChoice, PruningPlan, kept_layers, plan_from_importance, prune_into
from minitron_nemo.pruning.iterative import plan_in_rounds, targets_of_rounds
from minitron_nemo.pruning.targets import BudgetConfig, resolve_target
from minitron_nemo.shape import ModelShape
from minitron_nemo.stages.scoring import Calibration
from minitron_nemo.stages.training import config_dict, prepare_layout


@dataclass
class PruneConfig:
    model: str = ""
    """Model artifact to prune; the corrected teacher."""
    importance: str = ""
    """estimate-importance artifact of a model of the same shape."""
    plan: str | None = None
    """A plan's folder (one that prune wrote, or an edited copy) to follow instead of importance and target."""
    target: dict[str, int] = field(default_factory=dict)
    """Dims of the student: num_layers, hidden_size, ffn_hidden_size, num_attention_heads, num_query_groups, and of
    experts num_moe_experts, moe_ffn_hidden_size, moe_shared_expert_intermediate_size. Those left out stay as they
    are."""
    keep: dict[str, float] = field(default_factory=dict)
    """The same dims as fractions of the model's."""
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    """What the student may cost in all; resolves dims that target and keep leave open."""
    multiple_of: dict[str, int] = field(default_factory=dict)
    """Rounds these dims to multiples that hardware and tensor parallelism like."""
    layers: list[int] | None = None
    """Kept layers, from 0. Where fewer layers are kept, they or depth.metric say which."""
    depth: DepthChoice = field(default_factory=DepthChoice)
    """Which layers go, by their scores."""
    batch_aggregation: str = "l2"
    sequence_aggregation: str = "mean"
    rounds: int = 1
    """Cut the width to its target in so many equal steps, at least 1, and score what is left before each but the first,
    as the importance was estimated; layers go in the last."""
    merge_heads: bool = False
    """Merge each dropped query head into a kept one of its group (arXiv:2407.14679, section 2.3)."""
    offline: bool = False
    """Cut the checkpoint on disk piece by piece in one process, never holding a model; for machines smaller than it."""
    trust_checkpoint: bool = False
    seed: int = 1234
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    output: str = "runs/student_pruned"

    def __post_init__(self) -> None:
        require(self.rounds >= 1, f"prune.rounds={self.rounds} must be at least 1; 1 prunes in one shot.")
        hindrances = {
            "prune.plan is set, which says already what is kept": self.plan is not None,
            "prune.offline=true never holds a model, and each round scores one": self.offline,
            "prune.merge_heads=true changes heads, and the rounds are put together into one cut": self.merge_heads,
        }
        for hindrance, stands in hindrances.items():
            works = self.rounds == 1 or not stands
            require(works, f"prune.rounds={self.rounds}, but {hindrance}. Give up one of them.")


def run(config: PruneConfig) -> Artifact:
    """Raises: ValueError, FileNotFoundError: a target or an importance that does not fit; nothing is written then."""
    source = open_model(config.model, key="prune.model", trust_checkpoint=config.trust_checkpoint)
    trainer, rounds = config.trainer, None
    if config.plan is not None:
        plan, inputs = PruningPlan.load(config.plan), list(source.artifacts)
    else:
        scores = open_artifact(config.importance, made_by=["estimate-importance"], key="prune.importance")
        importance = Importance.load(scores.path)
        _require_same_tokenizer(importance, source)
        plan, inputs = plan_of(config, importance, source.shape), [*source.artifacts, scores]
        if config.rounds > 1:
            rounds = Rounds(
                config,
                importance,
                plan,
                Calibration.of_artifact(scores, source.tokenizer, micro_batch_size=trainer.micro_batch_size),
            )
    target = plan.target
    for shape in [target] if rounds is None else rounds.targets:
        shape.require_splits_over(
            trainer.tensor_model_parallel_size,
            trainer.pipeline_model_parallel_size,
            trainer.expert_model_parallel_size,
        )
    if not config.offline:
        prepare_layout(trainer, source.shape, seed=config.seed)
        samples = [] if rounds is None else rounds.samples()
        teacher = open_core(source, trainer)
        if rounds is not None:
            plan = rounds.plan(teacher, samples)
        student = cut(teacher, plan, trainer)
    with writing(config.output, stage="prune", config=config_dict(config), inputs=inputs) as draft:
        if config.offline:
            prune_checkpoint(source, plan, draft.path)
        else:
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
    return open_artifact(Path(config.output))


class Rounds:
    """A pruning whose width is scored again between steps; what can be checked before a model is loaded, is."""

    def __init__(
        self, config: PruneConfig, importance: Importance, one_shot: PruningPlan, calibration: Calibration
    ) -> None:
        """
        Args:
            importance: scores of the intact model.
            one_shot: the plan of a single round; says the target and, as layers are scored once, which of them stay.
            calibration: of `importance`.
        Raises: ValueError: a target without a smaller width.
        """
        source, target = one_shot.source, one_shot.target
        require(
            any(getattr(source, dim) != getattr(target, dim) for dim in source.prunable_dims if dim != "num_layers"),
            f"prune.rounds={config.rounds} cuts the width in steps, but the target only drops layers. Set "
            "prune.rounds=1, and estimate importance with depth.greedy to score layers again after every drop.",
        )
        trainer = config.trainer
        multiple = math.lcm(trainer.tensor_model_parallel_size, trainer.expert_model_parallel_size)
        self.targets = targets_of_rounds(source, target, config.rounds, multiple=multiple)
        self._config, self._importance, self._one_shot, self._calibration = config, importance, one_shot, calibration

    def samples(self) -> list[dict[str, Tensor]]:
        """This data-parallel rank's calibration micro-batches, which every round reads. Needs the layout."""
        return list(self._calibration.samples(self._calibration.config.num_samples))

    def plan(self, teacher: MCoreGPTModel, samples: list[dict[str, Tensor]]) -> PruningPlan:
        """The plan from teacher to target. Every round cuts a student out of the teacher, scores it and lets it go.

        Communicates: as `prune_into` and `Calibration.score`, once per round but the first.
        """
        config, origin = self._config, self._one_shot.origin

        def score(plan: PruningPlan) -> Importance:
            student = cut(teacher, plan, config.trainer)
            return self._calibration.score(student, plan.target, samples, {"model": origin.get("model")})

        plan = plan_in_rounds(
            self._importance,
            self.targets,
            score,
            layers=self._one_shot.layer.tolist(),
            batch_aggregation=config.batch_aggregation,
            sequence_aggregation=config.sequence_aggregation,
        )
        return replace(plan, origin={**plan.origin, "depth": origin["depth"]})


def cut(teacher: MCoreGPTModel, plan: PruningPlan, trainer: TrainerConfig) -> MCoreGPTModel:
    """This rank's part of the student. Communicates: see `prune_into`."""
    student = new_core(plan.target, trainer)
    prune_into(teacher, student, plan, Groups.from_megatron())
    return student


def plan_of(config: PruneConfig, importance: Importance, source: ModelShape) -> PruningPlan:
    """The plan that the config asks for.

    Raises: ValueError: nothing to prune, or a target that does not fit.
    """
    require(
        bool(config.target) or bool(config.keep) or config.budget.cost is not None or config.layers is not None,
        "prune.target is empty: nothing would be pruned. Set for example prune.target.hidden_size=3072, "
        "prune.keep.ffn_hidden_size=0.6 or prune.budget.parameters=4.5B.",
    )
    dims, layers, base = dict(config.target), config.layers, source
    if layers is not None:
        dims.setdefault("num_layers", len(layers))
    if source.moe_layer_freq is not None and "num_layers" in dims:  # which layers stay decides how many have experts
        layers = kept_layers(importance, source, dims.pop("num_layers"), layers=layers, depth=config.depth)
        base = source.keeping_layers(layers)
    target = resolve_target(base, target=dims, keep=config.keep, budget=config.budget, multiple_of=config.multiple_of)
    return plan_from_importance(
        importance,
        source,
        target,
        batch_aggregation=config.batch_aggregation,
        sequence_aggregation=config.sequence_aggregation,
        layers=layers,
        depth=config.depth,
        merge_heads=config.merge_heads,
    )


def _require_same_tokenizer(importance: Importance, source: ModelInput) -> None:
    mine, theirs = tokenizer_digest(source.tokenizer), importance.tokenizer_digest
    require(
        theirs is None or theirs == mine,
        f"prune.importance was estimated with another tokenizer (digest {str(theirs)[:12]}) than the one of "
        f"prune.model={source.path} ({mine[:12]}): its samples were other tokens. Estimate importance on this model.",
    )

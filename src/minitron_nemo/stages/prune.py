"""prune: importance and a target in; the plan and the smaller model out. The teacher is not changed."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel as MCoreGPTModel
from torch import Tensor

from minitron_nemo import engine, platform
from minitron_nemo.artifact import Artifact, open_artifact, writing
from minitron_nemo.checks import require
from minitron_nemo.config.stages import PruneConfig
from minitron_nemo.parallel import Groups, agree, is_rank_zero, rank_zero_works, world_size
from minitron_nemo.plan import PruningPlan
from minitron_nemo.pruning import plan_from_importance
from minitron_nemo.pruning.basis import principal_basis, read_basis, reading_moment, stream_moments
from minitron_nemo.pruning.compensation import compensate
from minitron_nemo.pruning.composition import joined, split
from minitron_nemo.pruning.depth_correction import correct_depth
from minitron_nemo.pruning.second_moments import CalibrationPass
from minitron_nemo.pruning.sequential import refit_sequentially
from minitron_nemo.resuming import OnePass
from minitron_nemo.runtime.checkpoint_surgery import prune_checkpoint
from minitron_nemo.runtime.distributed_checkpoint import stored_dtype
from minitron_nemo.runtime.forward import run_forward
from minitron_nemo.runtime.layout import prepare_layout, require_splits
from minitron_nemo.runtime.model_artifact import ModelInput
from minitron_nemo.runtime.own_process import in_own_process
from minitron_nemo.runtimes import as_family, require_opens, suits
from minitron_nemo.scores import STREAM, Importance
from minitron_nemo.shape import ModelShape
from minitron_nemo.stages.rounds import Rounds, cut, plan_of_rank_zero
from minitron_nemo.stages.scoring import Calibration
from minitron_nemo.stages.settling import settle
from minitron_nemo.text.tokenizer_files import tokenizer_digest

logger = logging.getLogger(__name__)


def run(config: PruneConfig) -> Artifact:
    """Offline under several ranks, rank 0 works in a process of its own, while the others wait.

    Raises: ValueError, FileNotFoundError: a target or an importance that does not fit; nothing is written then.
    """
    if config.offline and world_size() > 1:
        return rank_zero_works(partial(in_own_process, run, config))
    source = engine.open_model(config.model, key="prune.model")
    job = Job(config, source)
    for shape in job.targets:
        require_splits(shape, config.trainer)
    fitting = suits(job.target)
    if is_rank_zero():
        for runtime, words in fitting.items():
            print(f"student's dims and {runtime}: {words}", file=sys.stderr, flush=True)
    student, plan = None, job.plan
    facts: dict[str, Any] = {}
    if not config.offline:
        prepare_layout(config.trainer, source.shape)
        job.draw_samples()
        teacher = engine.open_core(source, config.trainer, _dtype(source, config.trainer.precision))
        plan = job.plan_for(teacher)
        student, plan, facts = job.cut(teacher, plan)
    assert plan is not None
    with writing(config.output, stage="prune", config=config, inputs=job.inputs) as draft:
        if student is None:
            prune_checkpoint(source, plan, draft.path, meta_core=engine.meta_core)
            engine.describe_model(plan.target, source.tokenizer, draft.path)
        else:
            engine.save_model(student, plan.target, source.tokenizer, draft.path)
        rank_zero_works(partial(plan.save, draft.path))
        draft.facts["vocab_size"] = source.vocab_size
        draft.facts["suits"] = fitting
        draft.facts.update(facts)
        draft.metrics.update(
            parameters=plan.target.num_parameters,
            non_embedding_parameters=plan.target.num_non_embedding_parameters,
            parameters_of_source=source.shape.num_parameters,
            tokens=0,
        )
    return open_artifact(Path(config.output))


def _dtype(source: ModelInput, precision: str) -> torch.dtype:
    """As the model is stored, so that the student is the same on every machine, or as asked."""
    if precision != "auto":
        return platform.dtype_of(precision)
    stored = stored_dtype(source.path)
    return torch.float32 if stored is torch.float16 else stored  # Megatron calibrates in bf16 or fp32


class Scores:
    """What an importance artifact says of a model, read once for however many cuts of it."""

    def __init__(self, config: PruneConfig, source: ModelInput) -> None:
        """Raises: ValueError, FileNotFoundError: it is none, or was estimated with another tokenizer."""
        self.artifact = open_artifact(config.importance, made_by=["estimate-importance"], key="prune.importance")
        self.importance = Importance.load(self.artifact.path)
        self._source, self._micro_batch_size = source, config.trainer.micro_batch_size
        self._bases: dict[tuple[int, bool], Tensor] = {}
        _require_same_tokenizer(self.importance, source)

    @cached_property
    def calibration(self) -> Calibration:
        """Raises: as `Calibration.of_artifact`."""
        return Calibration.of_artifact(self.artifact, self._source.tokenizer, micro_batch_size=self._micro_batch_size)

    def measure_stream(self, teacher: MCoreGPTModel) -> None:
        """Add the residual stream's moments to the scores, unless they are there. Communicates: a pass."""
        if STREAM not in self.importance.moments:
            moments = self.calibration.stream_moments(teacher, self._source.shape)
            self.importance = replace(self.importance, moments={**self.importance.moments, **moments})

    def basis(self, second_moment: Tensor, keep: int, *, keeps_mean: bool) -> Tensor:
        """The principal axes of the stream, made once."""
        if (keep, keeps_mean) not in self._bases:
            make = partial(principal_basis, second_moment, keep, keeps_mean=keeps_mean)
            self._bases[keep, keeps_mean] = shared_basis(make, len(second_moment), keep)
        return self._bases[keep, keeps_mean]


def shared_basis(make: Callable[[], Tensor], channels: int, keep: int) -> Tensor:
    """A basis [channels, keep], made by rank 0 alone: it takes minutes of every core, and of nearly equal axes another
    processor may find others. Communicates: all ranks."""
    made: list[Tensor] = []
    rank_zero_works(lambda: made.append(make()))
    basis = made[0] if made else torch.empty(channels, keep, dtype=torch.float64)
    # contiguous: a broadcast sends memory as it lies, and the axes of a decomposition lie in columns
    return agree(basis.contiguous().to(platform.device())).cpu()


class Job:
    """One pruning; what can be checked before a model is loaded, is checked when it is made."""

    def __init__(self, config: PruneConfig, source: ModelInput, scores: Scores | None = None) -> None:
        """
        Args:
            scores: of `config.importance`, where several cuts share them.
        Raises: ValueError, FileNotFoundError: as `run`.
        """
        self._source = source
        self._scores: Scores | None = None
        self._calibration: Calibration | None = None
        self._rounds: Rounds | None = None
        self.inputs = list(source.artifacts)
        self.plan: PruningPlan | None = None
        """None: it takes a pass over the model first."""
        if config.plan is not None:
            self.plan = PruningPlan.load(config.plan)
            self.target = as_family(self.plan.target, config.family)
            self.plan = replace(self.plan, target=self.target)
            basis = "rotation" if self.plan.has_basis else "channels"
            config = replace(config, surgery=config.surgery.settled(source.shape, self.target, basis=basis))
        if self.plan is None or config.surgery.runs_model(source.shape, self.target):
            self._scores = scores or Scores(config, source)
            self.inputs.append(self._scores.artifact)
        if self.plan is None:
            assert self._scores is not None
            config, self.target, self._layers = settle(config, self._scores.importance, source.shape)
        self._config = config
        if self.plan is None and (config.offline or not self._lacks_stream):
            self.plan = self._plan_of_importance()
        require_opens(self.target, source.shape)
        runs_model = config.surgery.runs_model(source.shape, self.target)
        require(
            not (runs_model and config.offline),
            "prune.surgery fits weights to calibration samples, which takes passes over the model, and "
            "prune.offline=true never holds one. Set prune.surgery.compensate=false, "
            "prune.surgery.correct_depth=false and prune.surgery.refit=none, or prune.offline=false.",
        )
        if runs_model or config.rounds > 1 or self.plan is None:
            assert self._scores is not None
            self._calibration = self._scores.calibration
        if config.rounds > 1:
            assert self._scores is not None and self._calibration is not None and self.plan is not None
            self._rounds = Rounds(config, self._scores.importance, self.plan, self._calibration)

    @property
    def targets(self) -> list[ModelShape]:
        """Shapes of all models that are made."""
        return [self.target] if self._rounds is None else self._rounds.targets

    @property
    def _lacks_stream(self) -> bool:
        needs = self._config.surgery.needs_stream(self._source.shape, self.target)
        return needs and self._scores is not None and STREAM not in self._scores.importance.moments

    def draw_samples(self) -> None:
        """Where a pass needs them; what is wrong with them is said before a model is loaded. Needs the layout."""
        if self._calibration is not None:
            _ = self._calibration.drawn

    def plan_for(self, teacher: MCoreGPTModel) -> PruningPlan:
        """Communicates: where the plan takes passes over models, as those; the plan, from rank 0 to all."""
        if self._rounds is not None:
            return self._rounds.plan(teacher)
        if self.plan is None:
            assert self._scores is not None
            self._scores.measure_stream(teacher)
            self.plan = self._plan_of_importance()
        return plan_of_rank_zero(self.plan)

    def cut(self, teacher: MCoreGPTModel, plan: PruningPlan) -> tuple[MCoreGPTModel, PruningPlan, dict[str, Any]]:
        """This rank's part of the student, the plan it follows, and what fitting its weights came to.

        Args:
            teacher: what stands in for dropped layers is fitted in this copy of it, and all that a sequential refit
                changes.
        Communicates: see `correct_depth`, `prune_into`, `compensate` and `refit_sequentially`.
        """
        trainer, surgery, groups = self._config.trainer, self._config.surgery, Groups.from_megatron()
        facts: dict[str, Any] = {}
        if surgery.refits(plan.source, plan.target):
            return self._refit(teacher, plan)
        if surgery.corrects_depth(plan.source, plan.target):
            config = surgery.depth_correction
            run = self._passes(teacher, config.num_samples, "depth correction")
            facts["depth_correction"] = [asdict(each) for each in correct_depth(teacher, plan, groups, run, config)]
        if not surgery.compensates(plan.source, plan.target):
            return cut(teacher, plan, trainer), plan, facts
        of_stream, of_blocks = split(plan)
        between = cut(teacher, of_stream, trainer)
        run, fit = self._passes(between, surgery.compensation.num_samples, "compensation"), surgery.compensation
        if self._config.plan is not None:
            fit = replace(fit, selection="scores")  # a plan that is given is followed
        refitted = compensate(between, of_blocks, groups, run, fit)
        facts["compensation"] = [asdict(each) for each in refitted.linears]
        return cut(between, refitted.plan, trainer), joined(plan, refitted.plan), facts

    def _refit(self, teacher: MCoreGPTModel, plan: PruningPlan) -> tuple[MCoreGPTModel, PruningPlan, dict[str, Any]]:
        config = self._config.surgery.sequential
        if self._config.plan is not None:
            config = replace(config, selection="scores")  # a plan that is given is followed
        groups = Groups.from_megatron()
        if config.chooses and plan.has_basis and plan.source.normalization == "RMSNorm":
            plan = replace(plan, hidden=self._read_basis(teacher, plan, groups))
        run = self._passes(teacher, config.num_samples, "sequential refit")
        found = refit_sequentially(teacher, plan, groups, run, config)
        student = cut(teacher, found.plan, self._config.trainer)
        found.finish(student)
        return student, found.plan, {"sequential_refit": [asdict(each) for each in found.places]}

    def _read_basis(self, teacher: MCoreGPTModel, plan: PruningPlan, groups: Groups) -> Tensor:
        """Communicates: the teacher's parameters, and the basis from rank 0 to all."""
        assert self._scores is not None
        stream, _ = stream_moments(self._scores.importance)
        reading = reading_moment(teacher, plan, stream, groups)
        return shared_basis(partial(read_basis, stream, reading, plan.target.hidden_size), *plan.hidden.shape)

    def _passes(self, core: MCoreGPTModel, num_samples: int, label: str) -> CalibrationPass:
        """Forward passes over the first of the drawn samples."""
        assert self._calibration is not None
        samples = self._calibration.drawn[: self._calibration.num_batches(num_samples)]

        def run(before: Callable[[dict[str, Tensor]], None]) -> None:
            run_forward(core, samples, before=before, label=label, total=len(samples), one_pass=OnePass(label))

        return run

    def _plan_of_importance(self) -> PruningPlan:
        """Communicates: a basis, from rank 0 to all."""
        config = self._config
        assert self._scores is not None
        return plan_from_importance(
            self._scores.importance,
            self._source.shape,
            self.target,
            batch_aggregation=config.batch_aggregation,
            sequence_aggregation=config.sequence_aggregation,
            layers=self._layers,
            depth=config.depth,
            merge_heads=config.merge_heads,
            surgery=config.surgery,
            basis=self._scores.basis,
        )


def _require_same_tokenizer(importance: Importance, source: ModelInput) -> None:
    mine, theirs = tokenizer_digest(source.tokenizer), importance.tokenizer_digest
    require(
        theirs is None or theirs == mine,
        f"prune.importance was estimated with another tokenizer (digest {str(theirs)[:12]}) than the one of "
        f"prune.model={source.path} ({mine[:12]}): its samples were other tokens. Estimate importance on this model.",
    )

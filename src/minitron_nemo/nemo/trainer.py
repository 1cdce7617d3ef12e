"""Training any of our NeMo models: NeMo's trainer and strategy, our layout, resume and history.

There is no training loop here. `fit` builds an `nl.Trainer` over an `nl.MegatronStrategy`, resumes from the newest
complete checkpoint beside the output, and leaves the trained weights in `model`.
"""

from __future__ import annotations

import dataclasses
import logging
import secrets
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.num_microbatches_calculator import unset_num_microbatches_calculator
from nemo.lightning.megatron_parallel import MegatronStep
from nemo.lightning.pytorch.strategies.utils import setup_parallel_ranks
from nemo.utils import AppState

from minitron_nemo import platform
from minitron_nemo.config.trainer import TrainerConfig
from minitron_nemo.config.training import TrainingConfig
from minitron_nemo.distillation.teacher_student import adjust_tensor_shapes_fn, teacher_student_in
from minitron_nemo.nemo.data_module import PackedDataModule
from minitron_nemo.nemo.downstream import Downstream
from minitron_nemo.nemo.history import History
from minitron_nemo.nemo.load_balancing import LoadBalancing
from minitron_nemo.nemo.models import EngineModel
from minitron_nemo.nemo.source_losses import SourceLosses
from minitron_nemo.nemo.survival import ResumableCheckpoints, ResumedValidation, SkippedSteps, StopWhenAsked
from minitron_nemo.parallel import is_rank_zero, local_rank, rank, ranks_per_node, world_size
from minitron_nemo.platform.peak import peak_tflops_here
from minitron_nemo.runtime.checkpoint_metadata import as_data
from minitron_nemo.runtime.distributed_checkpoint import WEIGHTS
from minitron_nemo.runtime.layout import require_batch_splits
from minitron_nemo.runtime.training_run import CHECKPOINTS, HISTORY, OPTIMIZER, TrainingRun
from nemo import lightning as nl


class Strategy(nl.MegatronStrategy):
    """NeMo's strategy in a process group that already stands (started by torchrun, or by an earlier stage)."""

    def setup_distributed(self) -> None:
        setup_parallel_ranks(self)
        unset_num_microbatches_calculator()  # an earlier stage may have had another batch size
        # what NeMo's init_model_parallel leaves in its AppState; the groups themselves stand already
        state = AppState()
        state.tensor_model_parallel_group = parallel_state.get_tensor_model_parallel_group()
        state.pipeline_model_parallel_group = parallel_state.get_pipeline_model_parallel_group()
        state.data_parallel_group = parallel_state.get_data_parallel_group()
        state.data_parallel_rank = parallel_state.get_data_parallel_rank()
        state.data_parallel_size = parallel_state.get_data_parallel_world_size()
        if self.data_sampler:
            self.data_sampler.setup(rank())

    def load_checkpoint(self, checkpoint_path: Path | str, selective_restore: bool = False) -> dict[str, Any]:
        """NeMo's, which runs nothing that the files say. Raises: ValueError: a file is damaged or gone."""
        with as_data(Path(checkpoint_path) / WEIGHTS):
            found: dict[str, Any] = super().load_checkpoint(checkpoint_path, selective_restore)
        return found

    def selective_restore(self) -> None:
        """Weights and moments of the phase before, under the hyperparameters of this one."""

        def groups() -> Iterator[dict[str, Any]]:
            for optimizer in self.optimizers:
                yield from optimizer.param_groups

        ours = [{key: value for key, value in group.items() if key not in ("params", "step")} for group in groups()]
        super().selective_restore()
        for group, hyperparameters in zip(groups(), ours, strict=True):
            group.update(hyperparameters)

    def init_model_parallel(self) -> None:
        """NeMo's, with its DDP built in order.

        It copies parameters into DDP's buffers on a stream of its own, and neither waits for what made the parameters
        nor makes the first step wait for the buffers.
        """
        build = self.megatron_parallel.init_ddp

        def in_order() -> None:
            torch.cuda.synchronize()
            build()
            torch.cuda.synchronize()

        self.megatron_parallel.init_ddp = in_order
        super().init_model_parallel()
        del self.megatron_parallel.init_ddp


class _StandingProcesses(LightningEnvironment):
    """Tells Lightning that every process is already running and which one this is."""

    @property
    def creates_processes_externally(self) -> bool:
        return True

    def world_size(self) -> int:
        return world_size()

    def global_rank(self) -> int:
        return rank()

    def local_rank(self) -> int:
        return local_rank()

    def node_rank(self) -> int:
        return rank() // ranks_per_node()

    def set_world_size(self, size: int) -> None: ...

    def set_global_rank(self, rank: int) -> None: ...


class _Step(MegatronStep):
    """NeMo's step, with our message widths: NeMo's own needs nvidia-modelopt to say there is nothing to adjust."""

    @property
    def adjust_tensor_shapes_fn(self) -> Callable[..., Any] | None:
        return adjust_tensor_shapes_fn(self.model)


class MessageWidths(pl.Callback):
    """Lets teacher and student share one pipeline message."""

    def on_megatron_step_start(self, step: MegatronStep) -> MegatronStep:
        return _Step(**{each.name: getattr(step, each.name) for each in dataclasses.fields(step)})


class StepEnds(pl.Callback):
    """Tells a model with a teacher where steps and validations end, before anything is saved or written of them."""

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        if distillation := teacher_student_in(pl_module.module):
            distillation.end_step()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if distillation := teacher_student_in(pl_module.module):
            distillation.begin_validation()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if distillation := teacher_student_in(pl_module.module):
            distillation.end_validation()


def build_trainer(
    config: TrainerConfig, training: TrainingConfig, *, directory: Path, callbacks: list[pl.Callback]
) -> nl.Trainer:
    """An `nl.Trainer` for this machine and layout; logs go below `directory`."""
    dtype = platform.dtype_of(config.precision)
    before = None
    if training.continue_from is not None:
        before = nl.RestoreConfig(path=str(Path(training.continue_from, OPTIMIZER)), load_optim_state=True)
    strategy = Strategy(
        **config.of_model,
        pipeline_dtype=dtype,
        process_group_backend=platform.backend(),
        use_gloo_process_groups=False,  # `use_layout` builds none
        timeout=config.distributed_timeout,
        cluster_environment=_StandingProcesses(),
        ddp=DistributedDataParallelConfig(
            use_distributed_optimizer=platform.supports_distributed_optimizer(),
            grad_reduce_in_fp32=True,
            check_for_nan_in_grad=False,  # such a step is skipped instead, see `SkippedSteps`
            # Weighting by tokens is ours to do: the loss is a sum and a count on every rank
            average_in_collective=False,
        ),
        ckpt_async_save=False,
        ckpt_optim_fully_reshardable=True,  # a run may go on with other tensor and pipeline parallel sizes
        restore_config=before,  # looked at where no checkpoint of this run is resumed
        replace_progress_bar=False,
    )
    strategy.timers = None  # NeMo's printer of timers reduces on rank 0 only and would hang the next collective
    loggers: list[Logger] = []
    if config.tensorboard:
        loggers.append(TensorBoardLogger(str(directory), name="tensorboard", version=""))
    if config.wandb_project:
        loggers.append(WandbLogger(config.wandb_project, save_dir=str(directory), id=_wandb_id(directory)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nl.Trainer(
            accelerator="gpu" if platform.has_accelerator() else "cpu",
            devices=ranks_per_node(),
            num_nodes=world_size() // ranks_per_node(),
            strategy=strategy,
            plugins=[nl.MegatronMixedPrecision(precision="bf16-mixed" if dtype == torch.bfloat16 else "32")],
            max_steps=training.steps,
            val_check_interval=training.validation_every or None,
            check_val_every_n_epoch=None,
            limit_val_batches=training.validation_batches if training.validation_every else 0,
            limit_test_batches=0,
            num_sanity_val_steps=0,
            log_every_n_steps=0,  # `History` logs
            logger=loggers or False,
            callbacks=callbacks,
            enable_progress_bar=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
        )


def _wandb_id(directory: Path) -> str | None:
    """Of the run that logs from `directory`, on rank 0: one that was cut off continues its own curves."""
    file = directory / "wandb_id"
    if not is_rank_zero():
        return None
    if not file.is_file():
        file.write_text(secrets.token_hex(4))
    return file.read_text()


def _finish_wandb() -> None:
    """Else the next training in this process would go on logging into the run of this one."""
    import wandb

    if wandb.run is not None:
        wandb.finish()


def fit(model: EngineModel, data: PackedDataModule, run: TrainingRun) -> list[dict[str, Any]]:
    """Run all steps; resume if `run.directory` holds a checkpoint of a run that was cut off.

    Args:
        model: with its optimizer; holds the trained weights afterwards.
    Returns:
        The history (rank 0; empty elsewhere).
    Raises: Paused, Interrupted: the run was to pause, or told to stop, and saved. ValueError: too many steps in a row
        were not finite.
    """
    config, training, directory = run.trainer, run.training, run.directory
    require_batch_splits(config, world_size())
    directory.mkdir(parents=True, exist_ok=True)
    balancing = _balancing(model, run)
    by_source = SourceLosses(data.sources) if len(data.sources) > 1 else None
    history = _history(model, run, balancing, by_source)
    checkpoints = ResumableCheckpoints(
        directory / CHECKPOINTS, training.checkpoint_every, also_the_last=training.keep_optimizer
    )
    checkpoints.directory.mkdir(exist_ok=True)
    stop = StopWhenAsked(checkpoints, run.pause_at)
    skipped = SkippedSteps(model.optim, checkpoints, training.max_skipped_steps, config.global_batch_size)
    resumed = ResumedValidation(history.validated)
    callbacks = [StepEnds(), history, resumed, skipped, checkpoints, stop, MessageWidths()]
    callbacks[:0] = [each for each in (balancing, by_source) if each is not None]
    if run.questions:
        rows = config.micro_batch_size
        callbacks.append(Downstream(training.downstream, run.questions, history, directory, rows=rows))
    trainer = build_trainer(config, training, directory=directory, callbacks=callbacks)
    resume = checkpoints.newest()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
        try:
            trainer.fit(model, datamodule=data, ckpt_path=str(resume) if resume else None)
        finally:
            if config.wandb_project:
                _finish_wandb()
    stop.require_finished(training.steps)
    if is_rank_zero() and not history.records:  # the run was cut off after its last step
        return history.kept(training.steps)
    return history.records


def _balancing(model: EngineModel, run: TrainingRun) -> LoadBalancing | None:
    """What reads the routers' loss; None where the model has none, or none that is minimised."""
    if model.shape.num_moe_experts is None or not model.config.moe_aux_loss_coeff:
        return None
    micro_batches = run.trainer.global_batch_size // run.trainer.micro_batch_size
    return LoadBalancing(model.shape, micro_batches=micro_batches)


def _history(
    model: EngineModel, run: TrainingRun, balancing: LoadBalancing | None, by_source: SourceLosses | None
) -> History:
    config = run.trainer
    peak = peak_tflops_here() if platform.dtype_of(config.precision) == torch.bfloat16 else None
    return History(
        run.directory / HISTORY,
        label=run.label,
        steps=run.training.steps,
        tokens_per_step=config.tokens_per_step,
        flops_per_step=model.training_flops_per_token(config.seq_length) * config.tokens_per_step,
        peak_tflops=config.peak_tflops or peak,
        balancing=balancing,
        by_source=by_source,
    )

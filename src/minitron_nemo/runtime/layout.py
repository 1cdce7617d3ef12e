"""Processes and groups: one start-up for torchrun, SLURM's srun + torchrun and a plain `python`.

A run starts torch.distributed once; each stage then asks for its layout. A chain of stages in one process keeps the
process group and only rebuilds Megatron's groups when the layout changes.
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from minitron_nemo import platform
from minitron_nemo.checks import require, require_divisible
from minitron_nemo.config.trainer import Layout, TrainerConfig
from minitron_nemo.layer_spec import layers_by_stage
from minitron_nemo.parallel import local_rank, ranks_per_node
from minitron_nemo.shape import ModelShape


def start(layout: Layout) -> None:
    """Join the process group: from torchrun's environment, or alone. Idempotent.

    Raises: ValueError: nodes with unequal numbers of processes, as far as this one sees.
    """
    platform.activate()
    if dist.is_initialized():
        return
    os.environ.setdefault("NCCL_DEBUG", "WARN")
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        world, here = int(os.environ["WORLD_SIZE"]), ranks_per_node()
        require(
            world % here == 0,
            f"This node runs {here} of {world} processes, so others run another number. Start equally many on every "
            "node: the same torchrun --nproc-per-node, or slurm.processes_per_node.",
        )
        torch.cuda.set_device(local_rank())
        dist.init_process_group(platform.backend(), timeout=layout.distributed_timeout)
    else:
        dist.init_process_group(
            platform.backend(), timeout=layout.distributed_timeout, store=dist.HashStore(), rank=0, world_size=1
        )


def stop() -> None:
    """Leave the process group, so that a process can start another one (tests do)."""
    if dist.is_initialized():
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def use_layout(layout: Layout, *, seed: int) -> None:
    """Build Megatron's groups for `layout` and seed its random-number trackers.

    Raises: ValueError where the world cannot hold the layout.
    """
    start(layout)
    require_world_holds(layout, dist.get_world_size())
    if not _stands(layout):
        # Groups are kept from stage to stage: Megatron forgets old ones without closing them, and each gloo group has
        # a thread that wakes a hundred times a second. Those of gloo beside the backend's own are asked for by no
        # checkpoint that is written here, and would open a connection to every data-parallel rank for each of them.
        parallel_state.destroy_model_parallel()
        parallel_state.initialize_model_parallel(
            **layout.sizes,
            distributed_timeout_minutes=layout.distributed_timeout_minutes,
            create_gloo_process_groups=False,
        )
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)


def require_world_holds(layout: Layout, world: int) -> None:
    """Raises: ValueError: so many processes are no whole number of copies of the model."""
    require(
        world % layout.model_parallel_size == 0,
        f"{world} processes cannot hold tensor_model_parallel_size={layout.tensor_model_parallel_size} x "
        f"pipeline_model_parallel_size={layout.pipeline_model_parallel_size} x "
        f"context_parallel_size={layout.context_parallel_size} = {layout.model_parallel_size}. "
        f"Start a multiple of {layout.model_parallel_size}: "
        f"torchrun --nproc-per-node {layout.model_parallel_size} ...",
    )
    data_parallel = world // layout.model_parallel_size * layout.context_parallel_size
    require(
        data_parallel % layout.expert_model_parallel_size == 0,
        f"trainer.expert_model_parallel_size={layout.expert_model_parallel_size} does not divide the {data_parallel} "
        f"ranks that {world} processes leave it beside tensor and pipeline parallelism. Start "
        f"{layout.model_parallel_size * layout.expert_model_parallel_size} processes, or lower it.",
    )


def _stands(layout: Layout) -> bool:
    """Whether Megatron's groups are those of `layout` already."""
    return parallel_state.model_parallel_is_initialized() and all(
        getattr(parallel_state, f"get_{name.removesuffix('_size')}_world_size")() == size
        for name, size in layout.sizes.items()
    )


def prepare_layout(layout: Layout, shape: ModelShape, *, seq_length: int = 1, seed: int = 0) -> None:
    """Build Megatron's groups for `layout` after checking that the model fits it.

    Args:
        seq_length: of the samples that will run through the model.
        seed: of what is drawn: new weights, dropout, generation.
    Raises: ValueError: the model's dims do not split over the layout, it reads no samples of this length, or the
        machine or the world cannot hold the layout.
    """
    require_splits(shape, layout)
    if layout.expert_model_parallel_size > 1:
        require_tokens_split(shape, layout)
    require_samples_split(shape, layout, seq_length)
    require(
        layout.context_parallel_size == 1 or platform.has_transformer_engine(),
        f"trainer.context_parallel_size={layout.context_parallel_size} needs transformer-engine, whose attention "
        "passes keys and values between ranks; this machine has none. Set trainer.context_parallel_size=1.",
    )
    use_layout(layout, seed=seed)


def require_splits(shape: ModelShape, layout: Layout) -> None:
    """Raises: ValueError: the model's dims do not split over `layout`."""
    shape.require_splits_over(
        layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size, layout.expert_model_parallel_size
    )


def require_tokens_split(shape: ModelShape, layout: Layout) -> None:
    """What Megatron-core asks to train a mixture of experts on tensor-parallel ranks, or to spread its experts."""
    require(
        shape.num_moe_experts is None or layout.tensor_model_parallel_size == 1 or layout.sequence_parallel,
        f"trainer.tensor_model_parallel_size={layout.tensor_model_parallel_size} of a model with experts needs "
        "sequence parallelism, as every rank would route every token. Set trainer.sequence_parallel=true.",
    )


def require_samples_split(shape: ModelShape, layout: Layout, seq_length: int) -> None:
    """Raises: ValueError: samples longer than the model's context, or of tokens that ranks cannot share out."""
    require(
        seq_length <= shape.seq_length,
        f"trainer.seq_length={seq_length} is longer than the model's context of {shape.seq_length} tokens. "
        f"Set trainer.seq_length to at most {shape.seq_length}.",
    )
    if seq_length > 1:  # each rank of context parallelism takes two chunks, which sequence parallelism splits again
        chunks = 2 * layout.context_parallel_size if layout.context_parallel_size > 1 else 1
        require_divisible("trainer.seq_length", seq_length, "2 x trainer.context_parallel_size", chunks)
        if layout.sequence_parallel:
            local, size = seq_length // layout.context_parallel_size, layout.tensor_model_parallel_size
            require(
                local % size == 0,
                f"trainer.seq_length={seq_length} leaves a rank {local} tokens, which trainer.sequence_parallel=true "
                f"cannot split over trainer.tensor_model_parallel_size={size}. Set trainer.seq_length to a multiple of "
                f"{size * layout.context_parallel_size * (2 if layout.context_parallel_size > 1 else 1)}.",
            )


def require_recomputed_layers(shape: ModelShape, trainer: TrainerConfig) -> None:
    """Raises: ValueError: more layers are to be recomputed together than a pipeline stage has, or no whole chunks."""
    if trainer.recompute_granularity != "full":
        return
    asked, stages = trainer.recompute_num_layers, trainer.pipeline_model_parallel_size
    for have in sorted(set(layers_by_stage(shape.num_layers, stages))):
        uniform = trainer.recompute_method == "uniform"
        can = [number for number in range(1, have + 1) if not uniform or have % number == 0]
        require(
            asked in can,
            f"trainer.recompute_num_layers={asked} with recompute_method={trainer.recompute_method} does not fit the "
            f"{have} layers of a pipeline stage ({shape.num_layers} layers over "
            f"trainer.pipeline_model_parallel_size={stages}). There it can be {', '.join(map(str, can))}.",
        )


def require_batch_splits(trainer: TrainerConfig, world: int) -> None:
    """Raises: ValueError: a step's samples are no whole number of micro-batches on every data-parallel rank."""
    require_divisible(
        "trainer.global_batch_size",
        trainer.global_batch_size,
        "trainer.micro_batch_size x data-parallel ranks",
        trainer.micro_batch_size * (world // trainer.model_parallel_size),
    )

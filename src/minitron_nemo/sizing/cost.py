"""Time of a step, and what it writes.

    FLOPs      matrix products of all tokens, as `counts` counts them; those of a full recomputation on top
    hours      FLOPs / (ranks x peak x utilisation), longer by the share of a pipeline's stages that wait
    disk       a model's artifact, the checkpoints of a run that trains, a store of the teacher's answers, an export

A pipeline of p stages and m micro-batches a step waits (p - 1)/m of the time that it works (arXiv:2104.04473, section
2.2); a step that does not train sends one micro-batch at a time.
"""

from __future__ import annotations

from dataclasses import dataclass

from minitron_nemo.config.trainer import Recomputation
from minitron_nemo.layer_spec import layers_by_stage
from minitron_nemo.shape import ModelShape
from minitron_nemo.sizing.jobs import Job
from minitron_nemo.sizing.machine import Machine

OPTIMIZER_IN_CHECKPOINT = 12
"""Bytes a parameter: float32 weights and two moments."""


@dataclass(frozen=True)
class Cost:
    """Of a step whose tokens are known."""

    hours: float
    gpu_hours: float


def cost_of(job: Job, machine: Machine) -> Cost | None:
    """None: it is not known how many tokens there are."""
    if job.flops is None or job.tokens is None or job.batch is None:
        return None
    flops = float(job.flops)
    if job.trains and job.recomputation is not None:
        seq_length = job.batch.seq_length
        again = recomputed_flops_per_token(job.trained.shape, job.recomputation, job, seq_length)
        flops += job.tokens * again
    stages = job.layout.pipeline_model_parallel_size
    waits = 1 + (stages - 1) / max(1, job.micro_batches(machine.ranks))
    hours = flops / (machine.ranks * machine.peak_flops * machine.utilisation) * waits / 3600
    return Cost(hours, hours * machine.ranks)


def recomputed_flops_per_token(shape: ModelShape, recomputation: Recomputation, job: Job, seq_length: int) -> float:
    """Of one token, beside the three times its forward pass takes."""
    layers = shape.flops_per_token(seq_length) - 2 * shape.padded_vocab_size * shape.hidden_size
    if recomputation.recompute_granularity == "full":
        if recomputation.recompute_method == "uniform":
            return layers
        held = layers_by_stage(shape.num_layers, job.layout.pipeline_model_parallel_size)
        return layers * sum(min(recomputation.recompute_num_layers, each) for each in held) / shape.num_layers
    if recomputation.recompute_granularity is None:
        return 0
    scores = 2 * shape.num_layers * shape.query_projection_size * seq_length
    projections = 2 * shape.num_layers * (shape.qkv_projection_size + shape.query_projection_size) * shape.hidden_size
    modules = set(recomputation.recompute_modules)
    neurons = layers - scores - projections if modules & {"mlp", "moe"} else 0
    return (scores if "core_attn" in modules else 0) + neurons


def checkpoint_bytes(shape: ModelShape, element: int) -> int:
    """Of a run that trains this model: weights and the optimizer's state."""
    return shape.num_parameters * (element + OPTIMIZER_IN_CHECKPOINT)

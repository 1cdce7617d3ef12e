"""Importance of a tiny model on whatever layout the current ranks have; shared by tests and benchmarks."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.utils import get_batch_on_this_cp_rank
from torch import Tensor

from minitron_nemo.config.importance import ImportanceConfig
from minitron_nemo.importance import ImportanceEstimator
from minitron_nemo.parallel import Groups
from minitron_nemo.scores import Importance
from minitron_nemo.shape import ModelShape
from support.gathering_attention import build_context_parallel_gpt
from support.megatron import TINY, build_gpt, run_gpt

NUM_SAMPLES, TOKENS = 6, 12
SHAPE = dataclasses.replace(TINY, num_layers=2)


def make_samples(padded: bool = True) -> tuple[Tensor, Tensor]:
    """tokens [6, 12] and their mask; where padded, every sample ends elsewhere and one has a hole."""
    tokens = torch.randint(SHAPE.padded_vocab_size, (NUM_SAMPLES, TOKENS), generator=torch.Generator().manual_seed(5))
    mask = torch.ones(NUM_SAMPLES, TOKENS)
    if padded:
        for sample, length in enumerate((12, 7, 10, 3, 12, 9)):
            mask[sample, length:] = 0
        mask[4, 2:5] = 0
    return tokens, mask


def build_model(shape: ModelShape = SHAPE) -> Any:
    """The test model's part of this rank, with an attention that works on the current layout."""
    context_parallel = parallel_state.get_context_parallel_world_size() > 1
    return build_context_parallel_gpt(shape) if context_parallel else build_gpt(shape)


def estimate(
    tokens: Tensor, mask: Tensor, *, micro_batch: int = 1, shape: ModelShape = SHAPE, **options: Any
) -> Importance:
    """Importance on the current layout; dp ranks take every dp-th sample, cp ranks their part of each."""
    groups, model = Groups.from_megatron(), build_model(shape)
    first, step = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    batch = get_batch_on_this_cp_rank({"tokens": tokens[first::step], "mask": mask[first::step]})
    with ImportanceEstimator(model, shape, groups, ImportanceConfig(**options)) as estimator, torch.no_grad():
        for start in range(0, len(batch["tokens"]), micro_batch):
            here = slice(start, start + micro_batch)
            estimator.sample(batch["mask"][here])
            run_gpt(model, batch["tokens"][here])
        return estimator.finish()

"""What Megatron-core 0.16 took out is there for NeMo, and as it was everywhere else; run with both lines, the newer one
by tests/test_last_image.py."""

from __future__ import annotations

import importlib.util
import sys

import minitron_nemo.nemo  # noqa: F401  (imports NeMo)
from minitron_nemo.nemo.core_016 import optimizer_by_conditions
from support.megatron import TINY, build_gpt
from support.ranks import Ranks

TENSORSTORE = "megatron.core.dist_checkpointing.strategies.tensorstore"


def test_nemo_finds_megatron_core_for_checkpoints_saved_in_the_background() -> None:
    from nemo.utils.callbacks import dist_ckpt_io

    assert dist_ckpt_io.HAVE_MEGATRON_CORE
    assert dist_ckpt_io.AsyncCallsQueue is not None


def test_the_stand_in_is_gone_once_nemo_is_imported() -> None:
    there = importlib.util.find_spec(TENSORSTORE) is not None
    assert (TENSORSTORE in sys.modules) == there


def multipliers_by_conditions() -> tuple[dict[str, tuple[float, float]], dict[str, int], bool]:
    """What each parameter's weight decay and rate are multiplied by, where fc1 has a rate of its own; how many dims it
    has; and whether Megatron-core is as it was."""
    from megatron.core import optimizer
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    theirs = optimizer.get_megatron_optimizer
    core = build_gpt(TINY)
    wrapped = DistributedDataParallel(core.config, DistributedDataParallelConfig(), core)
    with optimizer_by_conditions():
        made = optimizer.get_megatron_optimizer(
            optimizer.OptimizerConfig(optimizer="adam", lr=1e-2),
            [wrapped],
            no_weight_decay_cond=None,
            scale_lr_cond=lambda name, parameter: "linear_fc1" in name,
            lr_mult=0.25,
            use_gloo_process_groups=True,
        )
    names = {parameter: name for name, parameter in core.named_parameters()}
    found = {
        names[parameter]: (group["wd_mult"], group["lr_mult"])
        for group in made.param_groups
        for parameter in group["params"]
    }
    dims = {name: parameter.ndim for parameter, name in names.items()}
    return found, dims, optimizer.get_megatron_optimizer is theirs


def test_parameters_decay_and_take_rates_by_the_conditions_that_nemo_names(ranks: Ranks) -> None:
    [(found, dims, restored)] = ranks("single").run(multipliers_by_conditions)
    assert found == {
        name: (0.0 if ndim == 1 else 1.0, 0.25 if "linear_fc1" in name else 1.0) for name, ndim in dims.items()
    }
    assert {0.25, 1.0} == {rate for _, rate in found.values()} and {0.0, 1.0} == {decay for decay, _ in found.values()}
    assert restored

"""What Megatron-core 0.16 took out and NeMo 2.7 still asks for; with Megatron-core 0.15 each of these does nothing.

NVIDIA's last image with `nemo.collections.llm` has NeMo 2.7.0 beside Megatron-core 0.16.0. NeMo 2.7.0 to 2.7.3, which
were made beside 0.15, import a module that is gone, and give the optimizer conditions that it does not take any more.
Nothing communicates here.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

_TENSORSTORE = "megatron.core.dist_checkpointing.strategies.tensorstore"


@contextmanager
def tensorstore_named() -> Iterator[None]:
    """While NeMo is imported in the block, it finds the module for checkpoints in zarr; an empty one, where it is gone.

    NeMo imports it together with what other checkpoints need, in one `try` (utils/callbacks/dist_ckpt_io.py), and
    without it takes Megatron-core to be missing: whoever asks for checkpoints saved in the background is refused.
    """
    missing = importlib.util.find_spec(_TENSORSTORE) is None
    if missing:
        sys.modules[_TENSORSTORE] = ModuleType(_TENSORSTORE, "Stands in while NeMo is imported.")
    try:
        yield
    finally:
        if missing:
            del sys.modules[_TENSORSTORE]


@contextmanager
def optimizer_by_conditions() -> Iterator[None]:
    """In the block, `get_megatron_optimizer` takes the conditions on parameters that NeMo hands to it.

    NeMo (lightning/_strategy_lib.py, `setup_megatron_optimizer`) names `no_weight_decay_cond`, `scale_lr_cond` and
    `lr_mult`; 0.16 has `config_overrides` in their place and raises TypeError, so that no model trains. A group has the
    same multipliers either way, by which a checkpoint finds it again.
    """
    from megatron.core import optimizer

    theirs: Callable[..., Any] = optimizer.get_megatron_optimizer
    if "scale_lr_cond" in inspect.signature(theirs).parameters:
        yield
        return

    def by_conditions(
        config: Any,
        model_chunks: Any,
        *,
        no_weight_decay_cond: Callable[[str, Any], bool] | None,
        scale_lr_cond: Callable[[str, Any], bool] | None,
        lr_mult: float,
        **rest: Any,
    ) -> Any:
        assert no_weight_decay_cond is None, "ours is Megatron-core's own: biases and norms do not decay"
        overrides = optimizer.get_standard_config_overrides(config)
        if scale_lr_cond is not None:
            scaled = optimizer.ParamWithNamePredicate("scaled", lambda parameter, name: scale_lr_cond(name, parameter))
            overrides[optimizer.ParamKey(with_name_predicate=scaled)] = {"lr_mult": lr_mult}
        return theirs(config, model_chunks, config_overrides=overrides, **rest)

    optimizer.get_megatron_optimizer = by_conditions
    try:
        yield
    finally:
        optimizer.get_megatron_optimizer = theirs

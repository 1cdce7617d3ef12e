"""Weights to and from Megatron distributed checkpoints, under the keys NeMo uses, whatever layout wrote them.

Where NeMo's save spends ten seconds on a laptop: Megatron-core starts a `spawn`ed manager process, which imports the
program's main module again, NeMo included. The doors of this package (cli.py, launch/) import nothing heavy at the top.
"""

from __future__ import annotations

from pathlib import Path

from megatron.core import dist_checkpointing
from megatron.core.models.gpt import GPTModel as MCoreGPTModel

WEIGHTS = "weights"
_PREFIX = "module."
_CONTENT = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}  # as NeMo's strategy writes


def save_weights(core: MCoreGPTModel, directory: Path) -> None:
    """Write `directory/weights`. Every rank calls; each writes its own shards."""
    weights = directory / WEIGHTS
    weights.mkdir(parents=True, exist_ok=True)
    dist_checkpointing.save(
        core.sharded_state_dict(prefix=_PREFIX, metadata=_CONTENT), str(weights), content_metadata=_CONTENT
    )


def load_weights(core: MCoreGPTModel, directory: Path) -> None:
    """Fill `core` from `directory/weights`. Every rank calls; each reads what it holds."""
    wanted = core.sharded_state_dict(prefix=_PREFIX, metadata=_CONTENT)
    found = dist_checkpointing.load(wanted, str(directory / WEIGHTS))
    core.load_state_dict({key.removeprefix(_PREFIX): value for key, value in found.items()}, strict=False)

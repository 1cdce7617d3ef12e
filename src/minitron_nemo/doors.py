"""From a command line to a stage: compose the recipe with Hydra, check it against the dataclasses, run.

What a user did wrong ends as one message on rank 0 and exit code 2, a run that was told to stop as one and 75; anything
else keeps its traceback.
"""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import hydra
import torch.distributed as dist
from omegaconf import DictConfig

from minitron_nemo.checks import Interrupted, require
from minitron_nemo.cli import conf_dir
from minitron_nemo.mistakes import MISTAKES, explain
from minitron_nemo.recipe import SECTIONS, register_schema, stage_module, typed_section

INTERRUPTED = 75
"""Exit code of a run that was told to stop and saved (EX_TEMPFAIL of sysexits.h): start it again."""
_SAID = "minitron_nemo/said"
_RANK_ZERO_SPEAKS_FIRST = timedelta(seconds=30)  # torchrun ends the other ranks as soon as one has left


def open_door(door: str, overrides: Sequence[str]) -> int:
    """Run `door` (a stage, `compress` or `submit`) with Hydra `overrides`; returns the exit code: 0, 2 or 75."""
    with _import_noise_held_back():
        register_schema()
    hush()
    if "--info" in overrides:
        logging.disable(logging.NOTSET)  # Hydra answers through its log
    sys.argv = [f"minitron {door}", *overrides]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # its exceptions reach us, and we word them

    mistakes: list[Exception] = []  # kept from Hydra, which would announce them in its own words first

    def run(config: DictConfig) -> None:
        try:
            _run(door, config, overrides)
        except MISTAKES as error:
            mistakes.append(error)
        except RuntimeError as error:
            if not _another_rank_left(error):
                raise
            mistakes.append(_Left())

    try:
        hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name=door)(run)()
        if mistakes:
            raise mistakes[0]
    except Interrupted as stopped:
        _say_once(f"minitron {door}: {stopped}")
        return INTERRUPTED
    except MISTAKES as error:
        if isinstance(error, _Left):
            return 2
        if os.environ.get("MINITRON_TRACEBACK"):
            raise
        _say_once(f"minitron {door}: {explain(error, door, overrides)}")
        return 2
    return 0


class _Left(ValueError):
    """Another rank has ended the run and says why."""


def _another_rank_left(error: RuntimeError) -> bool:
    """Whether a collective failed because its other end is gone, in the words of gloo."""
    return any(words in str(error) for words in ("Connection closed by peer", "Connection reset by peer"))


def _say_once(message: str) -> None:
    """Print the message on rank 0; on another rank only if rank 0, which ends the run, did not meet the mistake too."""
    rank = int(os.environ.get("RANK", 0))
    store = dist.distributed_c10d._get_default_store() if dist.is_initialized() else None
    if rank > 0:
        if _rank_zero_has_spoken(store):
            return
        message = f"rank {rank}: {message}"
    print(message, file=sys.stderr, flush=True)
    if rank == 0 and store is not None:
        store.set(_SAID, "")


def _rank_zero_has_spoken(store: Any) -> bool:
    if store is None:  # a mistake in the command, which rank 0 reads too
        time.sleep(_RANK_ZERO_SPEAKS_FIRST.total_seconds())
        return False
    try:
        store.wait([_SAID], _RANK_ZERO_SPEAKS_FIRST)
    except RuntimeError:  # torch's DistStoreError: nothing came in time
        return False
    return True


def hush() -> None:
    """Silence what the libraries below say that no user of ours can act on; errors stay."""
    from nemo.utils import logging as nemo_logging

    warnings.filterwarnings("ignore")
    nemo_logging.setLevel(logging.ERROR)
    logging.getLogger("megatron").setLevel(logging.ERROR)
    logging.getLogger("megatron.core.dist_checkpointing").setLevel(logging.CRITICAL)  # it raises what it logs
    logging.disable(logging.INFO)  # several set their own loggers back to INFO; ours reports through `Reporter`


@contextmanager
def _import_noise_held_back() -> Iterator[None]:
    """Keep what libraries print while they are imported (file descriptors 1 and 2); show it if importing fails."""
    sys.stdout.flush()
    sys.stderr.flush()
    with tempfile.TemporaryFile() as held:
        saved = [os.dup(1), os.dup(2)]
        for descriptor in (1, 2):
            os.dup2(held.fileno(), descriptor)
        try:
            yield
        except BaseException:
            held.seek(0)
            os.write(saved[1], held.read())
            raise
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for descriptor, original in zip((1, 2), saved, strict=True):
                os.dup2(original, descriptor)
                os.close(original)


def _run(door: str, config: DictConfig, overrides: Sequence[str]) -> None:
    if door == "submit":
        from minitron_nemo.cluster import submit

        for step in config.compress.steps:
            typed_section(step, config)  # what is wrong is said now, not by a job hours later
        submit.run(config, overrides)
        return
    from minitron_nemo.runtime.layout import is_rank_zero, start

    if door == "compress":
        from minitron_nemo.stages import compress

        start()
        compress.run(config)
        return
    section = config.section or door.replace("-", "_")
    values = typed_section(section, config)
    stage = SECTIONS[section][0]
    require(stage == door, f"section={section} is run by another stage: minitron {stage} section={section} ...")
    start()
    artifact = stage_module(stage).run(values)
    if is_rank_zero():
        print(artifact.path)

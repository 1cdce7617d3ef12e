"""From a command line to a stage: compose the recipe with Hydra, check it against the dataclasses, run.

What a user did wrong ends as one message on rank 0 and exit code 2; anything else keeps its traceback.
"""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from minitron_nemo.cli import conf_dir, recipes
from minitron_nemo.recipe import SECTIONS, register_schema, stage_module, typed_section

_MISTAKES = (ValueError, OSError, HydraException, OmegaConfBaseException)


def open_door(door: str, overrides: Sequence[str]) -> int:
    """Run `door` (a stage, `compress` or `submit`) with Hydra `overrides`; returns the exit code."""
    with _import_noise_held_back():
        register_schema()
    hush()
    sys.argv = [f"minitron {door}", *overrides]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # its exceptions reach us, and we word them

    mistakes: list[Exception] = []  # kept from Hydra, which would announce them in its own words first

    def run(config: DictConfig) -> None:
        try:
            _run(door, config, overrides)
        except _MISTAKES as error:
            mistakes.append(error)

    try:
        hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name=door)(run)()
        if mistakes:
            raise mistakes[0]
    except _MISTAKES as error:
        if os.environ.get("MINITRON_TRACEBACK"):
            raise
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"minitron {door}: {_explain(error)}", file=sys.stderr)
        return 2
    return 0


def hush() -> None:
    """Silence what the libraries below say that no user of ours can act on; errors stay."""
    from nemo.utils import logging as nemo_logging

    warnings.filterwarnings("ignore")
    nemo_logging.setLevel(logging.ERROR)
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

        submit.run(config, overrides)
        return
    from minitron_nemo.engine.distributed import start

    if door == "compress":
        from minitron_nemo.stages import compress

        start()
        compress.run(config)
        return
    section = config.section or door.replace("-", "_")
    values = typed_section(section, config)
    start()
    stage_module(SECTIONS[section][0]).run(values)


def _explain(error: Exception) -> str:
    """One message a tired person can use."""
    text = str(error).strip()
    if "You must specify 'recipe'" in text:
        return f"say which recipe: recipe=<name>. Known: {', '.join(recipes())}."
    if "Could not override" in text:
        key = text.split("'")[1]
        return (
            f"{key} is not a key of this recipe. The keys are shown by: minitron <stage> recipe=<name> --cfg job\n"
            f"(Hydra: {text.splitlines()[-1] if len(text.splitlines()) > 1 else text})"
        )
    return text

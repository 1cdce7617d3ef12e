"""What the libraries below say that no user of ours can act on, held back; errors stay, and so do our own warnings."""

from __future__ import annotations

import logging
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_LIBRARIES = (
    "nemo", "lightning", "pytorch_lightning", "megatron", "torch", "transformers", "transformer_engine", "modelopt",
    "numba", "hydra", "omegaconf", "fiddle", "webdataset", "pydantic", "google", "tensorboard", "wandb", "zarr",
    "importlib", "jupyter_client", "matplotlib", "threading", "multiprocessing",
    "minitron_nemo.platform.cpu",  # stands between torch and whoever calls it, and is taken for the caller
)  # fmt: skip
"""Those whose warnings are about one another."""


def hush() -> None:
    """Silence the libraries' warnings and news. A warning that comes from anywhere else is shown."""
    warnings.filterwarnings("ignore", module=rf"({'|'.join(map(re.escape, _LIBRARIES))})(\.|$)")
    logging.getLogger("megatron").setLevel(logging.ERROR)
    logging.getLogger("megatron.core.dist_checkpointing").setLevel(logging.CRITICAL)  # it raises what it logs
    logging.disable(logging.INFO)  # several set their own loggers back to INFO; ours reports through `Reporter`


@contextmanager
def imports_held_back() -> Iterator[None]:
    """Keep what libraries print while they are imported (file descriptors 1 and 2); show it if importing fails."""
    sys.stdout.flush()
    sys.stderr.flush()
    with tempfile.TemporaryFile() as held:
        saved = [os.dup(1), os.dup(2)]
        for descriptor in (1, 2):
            os.dup2(held.fileno(), descriptor)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
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

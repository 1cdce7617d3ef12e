"""What stages ask of whoever builds, keeps and trains models; which trainer answers stays behind this surface.

    open_model        a directory               ->  which model is there
    new_core          a shape on a layout       ->  this rank's part of a model on Megatron-core, random weights
    open_core         a model on a layout       ->  the same with its weights
    meta_core         a shape                   ->  the whole model without memory
    save_model        this rank's part          ->  a model artifact's files
    describe_model    a shape                   ->  the same but for the weights
    train             a training run            ->  the trained model and the run's history

A core is a plain `megatron.core` GPTModel, on which runtime/ and the rooms below it work with any trainer. The first
implementation is nemo/; it is imported when something is asked of it, as that takes seconds.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from types import FrameType
from typing import Protocol

import torch
from megatron.core.models.gpt import GPTModel as MCoreGPTModel

from minitron_nemo.config.trainer import Layout
from minitron_nemo.parallel import rank_zero_works
from minitron_nemo.runtime import model_artifact
from minitron_nemo.runtime.distributed_checkpoint import load_weights, save_weights
from minitron_nemo.runtime.model_artifact import ModelInput
from minitron_nemo.runtime.training_run import Trained, TrainingRun
from minitron_nemo.shape import ModelShape
from minitron_nemo.versions import require_llm


class Implementation(Protocol):
    """What a trainer's room offers, as functions of one module."""

    def new_core(self, shape: ModelShape, layout: Layout, dtype: torch.dtype, *, plain: bool = False) -> MCoreGPTModel:
        """As `engine.new_core`."""

    def meta_core(self, shape: ModelShape) -> MCoreGPTModel:
        """As `engine.meta_core`."""

    def write_context(self, shape: ModelShape, directory: Path) -> None:
        """Write beside an artifact's weights and tokenizer what the trainer itself loads them by. One process."""

    def read_foreign_shape(self, directory: Path) -> ModelShape:
        """Shape of a checkpoint that the trainer wrote without us. Raises: ValueError: it is not supported."""

    def train(self, run: TrainingRun) -> Trained:
        """As `engine.train`."""


def _nemo() -> Implementation:
    require_llm()
    from minitron_nemo.nemo import implementation

    _forget_what_failed_since(sys._getframe())
    return implementation


def _forget_what_failed_since(frame: FrameType) -> None:
    """Take the tracebacks off the exceptions raised below `frame` that libraries keep, to say later what they lack.

    A traceback holds the frames of all who were importing at the time, and so the variables of the stage that asked for
    a model first: its model would live as long as the process.
    """
    for each in gc.get_objects():
        if issubclass(type(each), BaseException) and each.__traceback__ is not None:
            above: FrameType | None = each.__traceback__.tb_frame
            while above is not None and above is not frame:
                above = above.f_back
            if above is frame:
                each.__traceback__ = None


IMPLEMENTATIONS: dict[str, Callable[[], Implementation]] = {"nemo": _nemo}
"""Name of a trainer -> its room, imported when called."""


@lru_cache(maxsize=1)
def _chosen(name: str = "nemo") -> Implementation:
    return IMPLEMENTATIONS[name]()


def open_model(path: Path | str | None, *, key: str, verify: bool = False) -> ModelInput:
    """A model given as an input: an artifact of ours, or a checkpoint that the trainer wrote without us.

    Args:
        key: the user's config key that named the path.
        verify: compare the weights, too, with what the artifact's manifest says.
    Raises: FileNotFoundError: missing or unfinished. ValueError: another kind of artifact, or damaged.
    """

    def foreign(directory: Path) -> ModelShape:
        return _chosen().read_foreign_shape(directory)

    return model_artifact.open_model(path, key=key, foreign=foreign, verify=verify)


def new_core(shape: ModelShape, layout: Layout, dtype: torch.dtype, *, plain: bool = False) -> MCoreGPTModel:
    """This rank's part of a model of `shape` on `layout`, whose groups stand: random weights, for forward passes.

    Args:
        plain: of torch's and Megatron-core's own modules alone, whatever is installed here, so that
            `platform.true_float32` holds for all it computes.
    """
    return _chosen().new_core(shape, layout, dtype, plain=plain)


def open_core(source: ModelInput, layout: Layout, dtype: torch.dtype, *, plain: bool = False) -> MCoreGPTModel:
    """This rank's part of the model at `source`, ready for forward passes. Every rank calls; `plain` as `new_core`."""
    core = new_core(source.shape, layout, dtype, plain=plain)
    load_weights(core, source.path)
    return core


def meta_core(shape: ModelShape) -> MCoreGPTModel:
    """A whole model of `shape` on the meta device; for what its parameters are called and where they lie."""
    return _chosen().meta_core(shape)


def save_model(core: MCoreGPTModel, shape: ModelShape, tokenizer: Path, directory: Path) -> None:
    """Write a model artifact's files into `directory`. Every rank calls; communicates over the world.

    Args:
        core: this rank's part of the model.
        tokenizer: HF tokenizer directory, copied.
    """
    save_weights(core, directory)
    describe_model(shape, tokenizer, directory)


def describe_model(shape: ModelShape, tokenizer: Path, directory: Path) -> None:
    """Write what stands beside the weights: shape, tokenizer and context. Every rank calls; rank 0 writes."""

    def write() -> None:
        model_artifact.write_shape(shape, tokenizer, directory)
        _chosen().write_context(shape, directory)

    rank_zero_works(write)


def train(run: TrainingRun) -> Trained:
    """Train, going on where a run that was cut off left `run.directory`. Every rank calls; communicates over the world.

    Raises: Interrupted: the run was told to stop, and saved. ValueError: data, batch or teacher do not fit, or too many
        steps in a row were not finite.
    """
    return _chosen().train(run)

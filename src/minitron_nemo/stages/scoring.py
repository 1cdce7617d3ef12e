"""Scoring a model's width: what estimating importance and pruning in rounds share.

A calibration says which samples are read and what is measured on them. It is the same on every layout, and the same
again when it is made from the manifest of an importance artifact.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel as MCoreGPTModel
from torch import Tensor

from minitron_nemo.artifact import Artifact
from minitron_nemo.checks import require
from minitron_nemo.config.data import Prepared
from minitron_nemo.config.importance import ImportanceConfig
from minitron_nemo.resuming import OnePass
from minitron_nemo.runtime.forward import estimate_importance
from minitron_nemo.scores import Importance, stream_sizes
from minitron_nemo.shape import ModelShape
from minitron_nemo.text.blend import open_blend, require_tokenizer_of, split_prefixes
from minitron_nemo.text.calibration import calibration_batches
from minitron_nemo.text.corpus import TRAIN
from minitron_nemo.text.encoding import Encoder
from minitron_nemo.text.tokenizer import load_tokenizer
from minitron_nemo.text.tokenizer_files import tokenizer_digest
from minitron_nemo.text.windows import batches

if TYPE_CHECKING:
    from minitron_nemo.text.tokenizer import Tokenizer


_STREAM = "residual stream"


@dataclass(frozen=True)
class Calibration:
    """Which samples are read, and what is measured on them."""

    config: ImportanceConfig
    data: Prepared
    tokenizer_path: Path
    """HF tokenizer of the model to score."""
    seq_length: int
    micro_batch_size: int
    seed: int

    @classmethod
    def of_artifact(cls, scores: Artifact, tokenizer_path: Path, *, micro_batch_size: int) -> Calibration:
        """The calibration that an estimate-importance artifact was made with.

        Raises: FileNotFoundError, ValueError: its data are gone or others now.
        """
        made_with = scores.manifest["config"]
        calibration = cls(
            ImportanceConfig(**made_with["importance"]),
            Prepared(made_with["data"]["prepared"]),
            tokenizer_path,
            made_with["trainer"]["seq_length"],
            micro_batch_size,
            made_with["seed"],
        )
        then = {entry["digest"] for entry in scores.manifest["inputs"]}
        for artifact in calibration.blend:
            require(
                artifact.digest in then,
                f"{artifact.path} was made again since {scores.path} was estimated on it: its samples may be others. "
                "Estimate importance again.",
            )
        return calibration

    @cached_property
    def blend(self) -> list[Artifact]:
        """Prepared data that the samples come from; none where a file holds them.

        Raises: as `Prepared.blend`; ValueError: made with another tokenizer than the model's.
        """
        if self.config.calibration is not None:
            return []
        blend = [artifact for artifact, _ in open_blend(self.data)]
        require_tokenizer_of(blend[0], self.tokenizer)
        return blend

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return load_tokenizer(self.tokenizer_path)

    @cached_property
    def encoder(self) -> Encoder:
        """How samples and questions become ids: as documents do in prepare-data."""
        return Encoder(self.tokenizer)

    def samples(self, num_samples: int) -> Iterable[dict[str, Tensor]]:
        """Micro-batches of this data-parallel rank, of `num_samples` samples over all of them. Needs the layout."""
        share = {
            "dp_rank": parallel_state.get_data_parallel_rank(),
            "dp_size": parallel_state.get_data_parallel_world_size(),
            "seed": self.seed,
        }
        if self.config.calibration is not None:
            return calibration_batches(
                self.config.calibration,
                self.encoder,
                seq_length=self.seq_length,
                micro_batch_size=self.micro_batch_size,
                num_samples=num_samples,
                count_prompts=self.config.count_prompts,
                **share,
            )
        prefixes = [prefix for artifact in self.blend for prefix in split_prefixes(artifact, TRAIN)]
        return batches(prefixes, self.seq_length, self.micro_batch_size, num_samples, **share)

    @cached_property
    def drawn(self) -> list[dict[str, Tensor]]:
        """All the calibration's micro-batches of this data-parallel rank, for several passes. Needs the layout."""
        return list(self.samples(self.config.num_samples))

    def stream_moments(self, core: MCoreGPTModel, shape: ModelShape) -> dict[str, Tensor]:
        """Second moments of the residual stream over the drawn samples, see importance/stream.py.

        Communicates: see `runtime.forward.estimate_importance`.
        """
        config = replace(self.config, stream="normalised", metric="activations")
        total = len(self.drawn)
        moments = estimate_importance(
            core, shape, self.drawn, config, total=total, label=_STREAM, one_pass=OnePass(_STREAM)
        ).moments
        return {name: moments[name] for name in stream_sizes(shape)}

    def num_batches(self, num_samples: int) -> int:
        """Micro-batches that `samples` gives each data-parallel rank."""
        return -(-num_samples // (self.micro_batch_size * parallel_state.get_data_parallel_world_size()))

    def score(
        self,
        core: MCoreGPTModel,
        shape: ModelShape,
        samples: Iterable[dict[str, Tensor]],
        origin: Mapping[str, Any],
        one_pass: OnePass | None = None,
    ) -> Importance:
        """Width scores of a model, from one forward pass over `samples`.

        Args:
            samples: of `samples(config.num_samples)`.
            origin: what else the scores should say of where they come from.
            one_pass: lets the pass be stopped.
        Communicates: see `runtime.forward.estimate_importance`.
        """
        importance = estimate_importance(
            core,
            shape,
            samples,
            self.config,
            total=self.num_batches(self.config.num_samples),
            seed=self.seed,
            origin={**origin, "seq_length": self.seq_length, "seed": self.seed},
            one_pass=one_pass,
        )
        return replace(importance, tokenizer_digest=tokenizer_digest(self.tokenizer_path))

"""What a teacher says of prepared data, kept on disk: of every token its k likeliest next tokens and the rest's mass.

A sample is a window of seq_length tokens of a source's training file: window w reads tokens w * seq_length up to and
with (w + 1) * seq_length, the last as a label only, as `windows.batches` cuts them. Nothing else decides what the
teacher says of it: no seed, no order, no batch. Samples are numbered through the sources, and stand in shards of
equally many; a shard is written under another name and renamed, so that one that is there is whole.

    shard-000012.bin   samples_per_shard records, each:
        log_probs      [s, k]   float16 or float32    of the softmax at `temperature`, in nats, the largest first
        tail_mass      [s]      float32               probability of all other tokens
        indices        [s, k]   2, 3 or 4 bytes       as few as hold the vocabulary

float16 rounds log p by at most |log p| / 2048, which is little where p is large: p |log p| / 2048 is below 2e-4 nats.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minitron_nemo.artifact import Artifact, is_artifact, open_artifact
from minitron_nemo.checks import did_you_mean, require
from minitron_nemo.config.distillation import TOP_K, DivergenceConfig
from minitron_nemo.divergence.top_k import INDICES, LOG_PROBS, TAIL_MASS, TopKTeacher
from minitron_nemo.parallel import rank_zero_works

PRECISIONS = ("float16", "float32")


@dataclass(frozen=True)
class StoreFormat:
    """What stands in a store, and how."""

    k: int
    seq_length: int
    vocab_size: int
    """Real entries of the teacher's vocabulary."""
    precision: str = "float16"
    """Of log-probabilities: float16 or float32."""
    temperature: float = 1.0
    softcap: float | None = None
    logit_scale: float = 1.0
    samples_per_shard: int = 64

    def __post_init__(self) -> None:
        require(
            self.precision in PRECISIONS,
            f"teacher_logits.precision={self.precision} is not known; {did_you_mean(self.precision, PRECISIONS)}",
        )
        require(
            self.samples_per_shard >= 1,
            f"teacher_logits.samples_per_shard={self.samples_per_shard} must be at least 1; try 64.",
        )
        require(
            1 <= self.k <= self.vocab_size,
            f"teacher_logits.k={self.k} must be between 1 and the vocabulary of {self.vocab_size} tokens.",
        )

    @property
    def index_bytes(self) -> int:
        return 2 if self.vocab_size <= 1 << 16 else 3 if self.vocab_size <= 1 << 24 else 4

    @property
    def record(self) -> np.dtype[Any]:
        """Of one sample."""
        s, k = self.seq_length, self.k
        values = "<f2" if self.precision == "float16" else "<f4"
        return np.dtype(
            [("log_probs", values, (s, k)), ("tail_mass", "<f4", (s,)), ("indices", "u1", (s, k, self.index_bytes))]
        )

    @property
    def bytes_per_token(self) -> int:
        return self.record.itemsize // self.seq_length

    @property
    def divergence(self) -> DivergenceConfig:
        """By which the teacher is asked."""
        return DivergenceConfig(
            kind=TOP_K,
            k=self.k,
            temperature=self.temperature,
            teacher_softcap=self.softcap,
            teacher_logit_scale=self.logit_scale,
        )

    def encode(self, answer: TopKTeacher) -> np.ndarray:
        """Records [b] of a teacher's answers on b samples, [b, s, k]."""
        assert answer.log_tail_mass is not None
        records = np.empty(len(answer.indices), self.record)
        records["log_probs"] = answer.log_probs.float().cpu().numpy()
        records["tail_mass"] = answer.log_tail_mass.float().exp().cpu().numpy()
        wide = answer.indices.cpu().numpy().astype("<u4")[..., None].view("u1")  # [b, s, k, 4], the low byte first
        records["indices"] = wide[..., : self.index_bytes]
        return records

    def decode(self, record: np.ndarray) -> dict[str, Tensor]:
        """A record as entries of a batch's sample: [s, k], [s] and [s, k]."""
        wide = np.zeros((self.seq_length, self.k, 4), "u1")
        wide[..., : self.index_bytes] = record["indices"]
        return {
            LOG_PROBS: torch.from_numpy(record["log_probs"].copy()),
            TAIL_MASS: torch.from_numpy(record["tail_mass"].copy()),
            INDICES: torch.from_numpy(wide.view("<i4")[..., 0]),
        }


@dataclass(frozen=True)
class Shards:
    """The shards of `num_samples` samples in a directory, some of which may not be there yet."""

    directory: Path
    format: StoreFormat
    num_samples: int

    def __len__(self) -> int:
        return -(-self.num_samples // self.format.samples_per_shard)

    def path(self, shard: int) -> Path:
        return self.directory / f"shard-{shard:06d}.bin"

    def samples(self, shard: int) -> range:
        first = shard * self.format.samples_per_shard
        return range(first, min(first + self.format.samples_per_shard, self.num_samples))

    def bytes(self, shards: Sequence[int]) -> int:
        """That these take."""
        return sum(len(self.samples(shard)) for shard in shards) * self.format.record.itemsize

    def missing(self) -> list[int]:
        """Those that are not there, or not whole."""
        return [shard for shard in range(len(self)) if not self._is_whole(shard)]

    def begun(self, shard: int) -> np.ndarray:
        """Records of the first samples of a shard, where a run was stopped within it."""
        file = self._begun(shard)
        return np.fromfile(file, self.format.record) if file.is_file() else np.empty(0, self.format.record)

    def samples_left(self, shard: int) -> range:
        """Those of a missing shard that are not begun."""
        return self.samples(shard)[len(self.begun(shard)) :]

    def write(self, shard: int, records: np.ndarray) -> None:
        """Put a shard in its place, or the first samples of it where it stays for now as `shard-*.begun`.

        One cut off on the way there leaves `shard-*.partial`.
        """
        partial = self.path(shard).with_suffix(".partial")
        with partial.open("wb") as file:
            file.write(records.tobytes())
            file.flush()
            os.fsync(file.fileno())
        if len(records) < len(self.samples(shard)):
            partial.rename(self._begun(shard))
        else:
            partial.rename(self.path(shard))
            self._begun(shard).unlink(missing_ok=True)

    def read(self, sample: int) -> dict[str, Tensor]:
        """The teacher's answers on one sample."""
        shard, place = divmod(sample, self.format.samples_per_shard)
        record = self.format.record
        return self.format.decode(np.fromfile(self.path(shard), record, 1, offset=place * record.itemsize)[0])

    def require_whole(self, *, key: str) -> None:
        """Raises: ValueError: a shard is gone or cut short."""
        for shard in self.missing():
            path = self.path(shard)
            found = f"has {path.stat().st_size} bytes" if path.is_file() else "is not there"
            require(
                False,
                f"{path} {found}, and {self.bytes([shard])} bytes belong there: {key}={self.directory} is damaged. "
                "Copy it again, or remove it and run teacher-logits.",
            )

    def _begun(self, shard: int) -> Path:
        return self.path(shard).with_suffix(".begun")

    def _is_whole(self, shard: int) -> bool:
        path = self.path(shard)
        return path.is_file() and path.stat().st_size == self.bytes([shard])


@dataclass(frozen=True)
class StoredSource:
    """The first windows of a source's training file; samples first to first + samples - 1 of a store."""

    data: str
    """Digest of the prepared data."""
    file: str
    """Its training file there, without ending."""
    first: int
    samples: int


@dataclass(frozen=True)
class TeacherStore:
    """A finished store."""

    artifact: Artifact
    format: StoreFormat
    sources: list[StoredSource]

    @classmethod
    def open(cls, path: Path | str, *, key: str) -> TeacherStore:
        """Raises: as `open_artifact`; ValueError: a shard is gone or cut short."""
        artifact = open_artifact(path, made_by=["teacher-logits"], key=key)
        facts = artifact.facts
        sources = [StoredSource(**source) for source in facts["sources"]]
        store = cls(artifact, StoreFormat(**facts["format"]), sources)
        rank_zero_works(partial(store.shards.require_whole, key=key))
        return store

    @staticmethod
    def facts(format: StoreFormat, sources: list[StoredSource]) -> dict[str, Any]:
        """What `open` reads in the manifest."""
        return {"format": asdict(format), "sources": [asdict(source) for source in sources]}

    @property
    def shards(self) -> Shards:
        return Shards(self.artifact.path, self.format, sum(source.samples for source in self.sources))

    def require_fits(self, divergence: DivergenceConfig, *, seq_length: int, vocab_size: int, tokenizer: str) -> None:
        """Raises: ValueError: the student would be compared with something else than what is stored.

        Args:
            vocab_size, tokenizer: the student's, the latter as a digest.
        """
        path, stored = self.artifact.path, self.format
        require(
            tokenizer == self.artifact.facts["tokenizer_digest"] and vocab_size == stored.vocab_size,
            f"distill.teacher_logits={path} is of a teacher with another tokenizer: a vocabulary of "
            f"{stored.vocab_size} tokens, the student's has {vocab_size}. Use a student pruned from that teacher, or "
            "run teacher-logits with the teacher of this one.",
        )
        ours = self.format.divergence
        asked = {"trainer.seq_length": (seq_length, stored.seq_length)} | {
            f"distill.distillation.divergence.{name}": (getattr(divergence, name), getattr(ours, name))
            for name in ("kind", "k", "teacher_softcap", "teacher_logit_scale")
        }
        if divergence.tail == "bucket":
            name = "distill.distillation.divergence.temperature"
            asked[name] = (divergence.temperature, stored.temperature)
        for name, (value, has) in asked.items():
            require(
                value == has,
                f"{name}={value}, but distill.teacher_logits={path} was made with {has}. Set {name}={has}, or run "
                "teacher-logits again with the other value.",
            )

    def require_of_teacher(self, path: str) -> None:
        """Raises: ValueError: the model at `path` is not that which was asked; one that is gone is not missed."""
        asked = self.artifact.facts["teacher"]
        require(
            asked["digest"] is None or not is_artifact(path) or open_artifact(path).digest == asked["digest"],
            f"distill.teacher={path} is not the teacher of distill.teacher_logits={self.artifact.path}, which is "
            f"{asked['path']} as it was then. Set distill.teacher to that, or run teacher-logits again.",
        )

"""How a teacher's answers on one sample stand on disk, and how it is asked for them.

A sample is s tokens of text. Two methods:

    sampled    m draws of the teacher's distribution for each token (divergence/sampled.py), and its entropy; as zlib
               packs them, whose checksum finds what was damaged
        entropy    [s]            float16   nats
        repeats    [s, m - 1]     1 bit     whether a draw is the same token as the one before it: they ascend
        tokens     [distinct]     Elias-Fano code of token + vocab_size * place in the sample, which ascends: of u / n
                                  possible values each, 2 + log2(u / n) bits at most
    top_k      the k likeliest tokens of each token, and the mass of the rest
        log_probs  [s, k]         float16 or float32    of the softmax at `temperature`, in nats, the largest first
        tail_mass  [s]            float32               probability of all other tokens
        indices    [s, k]         2, 3 or 4 bytes       as few as hold the vocabulary

float16 rounds log p by at most |log p| / 2048, which is little where p is large: p |log p| / 2048 is below 2e-4 nats.
Multiplicities of draws, over m, are the weights: they need no float. Elias-Fano: P. Elias, J. ACM 21(2), 1974; R. Fano,
MIT Computation Structures Group memo 61, 1971. It is decoded by whole arrays, unlike a code that goes from one token to
the next.
"""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from minitron_nemo.checks import did_you_mean, require
from minitron_nemo.config.distillation import FORWARD_KL, TOP_K, DivergenceConfig
from minitron_nemo.config.stages import SAMPLED, TeacherLogitsConfig
from minitron_nemo.divergence.sampled import DRAWS, ENTROPY, SampledTeacher
from minitron_nemo.divergence.top_k import INDICES, LOG_PROBS, TAIL_MASS, TopKTeacher

PRECISIONS = ("float16", "float32")


@dataclass(frozen=True, kw_only=True)
class StoreFormat(ABC):
    """What stands in a store, and how."""

    METHOD: ClassVar[str]

    seq_length: int
    vocab_size: int
    """Real entries of the teacher's vocabulary."""
    temperature: float = 1.0
    softcap: float | None = None
    logit_scale: float = 1.0
    samples_per_shard: int = 64

    def __post_init__(self) -> None:
        require(
            self.samples_per_shard >= 1,
            f"teacher_logits.samples_per_shard={self.samples_per_shard} must be at least 1; try 64.",
        )

    @property
    @abstractmethod
    def most_bytes(self) -> int:
        """That a sample takes."""

    @property
    def most_bytes_per_token(self) -> int:
        return -(-self.most_bytes // self.seq_length)

    @property
    @abstractmethod
    def all_alike(self) -> bool:
        """Whether every sample takes as many."""

    @property
    @abstractmethod
    def size(self) -> tuple[str, int]:
        """The key that decides how much a token takes, and its value."""

    @abstractmethod
    def encode(self, answer: Any) -> list[bytes]:
        """Records of a teacher's answer on b samples, [b, s, ...]."""

    @abstractmethod
    def decode(self, record: bytes) -> dict[str, Tensor]:
        """A record as entries of a batch's sample, [s, ...]. Raises: ValueError: it is none of this format."""

    @property
    def divergence(self) -> DivergenceConfig:
        """That reads it, and by which the teacher is asked."""
        return DivergenceConfig(
            kind=FORWARD_KL,
            temperature=self.temperature,
            teacher_softcap=self.softcap,
            teacher_logit_scale=self.logit_scale,
        )

    def facts(self) -> dict[str, Any]:
        return {"method": self.METHOD, **asdict(self)}


def asked_format(config: TeacherLogitsConfig, vocab_size: int) -> StoreFormat:
    shared: dict[str, Any] = {
        "seq_length": config.trainer.seq_length,
        "vocab_size": vocab_size,
        "temperature": config.temperature,
        "softcap": config.softcap,
        "logit_scale": config.logit_scale,
        "samples_per_shard": config.samples_per_shard,
    }
    if config.method == SAMPLED:
        return SampledFormat(draws=config.draws, seed=config.seed, **shared)
    return TopKFormat(k=config.k, precision=config.precision, **shared)


def format_of(facts: dict[str, Any]) -> StoreFormat:
    """That whose `facts` these are; stores made before there were two methods do not name theirs."""
    values = dict(facts)
    return (SampledFormat if values.pop("method", TOP_K) == SAMPLED else TopKFormat)(**values)


@dataclass(frozen=True, kw_only=True)
class SampledFormat(StoreFormat):
    METHOD = SAMPLED

    draws: int
    """Of each token."""
    seed: int = 0
    """Of the offsets of the draws."""

    @property
    def most_bytes(self) -> int:
        """All draws different; text whose next token is nearly certain takes a fraction of it."""
        distinct = self.seq_length * min(self.draws, self.vocab_size)
        low, high = distinct * self._low_bits(distinct), distinct + (self._universe >> self._low_bits(distinct))
        most = 2 * self.seq_length + self._repeat_bytes + -(-low // 8) + -(-high // 8)
        return most + most // 1024 + 16  # of zlib where nothing can be packed, which is less: RFC 1951, section 3.2.4

    @property
    def all_alike(self) -> bool:
        return False

    @property
    def size(self) -> tuple[str, int]:
        return "draws", self.draws

    def offsets(self, sample: int) -> np.ndarray:
        """[s] float64 in [0, 1) of a sample's draws, the same wherever and whenever it is asked for."""
        bits = np.random.Philox(key=[self.seed, sample]).random_raw(self.seq_length)
        return np.asarray(bits >> np.uint64(32), np.float64) / 2**32

    def encode(self, answer: SampledTeacher) -> list[bytes]:
        draws, entropy = (part.cpu().numpy() for part in (answer.indices, answer.entropy))
        require(
            bool(np.isfinite(entropy).all()),
            "the teacher's logits are not finite, and nothing can be drawn from them. Look at teacher_logits.model.",
        )
        return [self._encode(*sample) for sample in zip(draws, entropy, strict=True)]

    def _encode(self, draws: np.ndarray, entropy: np.ndarray) -> bytes:
        repeats = draws[:, 1:] == draws[:, :-1]
        new = np.pad(~repeats, ((0, 0), (1, 0)), constant_values=True)
        places = np.arange(self.seq_length)[:, None] * self.vocab_size
        tokens = (draws + places)[new]
        low_bits = self._low_bits(len(tokens))
        low = (tokens[:, None] >> np.arange(low_bits)) & 1
        ones = (tokens >> low_bits) + np.arange(len(tokens))
        high = np.zeros(ones[-1] + 1, bool)
        high[ones] = True
        body = entropy.astype("<f2").tobytes() + b"".join(
            np.packbits(bits).tobytes() for bits in (repeats, low.astype(bool), high)
        )
        return zlib.compress(body)

    def decode(self, record: bytes) -> dict[str, Tensor]:
        s, m, packed_record = self.seq_length, self.draws, zlib.decompressobj()
        body = packed_record.decompress(record, self.most_bytes)
        _require_whole(packed_record.eof and len(body) >= 2 * s + self._repeat_bytes)
        entropy, packed = np.frombuffer(body, "<f2", s), np.frombuffer(body, "u1", offset=2 * s)
        repeats = np.unpackbits(packed[: self._repeat_bytes], count=s * (m - 1)).reshape(s, m - 1)
        new = np.pad(repeats == 0, ((0, 0), (1, 0)), constant_values=True)
        count = int(new.sum())
        low_bits, start = self._low_bits(count), self._repeat_bytes
        end = start + -(-count * low_bits // 8)
        _require_whole(end <= len(packed))
        low = np.unpackbits(packed[start:end], count=count * low_bits).reshape(count, low_bits)
        ones = np.flatnonzero(np.unpackbits(packed[end:]))
        _require_whole(len(ones) == count)
        tokens = ((ones - np.arange(count)) << low_bits) + low.astype(np.int64) @ (1 << np.arange(low_bits))
        tokens -= np.repeat(np.arange(s), new.sum(1)) * self.vocab_size
        _require_whole(bool(((tokens >= 0) & (tokens < self.vocab_size)).all()))
        draws = tokens.astype("<i4")[new.cumsum() - 1].reshape(s, m)
        return {DRAWS: torch.from_numpy(draws), ENTROPY: torch.from_numpy(entropy.copy())}

    @property
    def _universe(self) -> int:
        return self.seq_length * self.vocab_size

    @property
    def _repeat_bytes(self) -> int:
        return -(-self.seq_length * (self.draws - 1) // 8)

    def _low_bits(self, count: int) -> int:
        return (self._universe // count).bit_length() - 1


def _require_whole(holds: bool) -> None:
    require(holds, "it is not what was written", ValueError)


@dataclass(frozen=True, kw_only=True)
class TopKFormat(StoreFormat):
    METHOD = TOP_K

    k: int
    precision: str = "float16"
    """Of log-probabilities: float16 or float32."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.precision in PRECISIONS,
            f"teacher_logits.precision={self.precision} is not known; {did_you_mean(self.precision, PRECISIONS)}",
        )
        require(
            1 <= self.k <= self.vocab_size,
            f"teacher_logits.k={self.k} must be between 1 and the vocabulary of {self.vocab_size} tokens.",
        )

    @property
    def most_bytes(self) -> int:
        return self._record.itemsize

    @property
    def all_alike(self) -> bool:
        return True

    @property
    def size(self) -> tuple[str, int]:
        return "k", self.k

    @property
    def divergence(self) -> DivergenceConfig:
        return replace(super().divergence, kind=TOP_K, k=self.k)

    def encode(self, answer: TopKTeacher) -> list[bytes]:
        assert answer.log_tail_mass is not None
        records = np.empty(len(answer.indices), self._record)
        records["log_probs"] = answer.log_probs.float().cpu().numpy()
        records["tail_mass"] = answer.log_tail_mass.float().exp().cpu().numpy()
        wide = answer.indices.cpu().numpy().astype("<u4")[..., None].view("u1")  # [b, s, k, 4], the low byte first
        records["indices"] = wide[..., : self._index_bytes]
        return [record.tobytes() for record in records]

    def decode(self, record: bytes) -> dict[str, Tensor]:
        _require_whole(len(record) == self.most_bytes)
        fields = np.frombuffer(record, self._record)[0]
        wide = np.zeros((self.seq_length, self.k, 4), "u1")
        wide[..., : self._index_bytes] = fields["indices"]
        return {
            LOG_PROBS: torch.from_numpy(fields["log_probs"].copy()),
            TAIL_MASS: torch.from_numpy(fields["tail_mass"].copy()),
            INDICES: torch.from_numpy(wide.view("<i4")[..., 0]),
        }

    @property
    def _index_bytes(self) -> int:
        return 2 if self.vocab_size <= 1 << 16 else 3 if self.vocab_size <= 1 << 24 else 4

    @property
    def _record(self) -> np.dtype[Any]:
        s, k = self.seq_length, self.k
        values = "<f2" if self.precision == "float16" else "<f4"
        return np.dtype(
            [("log_probs", values, (s, k)), ("tail_mass", "<f4", (s,)), ("indices", "u1", (s, k, self._index_bytes))]
        )

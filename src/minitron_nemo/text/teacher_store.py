"""What a teacher says of prepared data, kept on disk; of one sample, teacher_records.py.

A sample is a window of seq_length tokens of a source's training file: window w reads tokens w * seq_length up to and
with (w + 1) * seq_length, the last as a label only, as `windows.batches` cuts them. Nothing else decides what the
teacher says of it: no order, no batch, and the seed of draws. Samples are numbered through the sources, and stand in
shards of equally many; a shard is written under another name and renamed, so that one that is there is whole.

    shard-000012.bin   n = samples_per_shard records, one after the other; where they differ in length before them
        index          [n + 1]    uint64    where each begins in the file, and where the last one ends
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from minitron_nemo.artifact import Artifact, is_artifact, open_artifact
from minitron_nemo.checks import reading, require
from minitron_nemo.config.distillation import TOP_K, DivergenceConfig
from minitron_nemo.parallel import rank_zero_works
from minitron_nemo.text.teacher_records import StoreFormat, format_of

_PLACE = 8  # bytes of an entry of a shard's index
_MEND = "Copy it again, or remove it and run teacher-logits."


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

    def most_bytes(self, shards: Sequence[int]) -> int:
        """That these take; where every sample takes as much, what they do."""
        samples = sum(len(self.samples(shard)) for shard in shards)
        return samples * self.format.most_bytes + sum(self._index_bytes(len(self.samples(shard))) for shard in shards)

    def missing(self) -> list[int]:
        """Those that are not there, or not whole."""
        return [shard for shard in range(len(self)) if self._ends(self.path(shard), len(self.samples(shard))) is None]

    def begun(self, shard: int) -> list[bytes]:
        """Records of the first samples of a shard, where a run was stopped within it."""
        file = self._begun(shard)
        ends = self._ends(file)
        if ends is None:
            return []
        content = file.read_bytes()
        return [content[start:end] for start, end in itertools.pairwise(ends)]

    def samples_left(self, shard: int) -> range:
        """Those of a missing shard that are not begun."""
        return self.samples(shard)[len(self.begun(shard)) :]

    def write(self, shard: int, records: Sequence[bytes]) -> None:
        """Put a shard in its place, or the first samples of it where it stays for now as `shard-*.begun`.

        One cut off on the way there leaves `shard-*.partial`.
        """
        partial = self.path(shard).with_suffix(".partial")
        with partial.open("wb") as file:
            if not self.format.all_alike:
                ends = itertools.accumulate(map(len, records), initial=self._index_bytes(len(records)))
                file.write(np.fromiter(ends, "<u8").tobytes())
            file.writelines(records)
            file.flush()
            os.fsync(file.fileno())
        if len(records) < len(self.samples(shard)):
            partial.rename(self._begun(shard))
        else:
            partial.rename(self.path(shard))
            self._begun(shard).unlink(missing_ok=True)

    def read(self, sample: int) -> dict[str, Tensor]:
        """The teacher's answers on one sample. Raises: ValueError: its record is damaged."""
        shard, place = divmod(sample, self.format.samples_per_shard)
        path, most = self.path(shard), self.format.most_bytes
        with reading(path, f"{self.directory} is damaged: {_MEND}"), path.open("rb") as file:
            start, end = place * most, (place + 1) * most
            if not self.format.all_alike:
                file.seek(place * _PLACE)
                start, end = map(int, np.frombuffer(file.read(2 * _PLACE), "<u8", 2))
            require(start <= end <= start + most, f"its index has sample {sample} from {start} to {end}", ValueError)
            file.seek(start)
            return self.format.decode(file.read(end - start))

    def bytes_written(self) -> int:
        return sum(self.path(shard).stat().st_size for shard in range(len(self)))

    def require_whole(self, *, key: str) -> None:
        """Raises: ValueError: a shard is gone or cut short."""
        for shard in self.missing():
            path = self.path(shard)
            found = f"has {path.stat().st_size} bytes" if path.is_file() else "is not there"
            belongs = f"{self.most_bytes([shard])} bytes belong there"
            if not self.format.all_alike:
                belongs = f"its index of {len(self.samples(shard))} samples ends elsewhere"
            require(False, f"{path} {found}, and {belongs}: {key}={self.directory} is damaged. {_MEND}")

    def _begun(self, shard: int) -> Path:
        return self.path(shard).with_suffix(".begun")

    def _index_bytes(self, samples: int) -> int:
        return 0 if self.format.all_alike else (samples + 1) * _PLACE

    def _ends(self, path: Path, samples: int | None = None) -> list[int] | None:
        """Where the records in a file begin and the last one ends; None where it does not hold `samples` whole ones.

        Args:
            samples: None: any number that a shard may have.
        """
        if not path.is_file():
            return None
        size, most = path.stat().st_size, self.format.most_bytes
        if self.format.all_alike:
            ends = list(range(0, size + 1, most))
        else:
            with path.open("rb") as file:  # the first record begins where the index ends
                first = int.from_bytes(file.read(_PLACE), "little")
                file.seek(0)
                index = file.read(min(first, self._index_bytes(self.format.samples_per_shard)))
            ends = np.frombuffer(index[: len(index) // _PLACE * _PLACE], "<u8").astype(object).tolist()
            ends = ends if first == len(index) == self._index_bytes(len(ends) - 1) else []
        lengths = [end - start for start, end in itertools.pairwise(ends)]
        whole = bool(ends) and ends[-1] == size and all(0 <= length <= most for length in lengths)
        return ends if whole and (samples is None or samples == len(lengths)) else None


@dataclass(frozen=True)
class StoredSource:
    """Windows of a source's training file; samples first to first + samples - 1 of a store."""

    data: str
    """Digest of the prepared data."""
    file: str
    """Its training file there, without ending."""
    first: int
    samples: int
    spread_over: int | None = None
    """Windows of the file, over which they are spread evenly; None, as older stores have it: they are its first."""


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
        store = cls(artifact, format_of(facts["format"]), sources)
        rank_zero_works(partial(store.shards.require_whole, key=key))
        return store

    @staticmethod
    def facts(format: StoreFormat, sources: list[StoredSource]) -> dict[str, Any]:
        """What `open` reads in the manifest."""
        return {"format": format.facts(), "sources": [asdict(source) for source in sources]}

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
        key = "distill.distillation.divergence"
        require(
            divergence.kind == ours.kind,
            f"{key}.kind={divergence.kind}, but distill.teacher_logits={path} was made with teacher_logits.method="
            f"{stored.METHOD}, which kind={ours.kind} reads. Set {key}.kind={ours.kind}, or run teacher-logits again "
            "with the other method.",
        )
        asked = {"trainer.seq_length": (seq_length, stored.seq_length)} | {
            f"{key}.{name}": (getattr(divergence, name), getattr(ours, name))
            for name in ("k", "teacher_softcap", "teacher_logit_scale")
        }
        if ours.kind != TOP_K or divergence.tail == "bucket":
            asked[f"{key}.temperature"] = (divergence.temperature, stored.temperature)
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

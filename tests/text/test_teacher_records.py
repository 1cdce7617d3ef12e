"""Claims about a stored teacher on disk: what is written is read, what it takes, and that damage is found."""

from __future__ import annotations

import dataclasses
import os
import re
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from minitron_nemo.config.stages import TeacherLogitsConfig
from minitron_nemo.divergence.sampled import DRAWS, ENTROPY, SampledTeacher, draws_of_rows
from minitron_nemo.divergence.top_k import INDICES, LOG_PROBS, TAIL_MASS, TopKTeacher
from minitron_nemo.divergence.vocabulary import Vocabulary
from minitron_nemo.text.teacher_records import SampledFormat, StoreFormat, TopKFormat, asked_format
from minitron_nemo.text.teacher_store import Shards


def test_a_top_k_token_takes_at_most_300_bytes() -> None:
    for vocab_size in (32_000, 128_256, 256_000):
        config = TeacherLogitsConfig(method="top_k")
        assert asked_format(config, vocab_size).most_bytes_per_token <= 300


def top_k_format(vocab_size: int = 100, precision: str = "float16", samples_per_shard: int = 2) -> TopKFormat:
    values = {"k": 3, "seq_length": 5, "vocab_size": vocab_size}
    return TopKFormat(**values, precision=precision, samples_per_shard=samples_per_shard)


def sampled_format(vocab_size: int = 100, samples_per_shard: int = 2) -> SampledFormat:
    return SampledFormat(draws=9, seq_length=5, vocab_size=vocab_size, samples_per_shard=samples_per_shard)


def random_answer(samples: int, format: StoreFormat) -> Any:
    generator = torch.Generator().manual_seed(5)
    if isinstance(format, SampledFormat):
        shape = (samples, format.seq_length, format.draws)
        indices = torch.randint(min(format.vocab_size, 7), shape, generator=generator).sort(-1).values
        indices[0, 0, -1] = indices[-1, -1, :] = format.vocab_size - 1
        return SampledTeacher(indices, torch.rand(*shape[:2], generator=generator))
    logits = torch.randn(samples, format.seq_length, format.k + 1, generator=generator)
    log_probs = logits.log_softmax(-1)
    indices = torch.randint(format.vocab_size, log_probs[..., 1:].shape, generator=generator)
    indices[0, 0, 0] = format.vocab_size - 1
    return TopKTeacher(indices, log_probs[..., 1:], log_probs[..., 0])


@pytest.mark.parametrize("vocab_size", [1 << 16, (1 << 16) + 1, (1 << 24) + 1])
@pytest.mark.parametrize("precision", ["float16", "float32"])
def test_what_is_written_is_read(tmp_path: Path, vocab_size: int, precision: str) -> None:
    format = top_k_format(vocab_size, precision)
    shards, answer = Shards(tmp_path, format, num_samples=3), random_answer(3, format)
    records = format.encode(answer)
    shards.write(0, records[:2])
    shards.write(1, records[2:])
    for sample in range(3):
        read = shards.read(sample)
        assert torch.equal(read[INDICES].long(), answer.indices[sample])
        expected = answer.log_probs[sample].to(getattr(torch, precision))
        assert read[LOG_PROBS].dtype == expected.dtype and torch.equal(read[LOG_PROBS], expected)
        assert_close(read[TAIL_MASS], answer.log_tail_mass[sample].exp(), rtol=1e-6, atol=0)
    size = sum(file.stat().st_size for file in tmp_path.iterdir())
    assert size == 3 * 5 * format.most_bytes_per_token == shards.bytes_written()


@pytest.mark.parametrize("vocab_size", [5, 100, 49_152, (1 << 24) + 1])
def test_draws_that_are_written_are_read(tmp_path: Path, vocab_size: int) -> None:
    format = sampled_format(vocab_size)
    shards, answer = Shards(tmp_path, format, num_samples=3), random_answer(3, format)
    records = format.encode(answer)
    assert len({len(record) for record in records}) > 1 or vocab_size == 5
    assert max(map(len, records)) <= format.most_bytes
    shards.write(0, records[:2])
    shards.write(1, records[2:])
    for sample in (2, 0, 1):
        read = shards.read(sample)
        assert read[DRAWS].dtype == torch.int32 and torch.equal(read[DRAWS].long(), answer.indices[sample])
        assert torch.equal(read[ENTROPY], answer.entropy[sample].half())
    assert shards.missing() == []


def test_draws_take_at_most_64_bytes_a_token_where_text_is_as_uncertain_as_text_is() -> None:
    """A vocabulary of 49152 with Zipf's law behind the likeliest token, which has half of the mass: 3.6 nats."""
    format = asked_format(TeacherLogitsConfig(method="sampled"), 49_152)
    generator, vocabulary = torch.Generator().manual_seed(8), Vocabulary.split(49_152, None, None)
    logits = -torch.arange(1, 49_153).double().log()
    logits[0] = logits[1:].logsumexp(0)
    rows = torch.stack([logits[torch.randperm(49_152, generator=generator)] for _ in range(32)]).float()
    assert isinstance(format, SampledFormat)
    format = dataclasses.replace(format, seq_length=32)
    offsets = torch.from_numpy(format.offsets(0))
    answer = draws_of_rows(rows, offsets, format.draws, format.divergence, vocabulary)
    assert 3 < answer.entropy.mean() < 6
    (record,) = format.encode(answer.of_tokens(1, 32))
    assert 30 < len(record) / 32 <= 64 < format.most_bytes_per_token


def test_a_teacher_that_is_not_finite_is_not_stored() -> None:
    format = sampled_format()
    answer = random_answer(2, format)
    answer.entropy[1, 2] = float("nan")
    with pytest.raises(ValueError, match=r"the teacher's logits are not finite, .* Look at teacher_logits.model"):
        format.encode(answer)


BOTH = [top_k_format(samples_per_shard=1), sampled_format(samples_per_shard=1)]


@pytest.mark.parametrize("format", BOTH, ids=["top_k", "sampled"])
def test_a_shard_that_was_being_written_when_killed_does_not_count(tmp_path: Path, format: StoreFormat) -> None:
    shards, records = Shards(tmp_path, format, num_samples=2), format.encode(random_answer(2, format))
    child = os.fork()
    if child == 0:  # killed when the second shard's bytes are in their file
        shards.write(0, records[:1])
        os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)
        shards.write(1, records[1:])
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert [file.name for file in sorted(tmp_path.iterdir())] == ["shard-000000.bin", "shard-000001.partial"]
    assert shards.missing() == [1]
    shards.write(1, records[1:])
    assert shards.missing() == []


@pytest.mark.parametrize("format", [top_k_format(), sampled_format()], ids=["top_k", "sampled"])
def test_a_begun_shard_goes_on_behind_its_first_samples(tmp_path: Path, format: StoreFormat) -> None:
    shards, records = Shards(tmp_path, format, num_samples=2), format.encode(random_answer(2, format))
    shards.write(0, records[:1])
    assert shards.missing() == [0] and shards.begun(0) == records[:1] and shards.samples_left(0) == range(1, 2)
    shards.write(0, [*shards.begun(0), records[1]])
    assert shards.missing() == [] and [file.name for file in tmp_path.iterdir()] == ["shard-000000.bin"]


@pytest.mark.parametrize("format", [top_k_format(), sampled_format()], ids=["top_k", "sampled"])
@pytest.mark.parametrize("damage", ["cut short", "gone", "of something else"])
def test_a_damaged_store_is_refused(tmp_path: Path, damage: str, format: StoreFormat) -> None:
    shards = Shards(tmp_path, format, num_samples=3)
    shards.write(0, format.encode(random_answer(2, format)))
    shards.write(1, format.encode(random_answer(1, format)))
    shards.require_whole(key="store")
    path, size = shards.path(1), shards.path(1).stat().st_size
    if damage == "gone":
        path.unlink()
    elif damage == "cut short":
        os.truncate(path, size - 1)
    else:
        path.write_bytes(b"\xff" * (size - 1))
    found = "is not there" if damage == "gone" else f"has {size - 1} bytes"
    belongs = f"{size} bytes belong there" if format.all_alike else "its index of 1 samples ends elsewhere"
    expected = f"shard-000001.bin {found}, and {belongs}: store={tmp_path} is damaged"
    with pytest.raises(ValueError, match=re.escape(expected)):
        shards.require_whole(key="store")


def test_draws_that_were_damaged_are_not_read(tmp_path: Path) -> None:
    """A bit of any byte; of zlib's last byte before the checksum some bits are nobody's, and change nothing."""
    format = sampled_format()
    shards = Shards(tmp_path, format, num_samples=2)
    shards.write(0, format.encode(random_answer(2, format)))
    whole, expected, refused = shards.path(0).read_bytes(), [shards.read(0), shards.read(1)], []
    for place in range(24, len(whole)):  # behind the index
        shards.path(0).write_bytes(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :])
        sample = int(place >= int.from_bytes(whole[8:16], "little"))
        try:
            found = shards.read(sample)
        except ValueError as error:
            refused.append(str(error))
        else:
            assert all(torch.equal(found[key], expected[sample][key]) for key in (DRAWS, ENTROPY))
        assert torch.equal(shards.read(1 - sample)[DRAWS], expected[1 - sample][DRAWS])
    assert len(refused) >= len(whole) - 24 - 2
    message = re.compile(r".*shard-000000.bin cannot be read \(.*\). .* is damaged: Copy it again")
    assert all(message.match(each) for each in refused)


@pytest.mark.parametrize("other", [{"vocab_size": 60}, {"draws": 10}, {"seq_length": 6}], ids=str)
def test_a_record_of_another_format_is_no_answer(other: dict[str, int]) -> None:
    """Its checksum is right, what stands in it is not."""
    format = sampled_format()
    record = format.encode(random_answer(2, format))[1]
    with pytest.raises(ValueError, match="it is not what was written"):
        dataclasses.replace(format, **other).decode(record)


def test_offsets_are_the_sample_s_own_for_ever() -> None:
    """Numbers of Philox with this key, so that a store made later or elsewhere is the same."""
    format = dataclasses.replace(sampled_format(), seed=3)
    assert np.array_equal(format.offsets(7), format.offsets(7)) and not np.array_equal(
        format.offsets(7), format.offsets(8)
    )
    assert ((format.offsets(7) >= 0) & (format.offsets(7) < 1)).all()


def test_an_unknown_method_is_named() -> None:
    with pytest.raises(ValueError, match=r"teacher_logits.method=sample is not known; .*sampled"):
        TeacherLogitsConfig(method="sample")

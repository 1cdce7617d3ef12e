"""teacher-logits: what the teacher says of the prepared training text, written once beside it.

    shard-*.bin   method=sampled: of every token, draws of the teacher's distribution
                  method=top_k: its k likeliest next tokens, their log-probabilities and the mass of the rest

`distill` then needs no teacher in memory (distill.teacher_logits), at any layout, batch size and order of samples. From
draws it minimises an unbiased estimate of forward KL (arXiv:2503.16870), from likeliest tokens the divergence `top_k`:
with 100 of them and less, arXiv:2407.14679 lost accuracy; here the rest is not left out, but one outcome with its true
mass.

A run that was killed continues with the shards that are missing, one that was told to stop with the next sample; what
is there waits in `<output>.shards` until all of it is.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from minitron_nemo import engine, platform
from minitron_nemo.artifact import Artifact, link_or_copy, open_artifact, saying_when_full, writing
from minitron_nemo.checks import Mistake, reading, require
from minitron_nemo.config.identity import differences
from minitron_nemo.config.stages import TeacherLogitsConfig
from minitron_nemo.parallel import rank_zero_works
from minitron_nemo.runtime.layout import prepare_layout
from minitron_nemo.runtime.teacher_pass import write_missing
from minitron_nemo.text.blend import open_blend, require_length, require_tokenizer_of
from minitron_nemo.text.corpus import TRAIN
from minitron_nemo.text.stored_samples import stored_sources
from minitron_nemo.text.teacher_records import asked_format
from minitron_nemo.text.teacher_store import Shards, TeacherStore
from minitron_nemo.text.tokenizer import load_tokenizer
from minitron_nemo.text.tokenizer_files import tokenizer_digest

_STORE = "store.json"


def run(config: TeacherLogitsConfig) -> Artifact:
    teacher = engine.open_model(config.model, key="teacher_logits.model")
    trainer, output = config.trainer, Path(config.output)
    blend = open_blend(config.data)
    require_tokenizer_of(blend[0][0], load_tokenizer(teacher.tokenizer))
    for artifact, _ in blend:
        require_length(artifact, TRAIN, trainer.seq_length)
    format = asked_format(config, teacher.vocab_size)
    prepare_layout(trainer, teacher.shape, seq_length=trainer.seq_length)
    sources, windows = stored_sources(blend, trainer.seq_length, config.num_samples)
    facts = TeacherStore.facts(format, sources) | {
        "tokenizer_digest": tokenizer_digest(teacher.tokenizer),
        "teacher": {"path": str(teacher.path), "digest": teacher.artifact.digest if teacher.artifact else None},
        "vocab_size": teacher.vocab_size,
    }
    directory = output.with_name(output.name + ".shards")
    shards = Shards(directory, format, sum(source.samples for source in sources))
    with saying_when_full(output):
        rank_zero_works(partial(_begin, directory, facts, output, shards))
        core = engine.open_core(teacher, trainer, platform.dtype_of(trainer.precision))
        started = time.monotonic()
        write_missing(core, windows, shards, micro_batch_size=trainer.micro_batch_size)
    inputs = [*teacher.artifacts, *(artifact for artifact, _ in blend)]
    with writing(output, stage="teacher-logits", config=config, inputs=inputs) as draft:
        rank_zero_works(partial(_take_over, shards, draft.path))
        draft.facts.update(facts)
        draft.metrics.update(
            samples=shards.num_samples,
            tokens=shards.num_samples * trainer.seq_length,
            bytes_per_token=round(shards.bytes_written() / (shards.num_samples * trainer.seq_length), 1),
            teacher_seconds=round(time.monotonic() - started, 1),
        )
    rank_zero_works(partial(shutil.rmtree, directory))
    return open_artifact(output)


def _begin(directory: Path, facts: dict[str, Any], output: Path, shards: Shards) -> None:
    """Make the shards' directory, or find it as it must be. Raises: ValueError: it is not, or the disk is short."""
    _require_same(directory, facts)
    _require_space(output, shards)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / _STORE).write_text(json.dumps(facts))


def _take_over(shards: Shards, directory: Path) -> None:
    for shard in range(len(shards)):
        link_or_copy(shards.path(shard), directory / shards.path(shard).name)


def _require_same(directory: Path, facts: dict[str, Any]) -> None:
    """Raises: ValueError: the shards of a run that was cut off are of something else."""
    kept = directory / _STORE
    if kept.is_file():
        with reading(kept, f"Remove {directory} to start over."):
            started_with = json.loads(kept.read_text())
        for key, then, now in differences(started_with, facts):
            raise Mistake(
                f"{directory} holds shards of a run that was cut off and had {key}={then}, not {now}. Continue it with "
                f"what it was started with, or remove {directory} to start over."
            )


def _require_space(output: Path, shards: Shards) -> None:
    """Say what the store will take, at most. Raises: ValueError: more than is free."""
    missing, format = shards.missing(), shards.format
    need, whole = shards.most_bytes(missing), shards.most_bytes(range(len(shards)))
    place = next(folder for folder in output.absolute().parents if folder.exists())
    free = shutil.disk_usage(place).free
    most, (key, value) = "" if format.all_alike else "at most ", format.size
    tokens = shards.num_samples * format.seq_length
    said = f"{tokens:,} tokens at {most}{format.most_bytes_per_token} bytes each take {most}{_size(whole)}"
    if len(missing) < len(shards):
        said += f", of which {most}{_size(need)} are missing"
    require(
        need <= free,
        f"teacher_logits.output={output}: {said}, and {_size(free)} are free in {place}. Lower teacher_logits.{key} "
        f"({value}), set teacher_logits.num_samples, or set teacher_logits.output to a larger disk.",
    )
    print(f"teacher logits: {said}; {_size(free)} are free.", file=sys.stderr, flush=True)


def _size(count: int) -> str:
    unit = next(unit for unit in ("TiB", "GiB", "MiB", "KiB") if unit == "KiB" or count >= _UNITS[unit])
    return f"{count / _UNITS[unit]:.1f} {unit}"


_UNITS = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}

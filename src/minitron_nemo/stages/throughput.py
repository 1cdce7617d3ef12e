"""throughput: how fast a teacher and its students read and write, side by side on one engine: tokens per second of
prefill and decoding, time to first token and peak memory, at the same batch and at the largest that fits.

Models are Hugging Face folders, such as exports, or shapes with random weights. One process does it, started anew, so
that nothing that ran before weighs on clock or memory; under several ranks the first, while the others wait.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from minitron_nemo.artifact import Artifact, is_artifact, open_artifact, writing
from minitron_nemo.checks import NothingThere, did_you_mean, require
from minitron_nemo.config.stages import EMBEDDED
from minitron_nemo.config.throughput import ThroughputConfig, TimedModel
from minitron_nemo.evaluation.on_vllm import require_vllm
from minitron_nemo.evaluation.throughput import Timed, comparison, measure
from minitron_nemo.hf.check import number_of_parameters
from minitron_nemo.hf.config import CONFIG, hf_config, read_config
from minitron_nemo.kinds import refuse_as_hugging_face
from minitron_nemo.parallel import by_rank_zero
from minitron_nemo.published import PUBLISHED
from minitron_nemo.runtime.own_process import in_own_process
from minitron_nemo.stages.import_hf import embedded_teacher

RESULT, TABLE = "throughput.json", "table.md"


@by_rank_zero
def run(config: ThroughputConfig) -> Artifact:
    """Raises: Mistake: a model is not there or too short, the batch does not fit, or the engine is not installed."""
    require(bool(config.models), "throughput.models is empty. Name Hugging Face folders, the teacher's first.")
    if config.engine == "vllm":
        require_vllm()
    with tempfile.TemporaryDirectory() as scratch:
        models = [
            timed_model(_folder(each, number, Path(scratch)), each, config) for number, each in enumerate(config.models)
        ]
        inputs = [open_artifact(each.model) for each in config.models if is_artifact(each.model)]
        with writing(config.output, stage="throughput", config=config, inputs=inputs) as draft:
            found = in_own_process(measure, models, config)
            (draft.path / RESULT).write_text(json.dumps(found, indent=2) + "\n")
            table = comparison(found)
            (draft.path / TABLE).write_text(table.markdown())
            draft.metrics.update(_metrics(found["rows"]))
    Console().print(table.table())
    return open_artifact(config.output)


def _folder(each: TimedModel, number: int, scratch: Path) -> Path:
    """The folder that a model's name means; of a published shape one with its config.json alone."""
    key = f"throughput.models[{number}].model"
    if each.model in PUBLISHED:
        return write_shape(scratch / str(number), hf_config(PUBLISHED[each.model]))
    folder = embedded_teacher() if each.model == EMBEDDED else Path(each.model)
    refuse_as_hugging_face(folder, key)
    require(
        (folder / CONFIG).is_file(),
        f"{key}={each.model} is no directory with a {CONFIG}. Give a Hugging Face folder, such as an export, or the "
        f"name of a published shape; {did_you_mean(each.model, PUBLISHED)}",
        NothingThere,
    )
    return folder


def write_shape(folder: Path, config: dict[str, Any]) -> Path:
    """A folder of a config.json alone, whose model gets random weights."""
    folder.mkdir(parents=True)
    (folder / CONFIG).write_text(json.dumps(config))
    return folder


def timed_model(folder: Path, each: TimedModel, config: ThroughputConfig) -> Timed:
    """Raises: Mistake: prompt and new tokens are more than it can read."""
    read = read_config(folder)
    room, length = read.get("max_position_embeddings"), config.prompt_tokens + config.new_tokens
    require(
        room is None or length <= room,
        f"throughput.prompt_tokens={config.prompt_tokens} and new_tokens={config.new_tokens} are {length} tokens, and "
        f"{each.title} reads at most {room} (max_position_embeddings). Lower one of them.",
    )
    return Timed(each.model, each.title, str(folder), number_of_parameters(folder), read["vocab_size"])


def _metrics(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """By label, how many times as fast as the first model each decodes at the same batch."""
    same = [row for row in rows if not row["largest"]]
    return {"decode_times_first_model": {row["label"]: row["times_first_model"]["decode"] for row in same}}

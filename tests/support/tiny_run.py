"""The tiny compression's artifacts, stage by stage, for tests that start in the middle of the chain."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from .tiny import SEQ_LENGTH

TARGET = {"hidden_size": 24, "ffn_hidden_size": 48, "num_attention_heads": 4}


@dataclass(frozen=True)
class TinyRun:
    """Artifacts of stages: an imported teacher, data, importance and a pruned student; and what stages share."""

    directory: Path
    hf: Path
    """The teacher as a HF checkpoint."""

    @property
    def teacher(self) -> str:
        return str(self.directory / "teacher")

    @property
    def data(self) -> str:
        return str(self.directory / "data")

    @property
    def importance(self) -> str:
        return str(self.directory / "importance")

    @property
    def student(self) -> str:
        return str(self.directory / "student")


def trainer_values(**layout: Any) -> dict[str, Any]:
    """Fields of TrainerConfig: float32, and a global batch of four that every layout of two ranks can split."""
    return {
        "precision": "fp32",
        "seq_length": SEQ_LENGTH,
        "micro_batch_size": 1,
        "global_batch_size": 4,
        "tensorboard": False,
    } | layout


def make_artifacts(run: TinyRun, corpus: Path) -> None:
    from minitron_nemo.config.data import DataConfig
    from minitron_nemo.config.importance import ImportanceConfig
    from minitron_nemo.config.trainer import TrainerConfig
    from minitron_nemo.stages import estimate_importance, import_hf, prepare_data, prune

    trainer, data = TrainerConfig(**trainer_values()), DataConfig(prepared=run.data)
    import_hf.run(import_hf.ImportHfConfig(model=str(run.hf), trainer=trainer, output=run.teacher))
    prepare_data.run(
        prepare_data.PrepareDataConfig(
            corpus=str(corpus), tokenizer=f"{run.teacher}/tokenizer", validation_fraction=0.2, output=run.data
        )
    )
    estimate_importance.run(
        estimate_importance.EstimateImportanceConfig(
            model=run.teacher,
            importance=ImportanceConfig(num_samples=8),
            trainer=trainer,
            data=data,
            output=run.importance,
        )
    )
    prune.run(
        prune.PruneConfig(
            model=run.teacher, importance=run.importance, target=TARGET, trainer=trainer, output=run.student
        )
    )


def prepare_other_sources(run: TinyRun, folder: Path) -> list[dict[str, Any]]:
    """`data.prepared` of the run's data and of two unequal sources of another kind of text."""
    from minitron_nemo.stages import prepare_data

    for name, records in (("poems", 120), ("lists", 55)):
        lines = [json.dumps({"text": f"{name} {number * 7919} " * (9 + number % 5)}) for number in range(records)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    config = prepare_data.PrepareDataConfig(
        corpus=[str(folder / "poems.jsonl"), str(folder / "lists.jsonl")],
        tokenizer=f"{run.teacher}/tokenizer", validation_fraction=0.3, output=str(folder / "other"),
    )  # fmt: skip
    prepare_data.run(config)
    return [{"path": run.data, "weight": 3}, {"path": str(folder / "other"), "weight": 1}]


def read_weights(path: str) -> dict[str, Tensor]:
    """Full parameters of a model artifact; runs on one process."""
    from minitron_nemo import engine, platform
    from minitron_nemo.config.trainer import TrainerConfig
    from minitron_nemo.parallel import Groups
    from minitron_nemo.runtime.layout import prepare_layout
    from minitron_nemo.weights import stream_full_parameters

    source = engine.open_model(path, key="path")
    trainer = TrainerConfig(**trainer_values())
    prepare_layout(trainer, source.shape, seq_length=trainer.seq_length, seed=0)
    core = engine.open_core(source, trainer, platform.dtype_of(trainer.precision))
    return {name: tensor.clone() for name, tensor in stream_full_parameters(core, source.shape, Groups.from_megatron())}

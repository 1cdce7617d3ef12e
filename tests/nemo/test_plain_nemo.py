"""From a checkpoint of plain NeMo to a pruned model: through stages, through its files and in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minitron_nemo.text.blend import open_blend
from support.ranks import Ranks
from support.tiny import SEQ_LENGTH
from support.tiny_run import TARGET, TinyRun, read_weights, trainer_values

TOKENS = (torch.arange(2 * SEQ_LENGTH) * 37 % 500).view(2, SEQ_LENGTH)


def estimate_and_prune(run: TinyRun, nemo: str, directory: Path) -> None:
    """The stages on NeMo's checkpoint, as on our import of the same teacher; and its files cut without a model."""
    from minitron_nemo.config.data import DataConfig
    from minitron_nemo.config.importance import ImportanceConfig
    from minitron_nemo.config.trainer import TrainerConfig
    from minitron_nemo.stages import estimate_importance, prune

    shared: dict[str, Any] = {"model": nemo, "trainer": TrainerConfig(**trainer_values())}
    estimate_importance.run(
        estimate_importance.EstimateImportanceConfig(
            **shared,
            importance=ImportanceConfig(num_samples=8),
            data=DataConfig(prepared=run.data),
            output=str(directory / "importance"),
        )
    )
    for offline in (False, True):
        config = prune.PruneConfig(
            **shared,
            importance=str(directory / "importance"),
            target=TARGET,
            offline=offline,
            output=str(directory / ("offline" if offline else "loaded")),
        )
        prune.run(config)


def prune_in_memory(run: TinyRun, nemo: str) -> tuple[dict[str, Tensor], Tensor]:
    """Scored and pruned without a stage: the student's weights and its logits."""
    from minitron_nemo import engine, platform
    from minitron_nemo.config.data import DataConfig
    from minitron_nemo.config.importance import ImportanceConfig
    from minitron_nemo.config.trainer import TrainerConfig
    from minitron_nemo.parallel import Groups
    from minitron_nemo.pruning import plan_from_importance, prune_into
    from minitron_nemo.runtime.forward import estimate_importance, last_logits
    from minitron_nemo.runtime.layout import prepare_layout
    from minitron_nemo.text.blend import split_prefixes
    from minitron_nemo.text.windows import batches
    from minitron_nemo.weights import stream_full_parameters

    source, trainer = engine.open_model(nemo, key="model"), TrainerConfig(**trainer_values())
    prepare_layout(trainer, source.shape, seq_length=SEQ_LENGTH, seed=1234)
    dtype = platform.dtype_of(trainer.precision)
    teacher = engine.open_core(source, trainer, dtype)
    data = DataConfig(prepared=run.data)
    prefixes = [prefix for artifact, _ in open_blend(data) for prefix in split_prefixes(artifact, "train")]
    samples = batches(prefixes, SEQ_LENGTH, 1, 8, dp_rank=0, dp_size=1, seed=1234)
    importance = estimate_importance(teacher, source.shape, samples, ImportanceConfig(num_samples=8))
    plan = plan_from_importance(importance, source.shape, source.shape.pruned_to(**TARGET))
    groups = Groups.from_megatron()
    student = engine.new_core(plan.target, trainer, dtype)
    prune_into(teacher, student, plan, groups)
    stream = stream_full_parameters(student, plan.target, groups)
    return {name: tensor.clone() for name, tensor in stream}, last_logits(student, TOKENS)


def logits_of(path: str) -> Tensor:
    from minitron_nemo import engine, platform
    from minitron_nemo.config.trainer import TrainerConfig
    from minitron_nemo.runtime.forward import last_logits
    from minitron_nemo.runtime.layout import prepare_layout

    source, trainer = engine.open_model(path, key="path"), TrainerConfig(**trainer_values())
    prepare_layout(trainer, source.shape, seq_length=SEQ_LENGTH, seed=1234)
    return last_logits(engine.open_core(source, trainer, platform.dtype_of(trainer.precision)), TOKENS)


def test_a_model_that_nemo_imported_is_pruned_like_our_own_import_of_it(
    ranks: Ranks, tiny_run: TinyRun, nemo_checkpoint: Path, tmp_path: Path
) -> None:
    alone, nemo = ranks("single"), str(nemo_checkpoint)
    alone.run(estimate_and_prune, tiny_run, nemo, tmp_path)
    [expected], [expected_logits] = alone.run(read_weights, tiny_run.student), alone.run(logits_of, tiny_run.student)
    assert expected_logits.isfinite().all()
    found = {name: alone.run(read_weights, str(tmp_path / name))[0] for name in ("loaded", "offline")}
    logits = {name: alone.run(logits_of, str(tmp_path / name))[0] for name in found}
    [(found["memory"], logits["memory"])] = alone.run(prune_in_memory, tiny_run, nemo)
    for way, weights in found.items():
        assert weights.keys() == expected.keys(), way
        assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items()), way
        assert torch.equal(logits[way], expected_logits), way

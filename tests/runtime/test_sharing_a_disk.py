"""Ranks on several nodes: who works, who waits for how long, and whose look at the disk counts.

Each rank has a working directory of its own here, as nodes see a file of another node at different times: a relative
path that rank 0 finds leads the others nowhere.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from minitron_nemo.artifact import Artifact, is_artifact, open_artifact
from minitron_nemo.config.stages import PrepareDataConfig, PruneConfig, PruneHfConfig, ReportConfig, ReportRow
from minitron_nemo.config.trainer import Layout, TrainerConfig
from minitron_nemo.parallel import rank, world_size
from support.ranks import Ranks
from support.tiny_run import TARGET, TinyRun, trainer_values

SHORT = 12 / 60
"""Minutes that a collective waits here."""


@contextmanager
def own_directory(parent: Path) -> Iterator[Path]:
    before, mine = Path.cwd(), parent / f"rank{rank()}"
    mine.mkdir()
    os.chdir(mine)
    try:
        yield mine
    finally:
        os.chdir(before)


# ---- whose look counts -----------------------------------------------------------------------------------------------


def what_is_there(parent: Path) -> dict[str, Any]:
    """What every rank says of an artifact that only rank 0 sees, and of one that only the others do."""
    with own_directory(parent):
        name = "made" if rank() == 0 else "elsewhere"
        Path(name).mkdir()
        manifest = '{"stage": "prune", "metrics": {"rank": %d}, "facts": {}, "digest": "d", "files": {}}'
        Path(name, "manifest.json").write_text(manifest % rank())
        with pytest.raises(FileNotFoundError, match="model=elsewhere does not exist"):
            open_artifact("elsewhere", key="model")
        return {
            "there": (is_artifact("made"), is_artifact("elsewhere")),
            "rank": open_artifact("made").metrics["rank"],
        }


def test_rank_zero_looks_at_the_disk_and_all_ranks_hear(ranks: Ranks, tmp_path: Path) -> None:
    assert ranks("dp2").run(what_is_there, tmp_path) == [{"there": (True, False), "rank": 0}] * 2


# ---- who works -------------------------------------------------------------------------------------------------------


def one_process_stages(run: TinyRun) -> dict[str, Artifact]:
    """Those that one process does, writing to where only rank 0 sees."""
    from minitron_nemo.stages import prepare_data, prune, prune_hf, report

    teacher, importance = run.teacher, run.importance
    data = PrepareDataConfig(corpus="corpus", tokenizer=f"{teacher}/tokenizer", validation_fraction=0.2, output="data")
    if rank() == 0:
        Path("corpus").symlink_to(run.directory / "corpus")
    prepare_data.check(data)
    cut: dict[str, Any] = {"model": teacher, "importance": importance, "target": TARGET, "offline": True}
    rows = [ReportRow(label="student", model=run.student)]
    return {
        "data": prepare_data.run(data),
        "student": prune.run(PruneConfig(**cut, output="student")),
        "pruned_hf": prune_hf.run(PruneHfConfig(model=str(run.hf), plan=run.student, output="pruned_hf")),
        "report": report.run(ReportConfig(run_dir=run.directory, rows=rows, output=Path("report"))),
    }


def make_in_own_directory(parent: Path, run: TinyRun) -> dict[str, str]:
    with own_directory(parent):
        return {name: artifact.digest for name, artifact in one_process_stages(run).items()}


def test_stages_of_one_process_are_rank_zeros_under_several(ranks: Ranks, tiny_run: TinyRun, tmp_path: Path) -> None:
    places = [tmp_path / name for name in ("alone", "both")]
    for place in places:
        place.mkdir()
    [expected] = ranks("single").run(make_in_own_directory, places[0], tiny_run)
    assert ranks("dp2").run(make_in_own_directory, places[1], tiny_run) == [expected] * 2
    made = [sorted(path.name for path in (places[1] / f"rank{number}").iterdir()) for number in range(2)]
    assert made == [["corpus", *sorted(expected)], []]


# ---- how long others wait --------------------------------------------------------------------------------------------


def with_short_groups() -> None:
    """A process group, and Megatron's, whose collectives wait 12 seconds."""
    store, own, size = dist.distributed_c10d._get_default_store(), rank(), world_size()
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
    layout = Layout(distributed_timeout_minutes=SHORT)
    dist.init_process_group(
        "gloo", store=dist.PrefixStore("short", store), rank=own, world_size=size, timeout=layout.distributed_timeout
    )
    from minitron_nemo.runtime.layout import use_layout

    use_layout(layout, seed=0)


def build_slowly(data: str, index: Path) -> int:
    """Samples of a training set whose index takes rank 0 longer to write than a collective waits."""
    import lightning.pytorch as pl
    import numpy as np

    from minitron_nemo.config.data import DataConfig
    from minitron_nemo.nemo.data_module import build_data_module
    from minitron_nemo.text.tokenizer import load_tokenizer

    with_short_groups()
    save, slept = np.save, []

    def slow(*args: Any, **kwargs: Any) -> None:
        if not slept:
            slept.append(time.sleep(1.5 * 60 * SHORT))
        save(*args, **kwargs)

    module = build_data_module(
        DataConfig(prepared=data), load_tokenizer(f"{data}/tokenizer"), 32, 1, 4, index_dir=index
    )
    module.trainer = pl.Trainer(accelerator="cpu", max_steps=2, limit_val_batches=1, limit_test_batches=0, logger=False)
    np.save = slow
    try:
        module.setup()
    finally:
        np.save = save
    assert bool(slept) == (rank() == 0)
    return len(module._train_ds)


def test_the_sample_index_may_take_longer_than_a_collective_waits(
    ranks: Ranks, tiny_run: TinyRun, tmp_path: Path
) -> None:
    first, second = ranks("dp2").run(build_slowly, tiny_run.data, tmp_path)
    assert first == second >= 8


def time_outs(directory: Path, launched: bool) -> list[float]:
    """Seconds that collectives of a run wait: its own group's, Megatron's, and what NeMo's strategy has been told."""
    from minitron_nemo.config.training import TrainingConfig
    from minitron_nemo.nemo.trainer import build_trainer
    from minitron_nemo.runtime.layout import stop, use_layout

    stop()
    before = {name: os.environ.pop(name, None) for name in ("RANK", "WORLD_SIZE")}
    if launched:  # by torchrun, whose store stands. Lightning takes WORLD_SIZE away where it has trained in a process
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    config = TrainerConfig(**trainer_values(), distributed_timeout_minutes=SHORT)
    try:
        use_layout(config, seed=0)
    finally:
        os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)
        os.environ |= {name: value for name, value in before.items() if value is not None}
    groups = [dist.group.WORLD, parallel_state.get_data_parallel_group()]
    waits = [group._get_backend(torch.device("cpu")).options._timeout for group in groups]
    trainer = build_trainer(config, TrainingConfig(), directory=directory, callbacks=[])
    return [wait.total_seconds() for wait in [*waits, trainer.strategy._timeout]]


@pytest.mark.parametrize("launched", [True, False])
def test_how_long_a_collective_waits_is_a_key(ranks: Ranks, tmp_path: Path, launched: bool) -> None:
    assert ranks("single").run(time_outs, tmp_path, launched) == [[pytest.approx(60 * SHORT)] * 3]


# ---- nodes -----------------------------------------------------------------------------------------------------------


def place_of_trainer(directory: Path) -> tuple[int, ...]:
    """(nodes, processes of each, this one's node and place there) as NeMo's trainer counts; a rank is a node here."""
    from minitron_nemo.config.training import TrainingConfig
    from minitron_nemo.nemo.trainer import build_trainer

    before = {name: os.environ[name] for name in ("LOCAL_WORLD_SIZE", "LOCAL_RANK")}
    os.environ |= {"LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    try:
        config = TrainerConfig(**trainer_values())
        trainer = build_trainer(config, TrainingConfig(), directory=directory, callbacks=[])
        return trainer.num_nodes, trainer.num_devices, trainer.node_rank, trainer.local_rank
    finally:
        os.environ |= before


def test_nodes_are_those_of_the_launcher(ranks: Ranks, tmp_path: Path) -> None:
    """Lightning asks a node for as many GPUs as it is told; on a CPU it takes any number."""
    assert ranks("dp2").run(place_of_trainer, tmp_path) == [(2, 1, 0, 0), (2, 1, 1, 0)]

"""A model artifact is cut on disk as the model loaded, pruned and saved would be."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Qwen3MoeConfig

from minitron_nemo import engine, platform
from minitron_nemo.parallel import Groups
from minitron_nemo.plan import PruningPlan
from minitron_nemo.pruning import prune_into
from support.artifacts import change_manifest, contents
from support.hf import DIMS, hf_model
from support.plans import any_plan, turned
from support.ranks import Ranks
from support.tiny import write_corpus, write_teacher
from support.tiny_run import TinyRun, trainer_values


def prune_both_ways(hf: Path, directory: Path, target: dict[str, int]) -> dict[str, str]:
    """On one process: import the model; prune it through its files and through two models in memory.

    Returns: the imported model's files before that, as `contents` says them.
    """
    from minitron_nemo.artifact import writing
    from minitron_nemo.config.trainer import TrainerConfig
    from minitron_nemo.runtime.checkpoint_surgery import prune_checkpoint
    from minitron_nemo.stages import import_hf

    trainer = TrainerConfig(**trainer_values())
    import_hf.run(import_hf.ImportHfConfig(model=str(hf), trainer=trainer, output=str(directory / "teacher")))
    source = engine.open_model(directory / "teacher", key="model")
    before = contents(source.path)
    plan = any_plan(source.shape, **target)
    for suffix, each in {"": plan, "_turned": turned(plan)}.items():
        for name in ("on_disk", "loaded"):
            with writing(directory / f"{name}{suffix}", stage="prune", config={}, inputs=source.artifacts) as draft:
                if name == "on_disk":
                    prune_checkpoint(source, each, draft.path, meta_core=engine.meta_core)
                    engine.describe_model(each.target, source.tokenizer, draft.path)
                else:
                    dtype = platform.dtype_of(trainer.precision)
                    teacher = engine.open_core(source, trainer, dtype)
                    student = engine.new_core(each.target, trainer, dtype)
                    prune_into(teacher, student, each, Groups.from_megatron())
                    engine.save_model(student, each.target, source.tokenizer, draft.path)
                draft.facts["vocab_size"] = source.vocab_size
    return before


def weights_on_this_layout(path: Path, layout: dict[str, Any]) -> dict[str, Tensor]:
    """Full parameters of an artifact that was loaded on the current layout."""
    from minitron_nemo.config.trainer import TrainerConfig
    from minitron_nemo.runtime.layout import prepare_layout
    from minitron_nemo.weights import stream_full_parameters

    source, trainer = engine.open_model(path, key="path"), TrainerConfig(**trainer_values(**layout))
    prepare_layout(trainer, source.shape, seq_length=trainer.seq_length, seed=0)
    core = engine.open_core(source, trainer, platform.dtype_of(trainer.precision))
    return {name: tensor.clone() for name, tensor in stream_full_parameters(core, source.shape, Groups.from_megatron())}


@pytest.mark.parametrize("name", ["llama tied", "qwen3_moe"])
def test_an_artifact_is_pruned_as_the_loaded_model_is_and_loads_on_every_layout(
    ranks: Ranks, tmp_path: Path, name: str
) -> None:
    hf = write_teacher(tmp_path / "hf", write_corpus(tmp_path / "corpus"), tied=name == "llama tied")
    target = {"num_layers": 2, "hidden_size": 24, "ffn_hidden_size": 48, "num_attention_heads": 4}
    if name == "qwen3_moe":
        config = (
            DIMS
            | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 20}
            | {"vocab_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4}
        )
        hf_model(Qwen3MoeConfig(**config, mlp_only_layers=[1]), hf)  # beside the same tokenizer
        target = {"num_layers": 2, "hidden_size": 16, "ffn_hidden_size": 30, "num_attention_heads": 4}
        target |= {"num_moe_experts": 3, "moe_ffn_hidden_size": 14}  # splits over two ranks
    [before] = ranks("single").run(prune_both_ways, hf, tmp_path, target)
    assert contents(tmp_path / "teacher") == before
    [expected] = ranks("single").run(weights_on_this_layout, tmp_path / "loaded", {})
    split = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
    for layout, sizes in {"single": {}, "tp2-sp": split, "pp2": {"pipeline_model_parallel_size": 2}}.items():
        for found in ranks(layout).run(weights_on_this_layout, tmp_path / "on_disk", sizes):
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[key], tensor) for key, tensor in expected.items()), layout
    ours, theirs = contents(tmp_path / "on_disk"), contents(tmp_path / "loaded")
    found, expected = (
        ranks("single").run(weights_on_this_layout, tmp_path / f"{how}_turned", {})[0] for how in ("on_disk", "loaded")
    )
    assert found.keys() == expected.keys()
    assert all(found[key].allclose(tensor, rtol=1e-5, atol=1e-6) for key, tensor in expected.items())
    beside = [file for file in theirs if not file.startswith("weights/") and file != "manifest.json"]
    assert {file: ours[file] for file in beside} == {file: theirs[file] for file in beside}


def save_with_numbered_layers(path: str, copy: Path) -> None:
    """The same model with each layer's tensors under keys of their own, as some versions write them."""
    from megatron.core import dist_checkpointing

    from minitron_nemo.config.trainer import TrainerConfig
    from minitron_nemo.runtime.distributed_checkpoint import CONTENT, PREFIX, WEIGHTS
    from minitron_nemo.runtime.layout import prepare_layout

    source, trainer = engine.open_model(path, key="path"), TrainerConfig(**trainer_values())
    prepare_layout(trainer, source.shape, seq_length=trainer.seq_length, seed=0)
    core = engine.open_core(source, trainer, platform.dtype_of(trainer.precision))
    content = CONTENT | {"non_homogeneous_layers": True}
    shutil.copytree(path, copy, ignore=shutil.ignore_patterns(WEIGHTS))
    (copy / WEIGHTS).mkdir()
    dist_checkpointing.save(core.sharded_state_dict(prefix=PREFIX, metadata=content), str(copy / WEIGHTS))
    change_manifest(copy, lambda manifest: manifest.update(files={}))


def prune_artifact(path: Path, plan: PruningPlan, output: Path, dtype: torch.dtype | None = None) -> None:
    from minitron_nemo.runtime.checkpoint_surgery import prune_checkpoint

    prune_checkpoint(engine.open_model(path, key="path"), plan, output, meta_core=engine.meta_core, dtype=dtype)


def stored_tensors(path: Path) -> dict[str, Tensor]:
    """What a checkpoint holds, by key, layers stacked or not."""
    from megatron.core import dist_checkpointing
    from torch.distributed.checkpoint import load

    wanted = dist_checkpointing.load_tensors_metadata(str(path / "weights"))
    tensors = {key: torch.empty(entry.global_shape, dtype=entry.dtype) for key, entry in wanted.items()}
    load(tensors, checkpoint_id=path / "weights", no_dist=True)
    return tensors


def test_layers_under_keys_of_their_own_are_read_too(ranks: Ranks, tiny_run: TinyRun, tmp_path: Path) -> None:
    alone, plan = ranks("single"), any_plan(engine.open_model(tiny_run.teacher, key="path").shape, num_layers=2)
    alone.run(save_with_numbered_layers, tiny_run.teacher, tmp_path / "numbered")
    alone.run(prune_artifact, Path(tiny_run.teacher), plan, tmp_path / "expected")
    alone.run(prune_artifact, tmp_path / "numbered", plan, tmp_path / "found")
    [expected], [found] = (alone.run(stored_tensors, tmp_path / name) for name in ("expected", "found"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
    [numbered], [teacher] = (
        alone.run(stored_tensors, path) for path in (tmp_path / "numbered", Path(tiny_run.teacher))
    )
    assert len(numbered) > len(teacher)


def test_an_artifact_is_written_in_the_dtype_asked_for(ranks: Ranks, tiny_run: TinyRun, tmp_path: Path) -> None:
    alone, plan = ranks("single"), any_plan(engine.open_model(tiny_run.teacher, key="path").shape, hidden_size=24)
    for name, dtype in (("stored", None), ("bf16", torch.bfloat16)):
        alone.run(prune_artifact, Path(tiny_run.teacher), plan, tmp_path / name, dtype)
    [stored], [halved] = (alone.run(stored_tensors, tmp_path / name) for name in ("stored", "bf16"))
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}
    assert all(torch.equal(halved[key], tensor.bfloat16()) for key, tensor in stored.items())


def test_an_artifact_that_cannot_be_pruned_is_refused_before_anything_is_written(
    ranks: Ranks, tiny_run: TinyRun, tmp_path: Path
) -> None:
    alone, out, shape = ranks("single"), tmp_path / "out", engine.open_model(tiny_run.teacher, key="path").shape
    plan = any_plan(shape, num_layers=2)
    other = any_plan(dataclasses.replace(shape, ffn_hidden_size=64), num_layers=2)
    with pytest.raises(ValueError, match=r"ffn_hidden_size: 80 there, 64 here\)\. Prune the model that the plan"):
        alone.run(prune_artifact, Path(tiny_run.teacher), other, out)
    with pytest.raises(ValueError, match="runs in one process, not in 2"):
        ranks("dp2").run(prune_artifact, Path(tiny_run.teacher), plan, out)
    copy = Path(shutil.copytree(tiny_run.teacher, tmp_path / "copy"))
    largest = max((copy / "weights").glob("*.distcp"), key=lambda file: file.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-100])
    with pytest.raises(ValueError, match=rf"{largest.name} has \d+ bytes, not \d+"):
        alone.run(prune_artifact, copy, plan, out)
    assert not out.exists()

"""Surgery without a model, against the model loaded, pruned and saved."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    NemotronConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from minitron_nemo import engine, platform
from minitron_nemo.hf import safetensors_stream
from minitron_nemo.hf.checkpoint import load_hf, save_hf
from minitron_nemo.hf.config import shape_from_hf, vocab_size_from_hf
from minitron_nemo.hf.surgery import prune_hf
from minitron_nemo.parallel import Groups
from minitron_nemo.plan import PruningPlan
from minitron_nemo.pruning import prune_into
from minitron_nemo.pruning.basis import principal_basis
from minitron_nemo.shape import ModelShape
from support.artifacts import contents
from support.hf import LLAMA3_SCALING, hf_model, tensors_of
from support.megatron import bare_model
from support.ranks import Ranks
from support.tiny import write_corpus, write_teacher
from support.tiny_run import TinyRun, trainer_values

DIMS: dict[str, Any] = {
    "vocab_size": 51,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,  # 6 x 8 = 48 is not the hidden size
    "max_position_embeddings": 32,
    "initializer_range": 0.2,
}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 20}
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**DIMS),
    "llama tied": LlamaConfig(**DIMS, tie_word_embeddings=True),
    "llama attention bias": LlamaConfig(**DIMS, attention_bias=True),
    "mistral": MistralConfig(**DIMS, sliding_window=None),
    "nemotron": NemotronConfig(**DIMS, norm_eps=1e-3),
    "qwen2": Qwen2Config(**DIMS, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**DIMS),
    "qwen3_moe": Qwen3MoeConfig(**DIMS | MOE, mlp_only_layers=[1]),
    "qwen3_moe every second": Qwen3MoeConfig(**DIMS | MOE, decoder_sparse_step=2),
}
EXPERTS = {"num_moe_experts": 3, "moe_ffn_hidden_size": 13}
TARGET = {"num_layers": 3, "hidden_size": 17, "ffn_hidden_size": 29, "num_attention_heads": 4}
GROUPS = {"num_attention_heads": 3, "num_query_groups": 1}


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every matrix here is read in several blocks, the last one shorter."""
    monkeypatch.setattr(safetensors_stream, "BLOCK_BYTES", 700)


def hf_folder(config: PretrainedConfig, path: Path, *, max_shard_size: str = "20KB") -> Path:
    hf_model(config, path, max_shard_size=max_shard_size)
    return path


def random_plan(source: ModelShape, **target: int) -> PruningPlan:
    """Random kept indices, other ones in every layer; an axis that stays whole keeps all."""
    generator = torch.Generator().manual_seed(5)

    def some(have: int, keep: int) -> Tensor:
        return torch.randperm(have, generator=generator)[:keep].sort().values

    layer = some(source.num_layers, target.get("num_layers", source.num_layers))
    shape = source.keeping_layers(layer.tolist()).pruned_to(**target)
    layers, per_group = range(source.num_layers), source.heads_per_group
    group = torch.stack([some(source.num_query_groups, shape.num_query_groups) for _ in layers])
    axes: dict[str, Tensor] = {}
    if source.has_dense_layers:
        axes["ffn"] = torch.stack([some(source.ffn_hidden_size, shape.ffn_hidden_size) for _ in layers])
    if source.num_moe_experts is not None:
        experts, neurons = range(source.num_moe_experts), (source.moe_ffn_hidden_size, shape.moe_ffn_hidden_size)
        axes["expert"] = torch.stack([some(source.num_moe_experts, shape.num_moe_experts) for _ in layers])
        axes["expert_ffn"] = torch.stack([torch.stack([some(*neurons) for _ in experts]) for _ in layers])
    return PruningPlan(
        source=source,
        target=shape,
        hidden=some(source.hidden_size, shape.hidden_size),
        head=torch.stack(
            [torch.cat([g * per_group + some(per_group, shape.heads_per_group) for g in row]) for row in group]
        ),
        group=group,
        layer=layer,
        **axes,
    )


def turned(plan: PruningPlan) -> PruningPlan:
    """The same with a random basis of the stream, its norms scaled and its embeddings parted."""
    source, keep = plan.source, plan.target.hidden_size
    rows = torch.randn(2 * source.hidden_size, source.hidden_size, generator=torch.Generator().manual_seed(6))
    return dataclasses.replace(
        plan,
        hidden=principal_basis(rows.t() @ rows, keep, keeps_mean=source.normalization != "RMSNorm"),
        norm_scale=torch.linspace(0.5, 1.5, 2 * source.num_layers + 1),
        target=dataclasses.replace(plan.target, share_embeddings_and_output_weights=False),
    )


def prune_loaded(source: Path, plan: PruningPlan, output: Path) -> None:
    """The same through two models in memory."""
    teacher, student = (bare_model(shape) for shape in (plan.source, plan.target))
    load_hf(teacher, source, plan.source, Groups())
    prune_into(teacher, student, plan, Groups())
    save_hf(student, output, plan.target, Groups(), vocab_size=vocab_size_from_hf(source))


# ---- what comes out --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [TARGET, GROUPS, {"num_layers": 2}], ids=["width and depth", "groups", "depth"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_folder_is_pruned_as_the_loaded_model_is(tmp_path: Path, name: str, target: dict[str, int]) -> None:
    source = hf_folder(CONFIGS[name], tmp_path / "in")
    before = contents(source)
    shape = shape_from_hf(source, make_vocab_size_divisible_by=4)
    target = target | (EXPERTS if shape.num_moe_experts and "hidden_size" in target else {})
    target = {dim: size for dim, size in target.items() if dim in shape.prunable_dims}
    plan = random_plan(shape, **target)
    prune_hf(source, plan, tmp_path / "out", max_shard_bytes=18_000)
    assert contents(source) == before
    assert shape_from_hf(tmp_path / "out", make_vocab_size_divisible_by=4) == plan.target
    prune_loaded(source, plan, tmp_path / "loaded")
    found, expected = tensors_of(tmp_path / "out"), tensors_of(tmp_path / "loaded")
    assert found.keys() <= expected.keys()
    for key, tensor in expected.items():
        if key in found:
            assert torch.equal(found[key], tensor), key
        else:  # Megatron has all biases or none
            assert key.endswith(".bias") and not tensor.any(), key
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 1
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in found.values())
    assert {key: file.name for file in files for key in load_file(file)} == index["weight_map"]


@pytest.mark.parametrize("name", ["llama tied", "nemotron", "qwen2", "qwen3_moe"])
def test_a_folder_is_turned_as_the_loaded_model_is(tmp_path: Path, name: str) -> None:
    source = hf_folder(CONFIGS[name], tmp_path / "in")
    shape = shape_from_hf(source)
    plan = turned(random_plan(shape, **{dim: size for dim, size in TARGET.items() if dim in shape.prunable_dims}))
    prune_hf(source, plan, tmp_path / "out", max_shard_bytes=18_000)
    prune_loaded(source, plan, tmp_path / "loaded")
    found, expected = tensors_of(tmp_path / "out"), tensors_of(tmp_path / "loaded")
    for key, tensor in found.items():
        assert_close(tensor, expected[key], rtol=1e-5, atol=1e-6, msg=key)
    assert all(key in found or not tensor.any() for key, tensor in expected.items())


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama tied", "mistral", "nemotron", "qwen2", "qwen3", "qwen3_moe"])
def test_transformers_finds_a_model_turned_in_full_size_unchanged(tmp_path: Path, name: str) -> None:
    source = hf_folder(CONFIGS[name], tmp_path / "in")
    plan = dataclasses.replace(turned(random_plan(shape_from_hf(source))), norm_scale=None)
    prune_hf(source, plan, tmp_path / "out")
    tokens = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
    before, after = (AutoModelForCausalLM.from_pretrained(path)(tokens).logits for path in (source, tmp_path / "out"))
    assert before.abs().max() > 0.1
    assert_close(after, before, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "llama tied", "mistral"])
def test_transformers_loads_the_pruned_folder(tmp_path: Path, name: str) -> None:
    source = hf_folder(CONFIGS[name], tmp_path / "in")
    plan = random_plan(shape_from_hf(source), **TARGET)
    prune_hf(source, plan, tmp_path / "out")
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert sum(parameter.numel() for parameter in model.parameters()) == plan.target.num_parameters
    assert model(torch.tensor([[3, 1, 4, 1, 5]])).logits.isfinite().all()


def test_a_plan_that_keeps_everything_copies_every_bit(tmp_path: Path) -> None:
    source = hf_folder(CONFIGS["llama"], tmp_path / "in", max_shard_size="1GB")
    prune_hf(source, random_plan(shape_from_hf(source)), tmp_path / "out")
    found, expected = tensors_of(tmp_path / "out"), tensors_of(source)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert shape_from_hf(tmp_path / "out") == shape_from_hf(source)


def test_head_merges_are_what_they_are_for_a_loaded_model(tmp_path: Path) -> None:
    """Rows that are sums of rows cannot be read block by block."""
    source = hf_folder(CONFIGS["llama"], tmp_path / "in")
    plan = random_plan(shape_from_hf(source), num_attention_heads=4)
    dropped = [[next(head for head in range(g * 3, g * 3 + 3) if head not in row) for g in (0, 1)] for row in plan.head]
    partner = torch.tensor([[-1, row[0], row[1], -1] for row in dropped])
    plan = dataclasses.replace(plan, head_partner=partner)
    prune_hf(source, plan, tmp_path / "out")
    prune_loaded(source, plan, tmp_path / "loaded")
    found, expected = tensors_of(tmp_path / "out"), tensors_of(tmp_path / "loaded")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_config_json_keeps_what_pruning_does_not_change(tmp_path: Path) -> None:
    source = hf_folder(CONFIGS["llama"], tmp_path / "in")
    config = json.loads((source / "config.json").read_text()) | {
        "layer_types": ["full_attention", "sliding_attention", "full_attention", "sliding_attention"],
        "max_window_layers": 3,
        "rope_scaling": LLAMA3_SCALING,
        "eos_token_id": [2, 3, 4, 5],  # as many as layers, and no list of layers
        "auto_map": {"AutoModelForCausalLM": "modeling.Model"},
        "a key of tomorrow": 1,
    }
    (source / "config.json").write_text(json.dumps(config))
    plan = random_plan(shape_from_hf(source), num_layers=2, hidden_size=17, ffn_hidden_size=13)
    prune_hf(source, plan, tmp_path / "out")
    layers = plan.layer.tolist()
    del config["auto_map"]  # the code it names is not copied
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == config | {
        "num_hidden_layers": 2,
        "hidden_size": 17,
        "intermediate_size": 13,
        "layer_types": [config["layer_types"][layer] for layer in layers],
        "max_window_layers": sum(layer < 3 for layer in layers),
    }


def test_head_dim_and_groups_are_said_even_where_the_source_left_them_out(tmp_path: Path) -> None:
    """Without them transformers takes hidden_size / heads and as many groups as heads, which no longer hold."""
    dims = DIMS | {"num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 8}
    source = hf_folder(LlamaConfig(**dims), tmp_path / "in")
    config = json.loads((source / "config.json").read_text())
    del config["head_dim"], config["num_key_value_heads"]
    (source / "config.json").write_text(json.dumps(config))
    plan = random_plan(shape_from_hf(source), hidden_size=18)
    prune_hf(source, plan, tmp_path / "out")
    assert shape_from_hf(tmp_path / "out") == plan.target


def test_what_lies_beside_the_weights_comes_along_but_neither_code_nor_pickles(tmp_path: Path) -> None:
    source = hf_folder(CONFIGS["llama"], tmp_path / "in")
    wanted = ["tokenizer.json", "special_tokens_map.json", "chat_template.jinja", "tokenizer.model", "LICENSE.txt"]
    others = ["modeling_custom.py", "pytorch_model.bin", "pytorch_model.bin.index.json", "model.gguf"]
    for name in [*wanted, *others]:
        (source / name).write_text(name)
    prune_hf(source, random_plan(shape_from_hf(source), **TARGET), tmp_path / "out")
    found = {file.name for file in (tmp_path / "out").iterdir()}
    weights = {"model.safetensors"}
    assert found == {*wanted, "config.json", "generation_config.json"} | weights


def test_buffers_and_a_second_copy_of_tied_embeddings_are_left_out(tmp_path: Path) -> None:
    source = hf_folder(CONFIGS["llama tied"], tmp_path / "in", max_shard_size="1GB")
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(tensors, source / "model.safetensors")
    plan = random_plan(shape_from_hf(source), **TARGET)
    prune_hf(source, plan, tmp_path / "out")
    assert len(tensors_of(tmp_path / "out")) == 3 * 9 + 2
    tensors["lm_head.weight"][50, 23] += 1
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(ValueError, match=r"ties the output layer .* but lm_head\.weight differs"):
        prune_hf(source, plan, tmp_path / "again")


# ---- what cannot work: nothing is written ----------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return hf_folder(CONFIGS["llama"], tmp_path / "in")


def refused(folder: Path, plan: PruningPlan, message: str, error: type[Exception] = ValueError) -> None:
    with pytest.raises(error, match=message):
        prune_hf(folder, plan, folder.parent / "out")
    assert not (folder.parent / "out").exists()


def test_every_shard_is_checked_before_anything_is_written(folder: Path) -> None:
    plan = random_plan(shape_from_hf(folder), **TARGET)
    last = sorted(folder.glob("*.safetensors"))[-1]
    whole = last.read_bytes()
    for damaged, how in (
        (whole[:-1], r"it has \d+ bytes where its header calls for \d+"),
        (whole + b"\0", r"it has \d+ bytes where its header calls for \d+"),
        (whole[:20], "its header is longer than it"),
        (b"", "its header is longer than it"),
        (b"\x08" + bytes(7) + b"not json" + whole, "its header is not what safetensors writes"),
    ):
        last.write_bytes(damaged)
        refused(folder, plan, f"{last.name} cannot be read as safetensors: {how}.*fetch it again")
    last.unlink()
    refused(folder, plan, f"lacks the shard {last.name}", FileNotFoundError)


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("model.layers.2.mlp.up_proj.weight", None, r"has no tensor model\.layers\.2\.mlp\.up_proj\.weight"),
        ("model.norm.weight", torch.ones(23), r"model\.norm\.weight .* has shape \[23\] where .* calls for \[24\]"),
        ("model.norm.weight", torch.ones(24, dtype=torch.int8), r"dtype torch\.int8: quantized weights cannot be"),
        ("lm_head.bias", torch.ones(51), r"does not have: lm_head\.bias\. Remove them"),
    ],
    ids=["missing", "shape", "quantized", "unknown"],
)
def test_a_tensor_that_does_not_fit_config_json_is_named(
    tmp_path: Path, name: str, tensor: Tensor | None, message: str
) -> None:
    source = hf_folder(CONFIGS["llama"], tmp_path / "in", max_shard_size="1GB")
    tensors = load_file(source / "model.safetensors")
    tensors.pop(name, None)
    save_file(tensors if tensor is None else tensors | {name: tensor}, source / "model.safetensors")
    refused(source, random_plan(shape_from_hf(source), **TARGET), message)


def test_a_plan_for_another_model_is_refused(folder: Path, tmp_path: Path) -> None:
    other = hf_folder(LlamaConfig(**DIMS | {"intermediate_size": 32}), tmp_path / "other")
    refused(folder, random_plan(shape_from_hf(other), **TARGET), r"ffn_hidden_size: 40 there, 32 here\)\. Prune the")
    fewer = hf_folder(LlamaConfig(**DIMS | {"vocab_size": 50}), tmp_path / "fewer")
    refused(folder, random_plan(shape_from_hf(fewer), **TARGET), r"vocab_size=51, more than the plan's padded_vocab")


def test_weights_are_never_written_over(folder: Path) -> None:
    before = contents(folder)
    with pytest.raises(FileExistsError, match="already holds safetensors"):
        prune_hf(folder, random_plan(shape_from_hf(folder), **TARGET), folder)
    assert contents(folder) == before


# ---- model artifacts -------------------------------------------------------------------------------------------------


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
    plan = random_plan(source.shape, **target)
    for suffix, each in {"": plan, "_turned": turned(plan)}.items():
        for name in ("offline", "loaded"):
            with writing(directory / f"{name}{suffix}", stage="prune", config={}, inputs=source.artifacts) as draft:
                if name == "offline":
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
        config = DIMS | MOE | {"vocab_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4}
        hf_model(Qwen3MoeConfig(**config, mlp_only_layers=[1]), hf)  # beside the same tokenizer
        target = {"num_layers": 2, "hidden_size": 16, "ffn_hidden_size": 30, "num_attention_heads": 4}
        target |= EXPERTS | {"moe_ffn_hidden_size": 14}  # splits over two ranks
    [before] = ranks("single").run(prune_both_ways, hf, tmp_path, target)
    assert contents(tmp_path / "teacher") == before
    [expected] = ranks("single").run(weights_on_this_layout, tmp_path / "loaded", {})
    split = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
    for layout, sizes in {"single": {}, "tp2-sp": split, "pp2": {"pipeline_model_parallel_size": 2}}.items():
        for found in ranks(layout).run(weights_on_this_layout, tmp_path / "offline", sizes):
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[key], tensor) for key, tensor in expected.items()), layout
    ours, theirs = contents(tmp_path / "offline"), contents(tmp_path / "loaded")
    found, expected = (
        ranks("single").run(weights_on_this_layout, tmp_path / f"{how}_turned", {})[0] for how in ("offline", "loaded")
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
    alone, plan = ranks("single"), random_plan(engine.open_model(tiny_run.teacher, key="path").shape, num_layers=2)
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
    alone, plan = ranks("single"), random_plan(engine.open_model(tiny_run.teacher, key="path").shape, hidden_size=24)
    for name, dtype in (("stored", None), ("bf16", torch.bfloat16)):
        alone.run(prune_artifact, Path(tiny_run.teacher), plan, tmp_path / name, dtype)
    [stored], [halved] = (alone.run(stored_tensors, tmp_path / name) for name in ("stored", "bf16"))
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}
    assert all(torch.equal(halved[key], tensor.bfloat16()) for key, tensor in stored.items())


def test_an_artifact_that_cannot_be_pruned_is_refused_before_anything_is_written(
    ranks: Ranks, tiny_run: TinyRun, tmp_path: Path
) -> None:
    alone, out, shape = ranks("single"), tmp_path / "out", engine.open_model(tiny_run.teacher, key="path").shape
    plan = random_plan(shape, num_layers=2)
    other = random_plan(dataclasses.replace(shape, ffn_hidden_size=64), num_layers=2)
    with pytest.raises(ValueError, match=r"ffn_hidden_size: 80 there, 64 here\)\. Prune the model that the plan"):
        alone.run(prune_artifact, Path(tiny_run.teacher), other, out)
    with pytest.raises(ValueError, match="runs in one process, not in 2"):
        ranks("dp2").run(prune_artifact, Path(tiny_run.teacher), plan, out)
    copy = Path(shutil.copytree(tiny_run.teacher, tmp_path / "copy"))
    largest = max((copy / "weights").glob("*.distcp"), key=lambda file: file.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-100])
    with pytest.raises(ValueError, match=rf"{largest.name} has \d+ of its \d+ bytes"):
        alone.run(prune_artifact, copy, plan, out)
    assert not out.exists()

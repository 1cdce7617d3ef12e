"""A Hugging Face folder is cut on disk as the model loaded, pruned and saved would be."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

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

from minitron_nemo.checks import CannotWrite
from minitron_nemo.hf import safetensors_stream
from minitron_nemo.hf.checkpoint import load_hf, save_hf
from minitron_nemo.hf.folder import shape_from_hf, vocab_size_from_hf
from minitron_nemo.hf.surgery import prune_hf
from minitron_nemo.parallel import Groups
from minitron_nemo.plan import PruningPlan
from minitron_nemo.pruning import prune_into
from support.artifacts import contents
from support.hf import DIMS, LLAMA3_SCALING, hf_model, tensors_of
from support.megatron import bare_model
from support.plans import any_plan, turned
from support.transformers5 import transformers4, transformers5

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
    plan = any_plan(shape, **target)
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
    plan = turned(any_plan(shape, **{dim: size for dim, size in TARGET.items() if dim in shape.prunable_dims}))
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
    plan = dataclasses.replace(turned(any_plan(shape_from_hf(source))), norm_scale=None)
    prune_hf(source, plan, tmp_path / "out")
    tokens = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
    before, after = (AutoModelForCausalLM.from_pretrained(path)(tokens).logits for path in (source, tmp_path / "out"))
    assert before.abs().max() > 0.1
    assert_close(after, before, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "llama tied", "mistral"])
def test_transformers_loads_the_pruned_folder(tmp_path: Path, name: str) -> None:
    source = hf_folder(CONFIGS[name], tmp_path / "in")
    plan = any_plan(shape_from_hf(source), **TARGET)
    prune_hf(source, plan, tmp_path / "out")
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert sum(parameter.numel() for parameter in model.parameters()) == plan.target.num_parameters
    assert model(torch.tensor([[3, 1, 4, 1, 5]])).logits.isfinite().all()


def test_a_plan_that_keeps_everything_copies_every_bit(tmp_path: Path) -> None:
    source = hf_folder(CONFIGS["llama"], tmp_path / "in", max_shard_size="1GB")
    prune_hf(source, any_plan(shape_from_hf(source)), tmp_path / "out")
    found, expected = tensors_of(tmp_path / "out"), tensors_of(source)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert shape_from_hf(tmp_path / "out") == shape_from_hf(source)


def test_head_merges_are_what_they_are_for_a_loaded_model(tmp_path: Path) -> None:
    """Rows that are sums of rows cannot be read block by block."""
    source = hf_folder(CONFIGS["llama"], tmp_path / "in")
    plan = any_plan(shape_from_hf(source), num_attention_heads=4)
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
    plan = any_plan(shape_from_hf(source), num_layers=2, hidden_size=17, ffn_hidden_size=13)
    prune_hf(source, plan, tmp_path / "out")
    layers = plan.layer.tolist()
    del config["auto_map"]  # the code it names is not copied
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == config | {
        "num_hidden_layers": 2,
        "hidden_size": 17,
        "intermediate_size": 13,
        "layer_types": [config["layer_types"][layer] for layer in layers],
        "max_window_layers": sum(layer < 3 for layer in layers),
        "rope_parameters": {**LLAMA3_SCALING, "rope_theta": 10000.0},  # as transformers 5 reads it, beside 4.57's form
    }


_KINDS_OF_LAYERS = """
import json, sys
from transformers import AutoConfig, AutoModelForCausalLM
found = {}
for path in sys.argv[1:]:
    config = AutoConfig.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype="float32")
    found[path] = [config.num_hidden_layers, len(model.model.layers), getattr(config, "layer_types", None)]
print(json.dumps(found))
"""


def test_lists_of_layers_are_cut_as_both_lines_of_transformers_want_them(tmp_path: Path) -> None:
    """A stale `layer_types` is refused by both for Qwen3, and by 5.x alone for Llama."""
    folders = []
    for name in ("llama", "qwen3", "qwen2"):
        source = hf_folder(CONFIGS[name], tmp_path / name)
        config = json.loads((source / "config.json").read_text())
        (source / "config.json").write_text(json.dumps(config | {"layer_types": ["full_attention"] * 4}))
        folders.append(str(tmp_path / f"{name}-cut"))
        prune_hf(source, any_plan(shape_from_hf(source), num_layers=3, hidden_size=18), folders[-1])
    expected = {path: [3, 3, ["full_attention"] * 3] for path in folders}
    assert transformers4(_KINDS_OF_LAYERS, *folders) == expected
    assert transformers5(_KINDS_OF_LAYERS, *folders) == expected


def test_head_dim_and_groups_are_said_even_where_the_source_left_them_out(tmp_path: Path) -> None:
    """Without them transformers takes hidden_size / heads and as many groups as heads, which no longer hold."""
    dims = DIMS | {"num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 8}
    source = hf_folder(LlamaConfig(**dims), tmp_path / "in")
    config = json.loads((source / "config.json").read_text())
    del config["head_dim"], config["num_key_value_heads"]
    (source / "config.json").write_text(json.dumps(config))
    plan = any_plan(shape_from_hf(source), hidden_size=18)
    prune_hf(source, plan, tmp_path / "out")
    assert shape_from_hf(tmp_path / "out") == plan.target


def test_what_lies_beside_the_weights_comes_along_but_neither_code_nor_pickles(tmp_path: Path) -> None:
    source = hf_folder(CONFIGS["llama"], tmp_path / "in")
    wanted = ["tokenizer.json", "special_tokens_map.json", "chat_template.jinja", "tokenizer.model", "LICENSE.txt"]
    others = ["modeling_custom.py", "pytorch_model.bin", "pytorch_model.bin.index.json", "model.gguf"]
    for name in [*wanted, *others]:
        (source / name).write_text("{}" if name.endswith(".json") else name)
    prune_hf(source, any_plan(shape_from_hf(source), **TARGET), tmp_path / "out")
    found = {file.name for file in (tmp_path / "out").iterdir()}
    assert found == {*wanted, "config.json", "generation_config.json", "tokenizer_config.json", "model.safetensors"}


def test_buffers_and_a_second_copy_of_tied_embeddings_are_left_out(tmp_path: Path) -> None:
    source = hf_folder(CONFIGS["llama tied"], tmp_path / "in", max_shard_size="1GB")
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(tensors, source / "model.safetensors")
    plan = any_plan(shape_from_hf(source), **TARGET)
    prune_hf(source, plan, tmp_path / "out")
    assert len(tensors_of(tmp_path / "out")) == 3 * 9 + 2
    tensors["lm_head.weight"][50, 23] += 1
    save_file(tensors, source / "model.safetensors")
    refused(source, plan, r"share_embeddings_and_output_weights: False there, True here")  # it is another model now


# ---- what cannot work: nothing is written ----------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return hf_folder(CONFIGS["llama"], tmp_path / "in")


def refused(folder: Path, plan: PruningPlan, message: str, error: type[Exception] = ValueError) -> None:
    with pytest.raises(error, match=message):
        prune_hf(folder, plan, folder.parent / "refused")
    assert not (folder.parent / "refused").exists()


def test_every_shard_is_checked_before_anything_is_written(folder: Path) -> None:
    plan = any_plan(shape_from_hf(folder), **TARGET)
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
        ("lm_head.bias", torch.ones(51), r"does not have: lm_head\.bias\. Take the config"),
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
    refused(source, any_plan(shape_from_hf(source), **TARGET), message)


def test_a_plan_for_another_model_is_refused(folder: Path, tmp_path: Path) -> None:
    other = hf_folder(LlamaConfig(**DIMS | {"intermediate_size": 32}), tmp_path / "other")
    refused(folder, any_plan(shape_from_hf(other), **TARGET), r"ffn_hidden_size: 40 there, 32 here\)\. Prune the")
    fewer = hf_folder(LlamaConfig(**DIMS | {"vocab_size": 50}), tmp_path / "fewer")
    refused(folder, any_plan(shape_from_hf(fewer), **TARGET), r"vocab_size=51, more than the plan's padded_vocab")


def test_weights_are_never_written_over(folder: Path) -> None:
    before = contents(folder)
    with pytest.raises(CannotWrite, match="already holds safetensors"):
        prune_hf(folder, any_plan(shape_from_hf(folder), **TARGET), folder)
    assert contents(folder) == before

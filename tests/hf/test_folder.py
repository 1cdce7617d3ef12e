"""Folders as people's tools leave them: read as what they are, or refused by name before anything is written."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, MixtralConfig, NemotronConfig, Qwen3MoeConfig

from minitron_nemo.hf.checkpoint import load_hf, save_hf
from minitron_nemo.hf.config import shape_from_config
from minitron_nemo.hf.folder import Folder, shape_from_hf
from minitron_nemo.parallel import Groups
from support.hf import ATOL, DIMS, LLAMA3_SCALING, TOKENS, hf_logits, hf_model, load_with_transformers, tensors_of
from support.megatron import bare_model, run_gpt

LLAMA, TIED = LlamaConfig(**DIMS), LlamaConfig(**DIMS, tie_word_embeddings=True)
EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "initializer_range": 0.3}


def rewrite(path: Path, *, remove: tuple[str, ...] = (), **changes: Any) -> dict[str, Any]:
    """config.json of `path` with these keys changed."""
    config = json.loads((path / "config.json").read_text()) | changes
    config = {key: value for key, value in config.items() if key not in remove}
    (path / "config.json").write_text(json.dumps(config))
    return config


def change_tensors(path: Path, **changes: Tensor | None) -> None:
    tensors = load_file(path / "model.safetensors") | {key.replace("__", "."): value for key, value in changes.items()}
    save_file(
        {name: tensor for name, tensor in tensors.items() if tensor is not None},
        path / "model.safetensors",
        metadata={"format": "pt"},
    )


@torch.no_grad()
def logits_here(path: Path) -> Tensor:
    """[b, s, v] of TOKENS from Megatron's model of the folder."""
    shape = shape_from_hf(path)
    model = bare_model(shape).eval()
    load_hf(model, path, shape, Groups())
    logits = run_gpt(model, TOKENS)
    assert logits is not None
    return logits


# ---- config.json of both lines ---------------------------------------------------------------------------------------

LATER_ROPE = {**LLAMA3_SCALING, "rope_theta": 500.0}


def test_a_partial_rotary_factor_is_read_where_transformers_5_keeps_it(tmp_path: Path) -> None:
    config = NemotronConfig(**DIMS | {"num_key_value_heads": 6}, partial_rotary_factor=0.25)
    original = hf_model(config, tmp_path)
    later = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25}
    rewrite(tmp_path, remove=("partial_rotary_factor", "rope_theta", "rope_scaling"), rope_parameters=later)
    assert shape_from_hf(tmp_path).rotary_percent == 0.25
    torch.testing.assert_close(logits_here(tmp_path), hf_logits(original), rtol=0, atol=ATOL)


def test_a_mixture_may_count_its_experts_under_either_name(tmp_path: Path) -> None:
    hf_model(Qwen3MoeConfig(**DIMS | EXPERTS, num_experts=6, moe_intermediate_size=20), tmp_path)
    config = rewrite(tmp_path, remove=("num_experts",), num_local_experts=6)
    assert shape_from_hf(tmp_path).num_moe_experts == 6
    with pytest.raises(ValueError, match=r"num_experts=4 and num_local_experts=6\. Which of them transformers"):
        shape_from_config(config | {"num_experts": 4})


@pytest.mark.parametrize(
    ("flat", "later", "message"),
    [
        ({"rope_theta": 1e4}, LATER_ROPE, r"rope_theta=10000\.0 and rope_parameters' rope_theta=500\.0"),
        ({"rope_theta": 500.0, "rope_scaling": None}, LATER_ROPE, r"rope_scaling=None and rope_parameters' rope_scal"),
        (
            {"rope_scaling": LLAMA3_SCALING},
            LATER_ROPE | {"factor": 2.0},
            r"rope_scaling=\{.*'factor': 4\.0.*'factor': 2\.0",
        ),
    ],
    ids=["theta", "no scaling", "another factor"],
)
def test_rope_keys_of_the_two_lines_that_disagree_are_refused_with_both_values(
    flat: dict[str, Any], later: dict[str, Any], message: str
) -> None:
    config = {key: value for key, value in LLAMA.to_dict().items() if not key.startswith("rope")}
    with pytest.raises(ValueError, match=message):
        shape_from_config(config | flat | {"rope_parameters": later})
    agreeing = {"rope_theta": 500.0, "rope_scaling": LLAMA3_SCALING, "rope_parameters": LATER_ROPE}
    assert shape_from_config(config | agreeing).rope_scaling == LLAMA3_SCALING


def test_rope_by_the_type_of_layer_is_refused_by_name() -> None:
    by_layer = {kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ("full_attention", "sliding_attention")}
    with pytest.raises(ValueError, match=r"rope_parameters differs by the type of layer \(full_attention, sliding_att"):
        shape_from_config(LLAMA.to_dict() | {"rope_parameters": by_layer})


def test_a_part_of_a_head_turned_where_the_family_turns_all_is_refused() -> None:
    with pytest.raises(ValueError, match=r"partial_rotary_factor=0\.5 has no meaning in a llama model"):
        shape_from_config(LLAMA.to_dict() | {"partial_rotary_factor": 0.5})


def test_a_vision_language_model_is_called_one() -> None:
    with pytest.raises(ValueError, match=r"model_type='llava' has a text_config: it is a vision-language model.*mod"):
        shape_from_config({"model_type": "llava", "text_config": LLAMA.to_dict(), "vision_config": {}})


def test_block_scaled_float8_is_refused_with_the_call_that_undoes_it() -> None:
    fp8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    with pytest.raises(ValueError, match=r"quant_method=fp8.*FineGrainedFP8Config\(dequantize=True\)"):
        shape_from_config(LLAMA.to_dict() | {"quantization_config": fp8})


# ---- the output layer ------------------------------------------------------------------------------------------------


def test_a_second_copy_of_the_embedding_is_tied_and_another_output_layer_is_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hf_model(TIED, tmp_path)
    embedding = tensors_of(tmp_path)["model.embed_tokens.weight"]
    change_tensors(tmp_path, lm_head__weight=embedding.clone())
    assert shape_from_hf(tmp_path).share_embeddings_and_output_weights
    assert not caplog.text
    change_tensors(tmp_path, lm_head__weight=embedding.flip(0))
    with caplog.at_level(logging.WARNING):
        assert not shape_from_hf(tmp_path).share_embeddings_and_output_weights
    assert "its lm_head.weight differs from model.embed_tokens.weight: the model is taken as untied" in caplog.text
    untied = hf_model(LLAMA, tmp_path / "untied")
    untied.load_state_dict(tensors_of(tmp_path))
    torch.testing.assert_close(logits_here(tmp_path), hf_logits(untied), rtol=0, atol=ATOL)


def test_a_model_without_an_output_layer_is_tied_whatever_its_flag_says(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    original = hf_model(TIED, tmp_path)
    rewrite(tmp_path, tie_word_embeddings=False)
    with caplog.at_level(logging.WARNING):
        assert shape_from_hf(tmp_path).share_embeddings_and_output_weights
    assert "has no lm_head.weight: the embedding serves as the output layer" in caplog.text
    torch.testing.assert_close(logits_here(tmp_path), hf_logits(original), rtol=0, atol=ATOL)


def test_an_export_never_has_a_tied_flag_over_another_output_layer(tmp_path: Path) -> None:
    hf_model(TIED, tmp_path / "in")
    embedding = tensors_of(tmp_path / "in")["model.embed_tokens.weight"]
    change_tensors(tmp_path / "in", lm_head__weight=embedding.flip(0))
    shape = shape_from_hf(tmp_path / "in")
    model = bare_model(shape)
    load_hf(model, tmp_path / "in", shape, Groups())
    save_hf(model, tmp_path / "out", shape, Groups())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    assert torch.equal(tensors_of(tmp_path / "out")["lm_head.weight"], embedding.flip(0))


# ---- tensors and files -----------------------------------------------------------------------------------------------


def test_tensors_that_config_json_does_not_call_for_are_refused_unless_left_out_by_name(tmp_path: Path) -> None:
    hf_model(LLAMA, tmp_path)
    shape = shape_from_hf(tmp_path)
    bias = "model.layers.0.self_attn.q_proj.bias"
    change_tensors(
        tmp_path,
        **{bias.replace(".", "__"): torch.ones(48)},
        model__mtp__norm__weight=torch.ones(24),
        model__layers__1__self_attn__rotary_emb__inv_freq=torch.ones(4),
    )
    with pytest.raises(ValueError, match=rf"does not have: {bias}, model\.mtp\.norm\.weight\. Take.*ignore_tensors"):
        load_hf(bare_model(shape), tmp_path, shape, Groups())
    with pytest.raises(ValueError, match=rf"does not have: {bias}\."):
        load_hf(bare_model(shape), tmp_path, shape, Groups(), ignore=["model.mtp.*"])
    load_hf(bare_model(shape), tmp_path, shape, Groups(), ignore=["model.mtp.*", "*.q_proj.bias"])


@pytest.mark.parametrize(
    "config",
    [
        MixtralConfig(**DIMS | EXPERTS, num_local_experts=3),
        Qwen3MoeConfig(**DIMS | EXPERTS, num_experts=3, moe_intermediate_size=20),
    ],
    ids=["mixtral", "qwen3_moe"],
)
def test_experts_fused_into_one_tensor_are_read_as_each_by_itself(
    tmp_path: Path, config: MixtralConfig | Qwen3MoeConfig
) -> None:
    original = hf_model(config, tmp_path)
    family, shape = Folder(tmp_path).family, shape_from_hf(tmp_path)
    tensors = tensors_of(tmp_path)
    for layer in range(config.num_hidden_layers):
        start = f"decoder.layers.{layer}.mlp."
        experts = [f"{start}experts.local_experts.{expert}.linear_fc" for expert in range(3)]
        gate_up = [torch.cat([tensors.pop(name) for name in family.hf_names(f"{each}1.weight")]) for each in experts]
        down = [tensors.pop(family.hf_names(f"{each}2.weight")[0]) for each in experts]
        tensors[f"model.layers.{layer}.mlp.experts.gate_up_proj"] = torch.stack(gate_up)
        tensors[f"model.layers.{layer}.mlp.experts.down_proj"] = torch.stack(down)
        router = tensors.pop(family.hf_names(f"{start}router.weight")[0])
        tensors[f"model.layers.{layer}.mlp.gate.weight"] = router
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert shape_from_hf(tmp_path) == shape
    torch.testing.assert_close(logits_here(tmp_path), hf_logits(original), rtol=0, atol=ATOL)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_folder_knows_what_its_weights_are_stored_in(tmp_path: Path, dtype: torch.dtype) -> None:
    model = hf_model(LLAMA, tmp_path).to(dtype)
    model.model.norm.float()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    (tmp_path / "model.safetensors").unlink()  # of the first saving
    assert Folder(tmp_path).dtype is dtype


def test_a_download_that_goes_on_is_recognised(tmp_path: Path) -> None:
    hf_model(LLAMA, tmp_path, max_shard_size="20KB")
    shape = shape_from_hf(tmp_path)
    first, second = sorted(tmp_path.glob("*.safetensors"))[:2]
    downloads = tmp_path / ".cache" / "huggingface" / "download"
    downloads.mkdir(parents=True)
    second.rename(downloads / "abc.incomplete")
    with pytest.raises(FileNotFoundError, match=f"lacks the shard {second.name} .* or wait: a download is going on"):
        load_hf(bare_model(shape), tmp_path, shape, Groups())
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"is still being downloaded: abc\.incomplete is there"):
        load_hf(bare_model(shape), tmp_path, shape, Groups())
    (downloads / "abc.incomplete").unlink()
    with pytest.raises(FileNotFoundError, match=f"has {first.name}.* and no model.safetensors.index.json, which says"):
        load_hf(bare_model(shape), tmp_path, shape, Groups())


def test_a_pointer_to_weights_is_not_taken_for_weights(tmp_path: Path) -> None:
    hf_model(LLAMA, tmp_path)
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 269060552\n"
    (tmp_path / "model.safetensors").write_text(pointer)
    with pytest.raises(ValueError, match=r"model\.safetensors is a Git LFS pointer, not the weights.*git lfs pull"):
        shape_from_hf(tmp_path)


def test_of_a_single_file_and_an_index_transformers_choice_is_read(tmp_path: Path) -> None:
    hf_model(LLAMA, tmp_path, max_shard_size="20KB")
    torch.manual_seed(1)
    save_file({name: torch.randn_like(tensor) for name, tensor in tensors_of(tmp_path).items()}, tmp_path / "new")
    (tmp_path / "new").rename(tmp_path / "model.safetensors")
    expected = hf_logits(load_with_transformers(tmp_path))
    torch.testing.assert_close(logits_here(tmp_path), expected, rtol=1e-3, atol=ATOL)

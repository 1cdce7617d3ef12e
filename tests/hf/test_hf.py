"""Hugging Face checkpoints in and out, against transformers' own models."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, LlamaConfig, MistralConfig, PreTrainedModel

from minitron_nemo.axes import take
from minitron_nemo.checks import CannotWrite
from minitron_nemo.hf.checkpoint import load_hf, save_hf
from minitron_nemo.hf.config import hf_config
from minitron_nemo.hf.folder import shape_from_hf, vocab_size_from_hf
from minitron_nemo.parallel import Groups, all_gather_shards
from minitron_nemo.rope import inverse_frequencies
from minitron_nemo.shape import ModelShape
from minitron_nemo.weights import load_full_parameters, stream_full_parameters
from support.hf import ATOL, DIMS, LLAMA3_SCALING, TOKENS, hf_logits, hf_model, load_with_transformers, tensors_of
from support.megatron import TINY, bare_model, build_gpt, run_gpt
from support.ranks import Ranks

CONFIGS: dict[str, LlamaConfig | MistralConfig] = {
    "llama": LlamaConfig(**DIMS),
    "llama tied": LlamaConfig(**DIMS, tie_word_embeddings=True),
    "llama scaled": LlamaConfig(**DIMS, rope_scaling=LLAMA3_SCALING, rope_theta=500.0),
    "llama biases": LlamaConfig(**DIMS, attention_bias=True, mlp_bias=True),
    "llama attention bias": LlamaConfig(**DIMS, attention_bias=True),
    "llama no head_dim": LlamaConfig(**DIMS | {"head_dim": None}),
    "mistral": MistralConfig(**DIMS, sliding_window=None, rms_norm_eps=1e-3),
    "mistral tied": MistralConfig(**DIMS, sliding_window=None, tie_word_embeddings=True),
}


def import_run_export(source: Path, target: Path) -> Tensor | None:
    """On every rank: HF -> Megatron -> logits [b, s, v] and HF again; every rank of tp pads the vocabulary to 52."""
    shape, groups = shape_from_hf(source, make_vocab_size_divisible_by=4), Groups.from_megatron()
    model = bare_model(shape).eval()
    load_hf(model, source, shape, groups)
    save_hf(model, target, shape, groups, vocab_size=vocab_size_from_hf(source))
    with torch.no_grad():
        logits = run_gpt(model, TOKENS)
    return None if logits is None else torch.cat(all_gather_shards(logits, group=groups.tp), dim=-1)


def require_the_same_model(source: Path, target: Path, original: PreTrainedModel) -> None:
    """transformers reads `target` as the same tensors, to the last bit, and the same logits."""
    loaded = load_with_transformers(target)
    assert type(loaded) is type(original)
    written, expected = tensors_of(target), tensors_of(source)
    for name, tensor in written.items():
        # Megatron has all biases or none: what the source lacked comes out as zeros
        assert torch.equal(tensor, expected.get(name, torch.zeros_like(tensor))), name
    assert set(expected) <= set(written)
    torch.testing.assert_close(hf_logits(loaded), hf_logits(original), rtol=0, atol=0)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_checkpoint_passes_through_megatron_unchanged(tmp_path: Path, name: str) -> None:
    original = hf_model(CONFIGS[name], tmp_path / "in")
    logits = import_run_export(tmp_path / "in", tmp_path / "out")
    assert logits is not None
    assert logits.shape[-1] == 52
    torch.testing.assert_close(logits[..., :51], hf_logits(original), rtol=0, atol=ATOL)
    assert logits[..., 51:].abs().max() == 0  # padding rows are zero
    require_the_same_model(tmp_path / "in", tmp_path / "out", original)


@pytest.mark.parametrize("layout", ["tp2", "pp2", "tp2-sp"])
@pytest.mark.parametrize("name", ["llama tied", "llama scaled", "mistral"])
def test_a_checkpoint_passes_through_every_layout_unchanged(
    ranks: Ranks, tmp_path: Path, layout: str, name: str
) -> None:
    original = hf_model(CONFIGS[name], tmp_path / "in")
    results = ranks(layout).run(import_run_export, tmp_path / "in", tmp_path / "out")
    for logits in (logits for logits in results if logits is not None):
        torch.testing.assert_close(logits[..., :51], hf_logits(original), rtol=0, atol=ATOL)
    require_the_same_model(tmp_path / "in", tmp_path / "out", original)


@pytest.mark.parametrize("tied", [False, True])
def test_a_width_pruned_model_has_the_same_logits_in_transformers(tmp_path: Path, tied: bool) -> None:
    teacher_shape = dataclasses.replace(TINY, share_embeddings_and_output_weights=tied)
    shape = teacher_shape.pruned_to(hidden_size=17, ffn_hidden_size=29, num_attention_heads=4)
    kept = {
        "hidden": torch.tensor([0, 1, 3, 4, 5, 7, 8, 9, 11, 12, 13, 15, 17, 19, 20, 21, 23]),
        "ffn": torch.arange(5, 34),
        "head": torch.tensor([0, 2, 3, 5]),
    }
    teacher = dict(stream_full_parameters(build_gpt(teacher_shape), teacher_shape, Groups()))
    pruned = bare_model(shape).eval()
    load_full_parameters(pruned, shape, Groups(), lambda name: take(teacher[name], name, teacher_shape, kept))
    save_hf(pruned, tmp_path, shape, Groups())
    loaded = load_with_transformers(tmp_path)
    assert loaded.config.head_dim == 8 != shape.hidden_size / shape.num_attention_heads
    with torch.no_grad():
        logits = run_gpt(pruned, TOKENS)
    torch.testing.assert_close(hf_logits(loaded), logits, rtol=0, atol=ATOL)


def test_bf16_weights_stay_bf16_both_ways(tmp_path: Path) -> None:
    hf_model(CONFIGS["llama"], tmp_path / "fp32").bfloat16().save_pretrained(tmp_path / "in")
    shape = shape_from_hf(tmp_path / "in")
    model = bare_model(shape, dtype=torch.bfloat16)
    load_hf(model, tmp_path / "in", shape, Groups())
    save_hf(model, tmp_path / "out", shape, Groups())
    expected = tensors_of(tmp_path / "in")
    for name, tensor in tensors_of(tmp_path / "out").items():
        assert tensor.dtype is torch.bfloat16
        assert torch.equal(tensor, expected[name]), name
    assert AutoConfig.from_pretrained(tmp_path / "out").dtype is torch.bfloat16


def test_shards_stay_under_their_limit_and_are_read_back(tmp_path: Path) -> None:
    original = hf_model(CONFIGS["llama"], tmp_path / "in", max_shard_size="20KB")
    assert (tmp_path / "in" / "model.safetensors.index.json").is_file()
    shape = shape_from_hf(tmp_path / "in")
    model = bare_model(shape)
    load_hf(model, tmp_path / "in", shape, Groups())
    save_hf(model, tmp_path / "out", shape, Groups(), max_shard_bytes=20_000)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2
    for file in files:
        with safe_open(file, framework="pt") as shard:
            assert sum(shard.get_tensor(name).nbytes for name in shard.keys()) <= 20_000  # noqa: SIM118
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4 * shape.num_parameters
    assert set(index["weight_map"].values()) == {file.name for file in files}
    require_the_same_model(tmp_path / "in", tmp_path / "out", original)


# ---- config.json -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_a_shape_survives_its_config_json(tmp_path: Path, name: str) -> None:
    CONFIGS[name].save_pretrained(tmp_path)
    shape = shape_from_hf(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(hf_config(shape)))
    assert shape_from_hf(tmp_path) == shape


def test_the_shape_says_what_config_json_says(tmp_path: Path) -> None:
    CONFIGS["llama scaled"].save_pretrained(tmp_path)
    assert shape_from_hf(tmp_path, make_vocab_size_divisible_by=16) == ModelShape(
        family="llama",
        num_layers=4,
        hidden_size=24,
        ffn_hidden_size=40,
        num_attention_heads=6,
        num_query_groups=2,
        kv_channels=8,
        padded_vocab_size=64,
        seq_length=32,
        layernorm_epsilon=1e-6,
        rotary_base=500.0,
        rope_scaling=LLAMA3_SCALING,
        init_method_std=0.2,
    )


def test_rope_parameters_of_later_transformers_are_understood(tmp_path: Path) -> None:
    CONFIGS["llama scaled"].save_pretrained(tmp_path)
    shape = shape_from_hf(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["rope_parameters"] = {**config.pop("rope_scaling"), "rope_theta": config.pop("rope_theta")}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert shape_from_hf(tmp_path) == shape


@pytest.mark.parametrize("channels", [8, 64])
def test_scaled_frequencies_equal_those_of_transformers(channels: int) -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = LlamaConfig(**DIMS | {"head_dim": channels}, rope_scaling=LLAMA3_SCALING, rope_theta=500.0)
    expected, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    shape = dataclasses.replace(TINY, kv_channels=channels, rotary_base=500.0, rope_scaling=LLAMA3_SCALING)
    torch.testing.assert_close(inverse_frequencies(shape), expected, rtol=1e-6, atol=0)  # float32 rounding
    unscaled = inverse_frequencies(dataclasses.replace(shape, rope_scaling=None))
    assert not torch.equal(unscaled, expected)


def test_a_sliding_window_is_reported_and_not_exported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    MistralConfig(**DIMS, sliding_window=16).save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING):
        shape = shape_from_hf(tmp_path)
    assert "sliding_window=16 is ignored" in caplog.text
    assert "up to 16 tokens" in caplog.text
    assert hf_config(shape)["sliding_window"] is None


def test_the_tokenizer_travels_with_its_special_tokens(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "<s>": 2, "</s>": 3}, unk_token="<unk>")),
        bos_token="<s>",
        eos_token="</s>",
    )
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    save_hf(build_gpt(TINY), tmp_path / "out", TINY, Groups(), tokenizer_dir=tmp_path / "tokenizer")
    config = AutoConfig.from_pretrained(tmp_path / "out")
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (2, 3, None)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab() == tokenizer.get_vocab()


# ---- what cannot work ------------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    hf_model(CONFIGS["llama"], tmp_path / "in")
    return tmp_path / "in"


def edit_config(path: Path, **changes: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | changes))


def test_a_directory_without_config_json_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no config\.json, so it is no HF checkpoint"):
        shape_from_hf(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"nowhere is not a directory"):
        shape_from_hf(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, r"model_type='gpt2' is not supported; supported: llama, mistral, mixtral, "),
        ({"hidden_act": "tanh"}, r"hidden_act='tanh' is not supported; supported: silu"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, r"rope_scaling of type 'yarn' is not supported"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, r"rope_scaling lacks low_freq_factor"),
        ({"quantization_config": {"bits": 4}}, r"quantized weights cannot be pruned"),
    ],
)
def test_a_config_this_project_cannot_represent_is_refused(
    checkpoint: Path, changes: dict[str, Any], message: str
) -> None:
    edit_config(checkpoint, **changes)
    with pytest.raises(ValueError, match=message):
        shape_from_hf(checkpoint)


def test_pickled_weights_are_never_read_and_the_mend_is_named(checkpoint: Path) -> None:
    shape = shape_from_hf(checkpoint)
    (checkpoint / "model.safetensors").rename(checkpoint / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin.*safe_serialization=True"):
        load_hf(bare_model(shape), checkpoint, shape, Groups())


def test_a_checkpoint_without_weights_is_named(checkpoint: Path) -> None:
    shape = shape_from_hf(checkpoint)
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"neither model\.safetensors nor model\.safetensors\.index\.json"):
        load_hf(bare_model(shape), checkpoint, shape, Groups())


def test_a_missing_tensor_is_named(checkpoint: Path) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    del tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, checkpoint / "model.safetensors")
    shape = shape_from_hf(checkpoint)
    with pytest.raises(ValueError, match=r"has no tensor model\.layers\.2\.mlp\.up_proj\.weight"):
        load_hf(bare_model(shape), checkpoint, shape, Groups())


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    hf_model(CONFIGS["llama"], tmp_path, max_shard_size="20KB")
    shape = shape_from_hf(tmp_path)
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=f"lacks the shard {shard.name}"):
        load_hf(bare_model(shape), tmp_path, shape, Groups())


def test_a_file_cut_short_is_named(checkpoint: Path) -> None:
    shape = shape_from_hf(checkpoint)
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read as safetensors.*fetch it again"):
        load_hf(bare_model(shape), checkpoint, shape, Groups())


def test_a_tensor_of_another_shape_is_named_with_both_shapes(checkpoint: Path) -> None:
    edit_config(checkpoint, intermediate_size=44)
    shape = shape_from_hf(checkpoint)
    with pytest.raises(ValueError, match=r"gate_proj\.weight in .* has shape \[40, 24\] where .* calls for \[44, 24\]"):
        load_hf(bare_model(shape), checkpoint, shape, Groups())


def test_a_model_of_another_shape_names_what_differs(checkpoint: Path) -> None:
    shape = dataclasses.replace(shape_from_hf(checkpoint), num_layers=3)
    with pytest.raises(ValueError, match=r"another shape \(num_layers: 4 there, 3 here\)"):
        load_hf(bare_model(shape), checkpoint, shape, Groups())


def test_a_vocabulary_larger_than_the_model_is_refused(checkpoint: Path) -> None:
    shape = dataclasses.replace(shape_from_hf(checkpoint), padded_vocab_size=50)
    with pytest.raises(ValueError, match=r"vocab_size=51, more than padded_vocab_size=50"):
        load_hf(bare_model(shape), checkpoint, shape, Groups())
    with pytest.raises(ValueError, match=r"vocab_size=67 is more than the padded_vocab_size=66"):
        save_hf(build_gpt(TINY), checkpoint.parent / "out", TINY, Groups(), vocab_size=67)


def test_export_never_writes_over_other_weights(checkpoint: Path) -> None:
    with pytest.raises(CannotWrite, match=r"already holds safetensors"):
        save_hf(build_gpt(TINY), checkpoint, TINY, Groups())


def test_export_refuses_what_the_family_cannot_hold(tmp_path: Path) -> None:
    normed = dataclasses.replace(TINY, qk_layernorm=True)
    with pytest.raises(ValueError, match=r"qk_layernorm=True has no place in a HF llama checkpoint"):
        save_hf(build_gpt(normed), tmp_path, normed, Groups())
    biased = dataclasses.replace(TINY, family="mistral", add_bias_linear=True)
    with pytest.raises(ValueError, match=r"add_bias_linear=True has no place in a HF mistral checkpoint"):
        save_hf(build_gpt(biased), tmp_path, biased, Groups())
    assert not list(tmp_path.iterdir())


def test_a_tokenizer_directory_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tokenizer_dir=.* holds no tokenizer: none of tokenizer.json"):
        save_hf(build_gpt(TINY), tmp_path / "out", TINY, Groups(), tokenizer_dir=tmp_path)
    assert not (tmp_path / "out").exists()

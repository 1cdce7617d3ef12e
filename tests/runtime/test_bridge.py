"""One process imports and exports from file to file what several do through the loaded model."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import MixtralConfig, NemotronConfig, PretrainedConfig, Qwen2Config, Qwen3MoeConfig

from minitron_nemo.artifact import open_artifact
from minitron_nemo.text.tokenizer_files import copy_tokenizer
from support.hf import DIMS, hf_model, tensors_of
from support.ranks import Ranks
from support.tiny import write_corpus, write_teacher
from support.tiny_run import trainer_values

WIDE = DIMS | {"vocab_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4}
EXPERTS = {"num_experts_per_tok": 2, "initializer_range": 0.3}
CONFIGS: dict[str, PretrainedConfig | None] = {
    "llama": None,
    "nemotron biases": NemotronConfig(**WIDE, attention_bias=True),
    "qwen2 tied": Qwen2Config(**WIDE, tie_word_embeddings=True),
    "mixtral": MixtralConfig(**WIDE | EXPERTS, num_local_experts=4),
    "qwen3_moe": Qwen3MoeConfig(**WIDE | EXPERTS, num_experts=4, moe_intermediate_size=20, mlp_only_layers=[1]),
}


def import_export(hf: Path, directory: Path, precision: str = "auto") -> None:
    """Through both stages on the current layout; the vocabulary is padded between them."""
    from minitron_nemo.config.trainer import TrainerConfig
    from minitron_nemo.stages import export_hf, import_hf

    tensor_parallel = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    trainer = TrainerConfig(
        **trainer_values(tensor_model_parallel_size=tensor_parallel, sequence_parallel=tensor_parallel > 1)
        | {"precision": precision}
    )
    teacher = str(directory / "teacher")
    config = import_hf.ImportHfConfig(
        model=str(hf), make_vocab_size_divisible_by=48, trainer=trainer, output=str(teacher)
    )
    import_hf.run(config)
    config = export_hf.ExportHfConfig(model=teacher, dtype="fp32", trainer=trainer, output=str(directory / "export"))
    export_hf.run(config)


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], each) for name, each in expected.items())


@pytest.mark.parametrize("name", CONFIGS)
def test_a_checkpoint_passes_from_file_to_file_as_through_the_model_on_two_ranks(
    ranks: Ranks, tmp_path: Path, name: str
) -> None:
    hf = write_teacher(tmp_path / "hf", write_corpus(tmp_path / "corpus", files=20))
    config = CONFIGS[name]
    if config is not None:
        hf_model(config, hf)  # beside the same tokenizer
    ranks("single").run(import_export, hf, tmp_path / "one")
    ranks("tp2-sp").run(import_export, hf, tmp_path / "two")
    found, expected = (tensors_of(tmp_path / how / "export") for how in ("one", "two"))
    assert same(found, expected)
    source = tensors_of(hf)
    assert all(torch.equal(found[key], tensor) for key, tensor in source.items())


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_an_import_keeps_the_checkpoints_own_dtype_on_every_machine(
    ranks: Ranks, tmp_path: Path, stored: torch.dtype
) -> None:
    hf = write_teacher(tmp_path / "hf", write_corpus(tmp_path / "corpus", files=20))
    model = hf_model(Qwen2Config(**WIDE), tmp_path / "model").to(stored)
    model.save_pretrained(tmp_path / "model")
    copy_tokenizer(hf, tmp_path / "model")
    ranks("single").run(import_export, tmp_path / "model", tmp_path / "out")
    assert open_artifact(tmp_path / "out" / "teacher").facts["dtype"] == str(stored).removeprefix("torch.")
    expected = tensors_of(tmp_path / "model")
    assert same(tensors_of(tmp_path / "out" / "export"), {key: each.float() for key, each in expected.items()})


def import_in_bf16(hf: Path, output: Path) -> str:
    from minitron_nemo.config.trainer import Loading
    from minitron_nemo.stages import import_hf

    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    import_hf.logger.addHandler(handler)
    try:
        import_hf.run(import_hf.ImportHfConfig(model=str(hf), trainer=Loading(precision="bf16"), output=str(output)))
    finally:
        import_hf.logger.removeHandler(handler)
    return " ".join(said)


def test_an_import_that_loses_digits_says_so(ranks: Ranks, tmp_path: Path) -> None:
    hf = write_teacher(tmp_path / "hf", write_corpus(tmp_path / "corpus", files=20))
    [said] = ranks("single").run(import_in_bf16, hf, tmp_path / "teacher")
    assert "holds tensors in float32, which are stored in bfloat16" in said
    assert json.loads((tmp_path / "teacher" / "manifest.json").read_text())["facts"]["dtype"] == "bfloat16"


def export_as(model: Path, output: Path, family: str) -> None:
    from minitron_nemo.config.trainer import Layout
    from minitron_nemo.stages import export_hf

    config = export_hf.ExportHfConfig(
        model=str(model), family=family, dtype="fp32", trainer=Layout(), output=str(output)
    )
    export_hf.run(config)


def test_a_llama_is_exported_as_the_mistral_that_says_the_same(ranks: Ranks, tmp_path: Path) -> None:
    hf = write_teacher(tmp_path / "hf", write_corpus(tmp_path / "corpus", files=20))
    ranks("single").run(import_export, hf, tmp_path)
    ranks("single").run(export_as, tmp_path / "teacher", tmp_path / "mistral", "mistral")
    config = json.loads((tmp_path / "mistral" / "config.json").read_text())
    assert (config["model_type"], config["architectures"], config["sliding_window"]) == (
        "mistral",
        ["MistralForCausalLM"],
        None,
    )
    assert same(tensors_of(tmp_path / "mistral"), tensors_of(hf))

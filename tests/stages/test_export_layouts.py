"""An export is written and checked on every layout: the same tensors as from one process, and transformers' logits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from minitron_nemo import cli
from minitron_nemo.artifact import open_artifact
from minitron_nemo.text.tokenizer import train_tokenizer
from support.artifacts import listing
from support.door import Door
from support.hf import DIMS, hf_model
from support.ranks import Ranks, current_layout
from support.tiny import VOCAB_SIZE

BIASED = DIMS | {"vocab_size": VOCAB_SIZE, "num_hidden_layers": 3, "attention_bias": True, "mlp_bias": True}
CASES = {
    "untied": ("LlamaConfig", BIASED),
    "tied": ("LlamaConfig", BIASED | {"tie_word_embeddings": True}),
    "experts beside dense layers": (
        "Qwen3MoeConfig",
        DIMS
        | {"vocab_size": VOCAB_SIZE, "num_hidden_layers": 3, "num_experts": 6, "moe_intermediate_size": 20}
        | {"num_experts_per_tok": 2, "norm_topk_prob": True, "mlp_only_layers": [1]},
    ),
}


@pytest.fixture(scope="module")
def models(door: Door, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A case's name -> its model artifact, in float32; beside it `<name> fp32` and `<name> bf16`, exported alone."""
    import transformers

    directory, made = tmp_path_factory.mktemp("models"), set()

    def model(name: str) -> Path:
        if name not in made:
            kind, values = CASES[name]
            hf = directory / f"{name} hf"
            hf_model(getattr(transformers, kind)(**values), hf)
            train_tokenizer(["def read(path):\n    return open(path).read()\n"] * 9, vocab_size=281, output=hf)
            imported = door(
                "import-hf", "recipe=quickstart", f"import_hf.model={hf}", f"import_hf.output={directory / name}"
            )
            assert imported.code == 0, imported.err
            for dtype in ("fp32", "bf16"):
                exported = door(*command(directory / name, directory / f"{name} {dtype}", dtype))
                assert exported.code == 0, exported.err
            made.add(name)
        return directory / name

    return model


def command(model: Path, output: Path, dtype: str) -> list[str]:
    """What a user types on each rank."""
    layout = current_layout()
    return [
        "export-hf",
        "recipe=quickstart",
        f"export_hf.model={model}",
        f"export_hf.dtype={dtype}",
        f"export_hf.output={output}",
        "export_hf.prompt=null",
        f"trainer.tensor_model_parallel_size={layout.tp}",
        f"trainer.pipeline_model_parallel_size={layout.pp}",
        f"trainer.context_parallel_size={layout.cp}",
        f"trainer.expert_model_parallel_size={layout.ep}",
        f"trainer.sequence_parallel={str(layout.sequence_parallel).lower()}",
    ]


def export(model: Path, output: Path, dtype: str) -> int:
    return cli.main(command(model, output, dtype))


@pytest.mark.parametrize(
    ("layout", "name", "dtype"),
    [
        ("tp2", "untied", "bf16"),
        ("pp2", "tied", "bf16"),
        ("cp2", "tied", "fp32"),
        ("tp2-pp2", "tied", "bf16"),
        ("pp2", "experts beside dense layers", "bf16"),
        ("dp2-ep2", "experts beside dense layers", "bf16"),
    ],
)
def test_an_export_on_several_ranks_is_the_one_of_a_single_process_and_transformers_agrees(
    ranks: Ranks, models: Callable[[str], Path], tmp_path: Path, layout: str, name: str, dtype: str
) -> None:
    model, output = models(name), tmp_path / "export"
    codes = ranks(layout).run(export, model, output, dtype)
    assert set(codes) == {0}
    artifact, alone = open_artifact(output), model.with_name(f"{name} {dtype}")
    assert artifact.metrics["max_relative_logit_difference"] < 1e-5  # float32 sums in another order
    ours, expected = (load_file(path / "model.safetensors") for path in (output, alone))
    assert list(ours) == list(expected)
    for tensor_name, tensor in expected.items():
        assert torch.equal(ours[tensor_name], tensor), tensor_name
        assert tensor.dtype is {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    assert json.loads((output / "config.json").read_text()) == json.loads((alone / "config.json").read_text())


# ---- damage ----------------------------------------------------------------------------------------------------------


def _swap_heads(tensors: dict[str, Tensor]) -> None:
    weight = tensors["model.layers.1.self_attn.q_proj.weight"]
    weight[:] = weight.view(6, 8, -1)[[0, 2, 1, 3, 4, 5]].flatten(0, 1)


def _lose_a_bias(tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.2.mlp.up_proj.bias"].zero_()


def _permute_layers(tensors: dict[str, Tensor]) -> None:
    for name in [name for name in tensors if ".layers.1." in name]:
        other = name.replace(".layers.1.", ".layers.2.")
        tensors[name], tensors[other] = tensors[other].clone(), tensors[name].clone()


DAMAGES: dict[str, Callable[[dict[str, Tensor]], None]] = {
    "swapped heads": _swap_heads,
    "a lost bias": _lose_a_bias,
    "permuted layers": _permute_layers,
}


def export_damaged(model: Path, output: Path) -> dict[str, str]:
    """The stage on a disk that damages what was written; its complaint of each damage."""
    from minitron_nemo.config.stages import ExportHfConfig
    from minitron_nemo.config.trainer import Layout
    from minitron_nemo.parallel import is_rank_zero
    from minitron_nemo.stages import export_hf

    layout, write, said = current_layout(), export_hf.save_hf, {}
    trainer = Layout(layout.tp, layout.pp, layout.cp)
    for damage, spoil in DAMAGES.items():

        def write_and_damage(core: Any, path: Path, *args: Any, spoil: Any = spoil, **kwargs: Any) -> None:
            write(core, path, *args, **kwargs)
            if is_rank_zero():
                tensors = load_file(path / "model.safetensors")
                spoil(tensors)
                save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})

        export_hf.save_hf = write_and_damage
        try:
            export_hf.run(ExportHfConfig(model=str(model), trainer=trainer, output=str(output)))
        except RuntimeError as error:
            said[damage] = str(error)
        finally:
            export_hf.save_hf = write
    return said


@pytest.mark.parametrize("layout", ["tp2", "pp2", "cp2"])
def test_the_check_finds_a_damaged_tensor_on_every_layout(
    ranks: Ranks, models: Callable[[str], Path], tmp_path: Path, layout: str
) -> None:
    for said in ranks(layout).run(export_damaged, models("untied"), tmp_path / "export"):
        assert list(said) == list(DAMAGES)
        assert all("logits differ from Megatron's by up to" in complaint for complaint in said.values())
    assert listing(tmp_path) == {}

"""What export-hf writes is what transformers loads: the same logits, or nothing."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from minitron_nemo.artifact import Artifact, open_artifact
from minitron_nemo.shape import ModelShape
from support.artifacts import listing
from support.door import Door
from support.ranks import Ranks
from support.tiny import SEQ_LENGTH, TinyChain, write_teacher


@dataclass(frozen=True)
class Exported:
    student: Path
    artifact: Artifact
    tied: bool


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def exported(
    request: pytest.FixtureRequest, door: Door, tiny_chain: TinyChain, tmp_path_factory: pytest.TempPathFactory
) -> Exported:
    """A width-pruned student whose kv_channels (6) are not its hidden_size / num_attention_heads (20 / 4), exported."""
    run = tmp_path_factory.mktemp("export")
    hf = write_teacher(run / "hf", tiny_chain.corpus, tied=request.param, seed=5)
    common = [
        *tiny_chain.overrides,
        f"run_dir={run}",
        f"import_hf.model={hf}",
        f"data.prepared={tiny_chain.run_dir / 'data'}",
        f"estimate_importance.model={run / 'teacher'}",
        "prune.target.hidden_size=20",
        f"export_hf.model={run / 'student_pruned'}",
        "export_hf.prompt=null",
    ]
    for stage in ("import-hf", "estimate-importance", "prune", "export-hf"):
        done = door(stage, *common)
        assert done.code == 0, done.err
    return Exported(run / "student_pruned", open_artifact(run / "export"), request.param)


def test_logits_of_the_exported_model_equal_megatrons(exported: Exported, ranks: Ranks) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(exported.artifact.path, dtype=torch.float32)
    tokens = torch.randint(0, 512, (3, SEQ_LENGTH), generator=torch.Generator().manual_seed(8))
    with torch.no_grad():
        theirs = model(tokens).logits
    (ours,) = ranks("single").run(megatron_logits, str(exported.student), tokens)
    assert (theirs - ours).abs().max() < 1e-4
    assert theirs.std() > 0.1  # the comparison is not one of zeros


def megatron_logits(student: str, tokens: torch.Tensor) -> torch.Tensor:
    from minitron_nemo import engine, platform
    from minitron_nemo.runtime.forward import last_logits

    source, trainer = engine.open_model(student, key="student"), trainer_config()
    return last_logits(engine.open_core(source, trainer, platform.dtype_of(trainer.precision)), tokens).cpu()


def trainer_config() -> Any:
    from minitron_nemo.config.trainer import TrainerConfig

    return TrainerConfig(precision="fp32", seq_length=SEQ_LENGTH)


def test_the_stage_says_how_close_the_logits_are(exported: Exported) -> None:
    assert (
        0 <= exported.artifact.metrics["max_relative_logit_difference"] < 1e-4
    )  # 0 where kernels of both add in one order


def test_the_exported_config_keeps_what_pruning_kept(exported: Exported) -> None:
    config = json.loads((exported.artifact.path / "config.json").read_text())
    shape = ModelShape.from_dict(json.loads((exported.student / "shape.json").read_text()))
    assert (config["hidden_size"], config["num_attention_heads"], config["head_dim"]) == (20, 4, 6)
    assert config["tie_word_embeddings"] is exported.tied is shape.share_embeddings_and_output_weights
    tensors = load_file(exported.artifact.path / "model.safetensors")
    assert ("lm_head.weight" in tensors) is not exported.tied
    assert sum(tensor.numel() for tensor in tensors.values()) == shape.num_parameters


def test_the_exported_tokenizer_is_the_teachers(exported: Exported, tiny_chain: TinyChain) -> None:
    from transformers import AutoTokenizer

    ours, teachers = (AutoTokenizer.from_pretrained(path) for path in (exported.artifact.path, tiny_chain.teacher))
    text = "def read_config(path):\n    return open(path).read()"
    assert ours(text).input_ids == teachers(text).input_ids


def test_the_exported_model_goes_on_from_what_the_exported_tokenizer_gives(exported: Exported) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(exported.artifact.path)
    model = AutoModelForCausalLM.from_pretrained(exported.artifact.path)
    given = tokenizer("def read", return_tensors="pt")
    assert model.generate(**given, max_new_tokens=3, min_new_tokens=3).shape[1] == given.input_ids.shape[1] + 3


@pytest.mark.parametrize("damage", ["flipped", "swapped", "not a number"])
def test_a_damaged_weight_is_noticed_and_nothing_is_left(
    exported: Exported, ranks: Ranks, tmp_path: Path, damage: str
) -> None:
    ((error, message),) = ranks("single").run(export_damaged, str(exported.student), str(tmp_path / "export"), damage)
    assert error == "RuntimeError"
    assert "The exported model's logits differ from Megatron's by up to" in message
    assert "Nothing was exported" in message
    assert listing(tmp_path) == {}


def export_damaged(student: str, output: str, damage: str) -> tuple[str, str]:
    """The stage on a disk that damages one weight after it was written."""
    from minitron_nemo.stages import export_hf

    write = export_hf.write_hf

    def write_and_damage(core: Any, path: Path, *args: Any, **kwargs: Any) -> None:
        write(core, path, *args, **kwargs)
        tensors = load_file(path / "model.safetensors")
        weight = tensors["model.layers.1.mlp.down_proj.weight"]
        heads = tensors["model.layers.1.self_attn.q_proj.weight"]
        if damage == "swapped":
            heads[:] = heads.view(4, 6, -1)[[0, 2, 1, 3]].flatten(0, 1)
        else:
            weight[0] = -weight[0] if damage == "flipped" else float("nan")
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})

    export_hf.write_hf = write_and_damage
    try:
        export_hf.run(export_hf.ExportHfConfig(model=student, dtype="fp32", trainer=trainer_config(), output=output))
    except Exception as error:
        return type(error).__name__, str(error)
    finally:
        export_hf.write_hf = write
    return "no error", ""

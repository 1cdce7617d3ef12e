"""Our artifacts are NeMo checkpoints, and NeMo's checkpoints are accepted as inputs."""

from __future__ import annotations

import contextlib
import json
import shutil
import threading
from pathlib import Path

import psutil
import pytest
import torch
from nemo.lightning.io.pl import TrainerContext
from torch import Tensor

from minitron_nemo.config.data import DataConfig
from minitron_nemo.config.trainer import TrainerConfig
from minitron_nemo.engine import open_model
from minitron_nemo.nemo.context import shape_from_context
from minitron_nemo.nemo.models import plain_nemo_model
from minitron_nemo.parallel import Groups
from minitron_nemo.rope import inverse_frequencies
from minitron_nemo.runtime.distributed_checkpoint import load_weights, save_weights
from minitron_nemo.runtime.model_artifact import read_shape
from minitron_nemo.shape import ModelShape
from minitron_nemo.stages import evaluate
from minitron_nemo.stopping import listening
from minitron_nemo.weights import local_parameters, stream_full_parameters
from nemo import lightning as nl
from support.megatron import TINY, TINY_EXPERTS, build_gpt, random_parameter, smaller, start_alone
from support.ranks import Ranks
from support.tiny_run import TinyRun, read_weights, trainer_values

LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.5,
    "high_freq_factor": 3.0,
    "original_max_position_embeddings": 16,
}


# ---- what runs in a process of its own -------------------------------------------------------------------------------


def load_with_nemo(path: Path) -> tuple[str, dict[str, int], dict[str, Tensor]]:
    """NeMo's own way from a checkpoint to a model: class name, dims of its config, weights by name."""
    from nemo.lightning.io.connector import ModelConnector

    model, _ = ModelConnector(path).nemo_load(path)
    dims = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels")
    kind = f"{type(model).__module__}.{type(model).__name__}"
    weights = {name: parameter.detach() for name, parameter in local_parameters(model).items()}
    return kind, {dim: getattr(model.config, dim) for dim in dims}, weights


def evaluate_on(run: TinyRun, model: str, output: str) -> float:
    artifact = evaluate.run(
        evaluate.EvaluateConfig(
            model=model,
            num_samples=6,
            trainer=TrainerConfig(**trainer_values()),
            data=DataConfig(prepared=run.data),
            output=output,
        )
    )
    return artifact.metrics["held_out_loss"]


# ---- ours, read by NeMo ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("artifact", ["teacher", "student"])
def test_an_artifact_loads_in_plain_nemo(ranks: Ranks, tiny_run: TinyRun, artifact: str) -> None:
    """The pruned student's kv_channels are not hidden_size / num_attention_heads."""
    path = tiny_run.directory / artifact
    for file in ("io.json", "model.yaml"):
        assert "minitron" not in (path / "context" / file).read_text(), file
    [(kind, dims, found)] = ranks("single").run(load_with_nemo, path)
    shape = open_model(path, key="path").shape
    assert kind == "nemo.collections.llm.gpt.model.llama.LlamaModel"
    assert dims == {dim: getattr(shape, dim) for dim in dims}
    [expected] = ranks("single").run(read_weights, str(path))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_scaled_rotary_frequencies_mean_the_same_to_nemo() -> None:
    start_alone()
    shape = smaller(TINY, rope_scaling=LLAMA3_SCALING)
    core = plain_nemo_model(shape, tokenizer=None).config.configure_model(None)
    torch.testing.assert_close(core.rotary_pos_emb.inv_freq, inverse_frequencies(shape), rtol=1e-6, atol=0)
    unscaled = inverse_frequencies(smaller(shape, rope_scaling=None))
    assert not torch.allclose(core.rotary_pos_emb.inv_freq, unscaled)


def test_nothing_in_a_context_names_a_path_of_the_machine(tiny_run: TinyRun) -> None:
    for file in sorted((tiny_run.directory / "teacher" / "context").iterdir()):
        if file.is_file():
            assert str(tiny_run.directory) not in file.read_text(), file.name


def test_only_what_goes_with_a_tokenizer_is_taken_from_a_models_directory(tiny_run: TinyRun) -> None:
    assert (tiny_run.hf / "model.safetensors").is_file()
    read = {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"}
    for kept, files in {"tokenizer": read | {"generation_config.json"}, "context/tokenizer": read}.items():
        assert {file.name for file in (tiny_run.directory / "teacher" / kept).iterdir()} == files, kept


def save_built(directory: Path) -> None:
    save_weights(build_gpt(TINY_EXPERTS), directory)


def test_experts_saved_on_uneven_stages_and_expert_parallel_ranks_load_in_one_process(
    ranks: Ranks, tmp_path: Path
) -> None:
    ranks("pp2-dp2-ep2").run(save_built, tmp_path)
    loaded = build_gpt(TINY_EXPERTS, seed=1)
    load_weights(loaded, tmp_path)
    for name, tensor in stream_full_parameters(loaded, TINY_EXPERTS, Groups()):
        assert torch.equal(tensor, random_parameter(name, TINY_EXPERTS)), name


def test_what_is_told_to_all_of_a_jobs_processes_costs_no_save(tmp_path: Path) -> None:
    """SLURM, torchrun and a node that goes down also tell the processes that write for a rank, which waits for them."""
    start_alone()
    core, ended = build_gpt(TINY), threading.Event()
    others = set(psutil.Process().children(recursive=True))  # of other tests

    def tell_those_that_write() -> None:
        while not ended.wait(0.001):
            for process in set(psutil.Process().children(recursive=True)) - others:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.terminate()

    teller = threading.Thread(target=tell_those_that_write)
    with listening():
        teller.start()
        try:
            for number in range(4):
                save_weights(core, tmp_path / str(number))
        finally:
            ended.set()
            teller.join()
    for number in range(4):
        loaded = build_gpt(TINY, seed=1)
        load_weights(loaded, tmp_path / str(number))
        for name, tensor in stream_full_parameters(loaded, TINY, Groups()):
            assert torch.equal(tensor, random_parameter(name, TINY)), name


# ---- NeMo's, read by us ----------------------------------------------------------------------------------------------


def test_a_checkpoint_of_nemos_importer_is_an_input_like_our_own(
    ranks: Ranks, tiny_run: TinyRun, nemo_checkpoint: Path
) -> None:
    ours, theirs = tiny_run.teacher, str(nemo_checkpoint)
    model = open_model(theirs, key="model")
    assert model.artifact is None
    shape = open_model(ours, key="model").shape
    assert model.shape == shape
    [expected], [found] = (ranks("single").run(read_weights, path) for path in (ours, theirs))
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    [expected_loss], [loss] = (
        ranks("single").run(evaluate_on, tiny_run, path, str(tiny_run.directory / f"{name}-loss"))
        for name, path in (("ours", ours), ("theirs", theirs))
    )
    assert loss == expected_loss


def test_a_checkpoint_from_elsewhere_is_looked_at_before_anything_is_made_of_it(
    tmp_path: Path, nemo_checkpoint: Path
) -> None:
    damaged = shutil.copytree(nemo_checkpoint, tmp_path / "damaged")
    context = damaged / "context" / "model.yaml"
    context.write_text(context.read_text()[:100] + "{")
    with pytest.raises(ValueError, match=rf"{context} cannot be read \(.*Copy the checkpoint again"):
        open_model(damaged, key="prune.model")
    (damaged / "weights" / ".metadata").write_bytes(b"cbuiltins\nprint\n.")
    with pytest.raises(ValueError, match=rf"{damaged}/weights/.metadata names builtins.print, which is no part of"):
        open_model(damaged, key="prune.model")


# ---- the shape a context describes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape",
    [
        TINY,
        smaller(TINY, share_embeddings_and_output_weights=True, layernorm_epsilon=1e-6),
        smaller(TINY, add_bias_linear=True, add_qkv_bias=True),
        smaller(TINY, rope_scaling=LLAMA3_SCALING),
        smaller(TINY, family="mistral"),
        smaller(
            TINY,
            family="nemotron",
            normalization="LayerNorm1p",
            activation="squared_relu",
            gated_linear_unit=False,
            rotary_percent=0.5,
        ),
        smaller(TINY, family="qwen2", add_qkv_bias=True, rotary_base=1e6),
        smaller(TINY, family="qwen3", qk_layernorm=True, rotary_base=1e6),
        smaller(TINY, family="mixtral", num_moe_experts=4, moe_ffn_hidden_size=20, moe_router_topk=2),
        smaller(TINY_EXPERTS, qk_layernorm=True, moe_router_pre_softmax=True),
    ],
    ids=["llama", "tied", "biases", "scaled", "mistral", "nemotron", "qwen2", "qwen3", "mixtral", "qwen3_moe"],
)
def test_the_context_that_nemo_writes_gives_the_shape_back(tmp_path: Path, shape: ModelShape) -> None:
    start_alone()
    trainer = nl.Trainer(accelerator="cpu", devices=1, strategy=nl.MegatronStrategy(), logger=False)
    context = TrainerContext(model=plain_nemo_model(shape, tokenizer=None), trainer=trainer, extra={})
    context.io_dump(tmp_path, yaml_attrs=["model"])
    assert shape_from_context(tmp_path / "model.yaml") == shape
    assert "minitron" not in (tmp_path / "model.yaml").read_text()


def test_a_model_without_a_row_is_refused_by_name(tmp_path: Path) -> None:
    file = tmp_path / "model.yaml"
    file.write_text("_target_: nemo.collections.llm.gpt.model.gemma.GemmaModel\nconfig: {hidden_size: 8}\n")
    with pytest.raises(ValueError, match="describes a GemmaModel; supported are LlamaModel, MistralModel"):
        shape_from_context(file)


def test_a_context_is_read_as_data_and_runs_nothing(tmp_path: Path, tiny_run: TinyRun) -> None:
    text = (tiny_run.directory / "teacher" / "context" / "model.yaml").read_text()
    witness = tmp_path / "witness"
    file = tmp_path / "model.yaml"
    file.write_text(
        f"{text}\nextra: !!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path "
        f"[{json.dumps(str(witness))}]]\n"
    )
    shape = shape_from_context(file)
    assert shape == open_model(tiny_run.teacher, key="path").shape
    assert not witness.exists()


def test_a_folder_without_a_model_says_what_one_holds(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"prune.model=\S+ holds neither shape.json"):
        read_shape(tmp_path, key="prune.model", foreign=shape_from_context)
    with pytest.raises(FileNotFoundError, match=r"prune.model=\S+nowhere does not exist"):
        read_shape(tmp_path / "nowhere", key="prune.model", foreign=shape_from_context)
    with pytest.raises(ValueError, match=r"prune.model is not set. Set it to a model artifact"):
        open_model("", key="prune.model")

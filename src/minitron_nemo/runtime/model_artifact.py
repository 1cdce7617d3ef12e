"""Model artifacts: NeMo 2 distributed checkpoints that every layout and every NeMo installation can load.

weights/     Megatron distributed checkpoint, keys prefixed `module.` as NeMo writes them
context/     NeMo's context: plain NeMo classes, so `nl.AutoResume` and `llm.*` load it without this package
tokenizer/   the HF tokenizer
shape.json   the ModelShape, which is what we read: plain JSON, no code is built from it
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
import yaml
from megatron.core.models.gpt import GPTModel as MCoreGPTModel
from nemo.lightning.io.pl import TrainerContext

from minitron_nemo.artifact import Artifact, open_artifact
from minitron_nemo.checks import require
from minitron_nemo.nemo.models import ROPE_SCALING_FIELDS, plain_nemo_model
from minitron_nemo.runtime.distributed_checkpoint import save_weights
from minitron_nemo.shape import ModelShape
from nemo import lightning as nl

CONTEXT, TOKENIZER, SHAPE = "context", "tokenizer", "shape.json"


def save_model(core: MCoreGPTModel, shape: ModelShape, tokenizer: Path, directory: Path) -> None:
    """Write a model artifact's files into `directory`. Every rank calls; communicates over the world.

    Args:
        core: this rank's part of the model.
        tokenizer: HF tokenizer directory, copied.
    """
    save_weights(core, directory)
    describe_model(shape, tokenizer, directory)


def describe_model(shape: ModelShape, tokenizer: Path, directory: Path) -> None:
    """Write what stands beside the weights: shape, tokenizer and context. Every rank calls; rank 0 writes."""
    if dist.get_rank() == 0:
        (directory / SHAPE).write_text(json.dumps(shape.to_dict(), indent=2) + "\n")
        if tokenizer.resolve() != (directory / TOKENIZER).resolve():
            shutil.copytree(tokenizer, directory / TOKENIZER, dirs_exist_ok=True)
        _write_context(shape, directory)
    dist.barrier()


def read_shape(directory: Path, *, key: str) -> ModelShape:
    """Shape of the model in `directory`, an artifact of ours or a NeMo 2 checkpoint.

    Args:
        key: the user's config key that named the directory.
    Raises: FileNotFoundError: no model there.
    """
    if (directory / SHAPE).is_file():
        return ModelShape.from_dict(json.loads((directory / SHAPE).read_text()))
    require(directory.exists(), f"{key}={directory} does not exist. Correct {key}.", FileNotFoundError)
    require(
        (directory / CONTEXT / "model.yaml").is_file(),
        f"{key}={directory} holds neither {SHAPE} (an artifact of this package) nor {CONTEXT}/model.yaml "
        f"(a NeMo 2 checkpoint). Set {key} to one of them.",
        FileNotFoundError,
    )
    return shape_from_context(directory / CONTEXT / "model.yaml")


MODEL_STAGES = ("import-hf", "pretrain", "correct-teacher", "prune", "distill")


@dataclass(frozen=True)
class ModelInput:
    """A model some stage takes: where it is, what it is, and who made it (None: a NeMo checkpoint from elsewhere)."""

    path: Path
    shape: ModelShape
    tokenizer: Path
    vocab_size: int
    """Rows of the embedding that are tokens; the rest is padding."""
    artifact: Artifact | None

    @property
    def artifacts(self) -> list[Artifact]:
        return [self.artifact] if self.artifact else []


def open_model(path: Path | str | None, *, key: str, trust_checkpoint: bool = False) -> ModelInput:
    """A model given as an input.

    A checkpoint that no stage of ours made is loaded by libraries that unpickle its metadata, so it needs the user's
    word that it comes from someone they trust.

    Args:
        key: the user's config key that named the path.
    Raises: FileNotFoundError: missing or unfinished. ValueError: another kind of artifact, or not trusted.
    """
    require(bool(path), f"{key} is not set. Set it to a model artifact, made by {', '.join(MODEL_STAGES)}.")
    directory = Path(path)  # type: ignore[arg-type]
    if (directory / CONTEXT).is_dir() and not (directory / SHAPE).is_file():
        require(
            trust_checkpoint,
            f"{key}={directory} is a NeMo checkpoint from elsewhere, and loading one runs Python's unpickler on its "
            "metadata. If you trust where it comes from, set trust_checkpoint=true; else import its HF safetensors "
            "with import-hf.",
        )
        artifact = None
    else:
        artifact = open_artifact(directory, made_by=MODEL_STAGES, key=key)
    shape = read_shape(directory, key=key)
    places = (directory / TOKENIZER, directory / CONTEXT / "nemo_tokenizer")
    tokenizer = next((place for place in places if place.is_dir()), None)
    if tokenizer is None:
        raise FileNotFoundError(f"{key}={directory} has no tokenizer/. Copy the HF tokenizer's files there.")
    vocab_size = artifact.facts["vocab_size"] if artifact else shape.padded_vocab_size
    return ModelInput(directory, shape, tokenizer, vocab_size, artifact)


# ---- NeMo's context ----------------------------------------------------------------------------------------------


def _write_context(shape: ModelShape, directory: Path) -> None:
    from nemo.collections.common.tokenizers import AutoTokenizer

    tokenizer = AutoTokenizer(str(directory / TOKENIZER))
    trainer = nl.Trainer(accelerator="cpu", devices=1, strategy=nl.MegatronStrategy(), logger=False)
    context = TrainerContext(model=plain_nemo_model(shape, tokenizer), trainer=trainer, extra={})
    context.io_dump(directory / CONTEXT, yaml_attrs=["model"])


_ACTIVATION_NAMES = {"silu": "silu", "gelu": "gelu", "squared_relu": "squared_relu", "openai_gelu": "gelu"}
_FAMILY_OF_MODEL = {
    "LlamaModel": "llama",
    "MistralModel": "mistral",
    "NemotronModel": "nemotron",
    "Qwen2Model": "qwen2",
    "Qwen3Model": "qwen3",
    "MixtralModel": "mixtral",
}


def shape_from_context(model_yaml: Path) -> ModelShape:
    """ModelShape of a checkpoint that NeMo wrote, from its `context/model.yaml`; read as plain data.

    Raises: ValueError: a model class without a row here.
    """
    model: dict[str, Any] = yaml.load(model_yaml.read_text(), Loader=_PlainLoader)
    config = model["config"]
    model_class = str(model.get("_target_", "")).split(".")[-1]
    require(
        model_class in _FAMILY_OF_MODEL,
        f"{model_yaml} describes a {model_class}; supported are {', '.join(sorted(_FAMILY_OF_MODEL))}.",
    )
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    normalization = config.get("normalization", "LayerNorm")
    if normalization == "LayerNorm" and config.get("layernorm_zero_centered_gamma"):
        normalization = "LayerNorm1p"
    activation = str((config.get("activation_func") or {}).get("_target_", "silu")).split(".")[-1]
    scaling = None
    if all(field in config for field in ROPE_SCALING_FIELDS):
        scaling = {"rope_type": "llama3"} | {key: config[field] for field, key in ROPE_SCALING_FIELDS.items()}
    experts = config.get("num_moe_experts")
    family = _FAMILY_OF_MODEL[model_class]
    vocab = config.get("vocab_size")
    require(vocab is not None, f"{model_yaml} does not say config.vocab_size; set it there to the padded vocabulary.")
    return ModelShape(
        family="qwen3_moe" if family == "qwen3" and experts else family,
        num_layers=config["num_layers"],
        hidden_size=hidden,
        ffn_hidden_size=config.get("ffn_hidden_size") or 4 * hidden,
        num_attention_heads=heads,
        num_query_groups=config.get("num_query_groups") or heads,
        kv_channels=config.get("kv_channels") or hidden // heads,
        padded_vocab_size=vocab,
        seq_length=config.get("seq_length", 4096),
        normalization=normalization,
        layernorm_epsilon=float(config.get("layernorm_epsilon", 1e-5)),
        activation=_ACTIVATION_NAMES[activation],
        gated_linear_unit=bool(config.get("gated_linear_unit")),
        share_embeddings_and_output_weights=bool(config.get("share_embeddings_and_output_weights")),
        add_bias_linear=bool(config.get("add_bias_linear")),
        add_qkv_bias=bool(config.get("add_qkv_bias")),
        qk_layernorm=bool(config.get("qk_layernorm")),
        rotary_base=float(config.get("rotary_base", 10000.0)),
        rotary_percent=float(config.get("rotary_percent", 1.0)),
        rope_scaling=scaling,
        init_method_std=float(config.get("init_method_std", 0.02)),
        **(_experts_from_context(config) if experts else {}),
    )


def _experts_from_context(config: dict[str, Any]) -> dict[str, Any]:
    """ModelShape's fields of a mixture; what is None or absent in the config is resolved by ModelShape."""
    frequency = config.get("moe_layer_freq", 1)
    if isinstance(frequency, int):
        frequency = [int(layer % frequency == 0) for layer in range(config["num_layers"])]
    return {
        "num_moe_experts": config["num_moe_experts"],
        "moe_ffn_hidden_size": config.get("moe_ffn_hidden_size"),
        "moe_shared_expert_intermediate_size": config.get("moe_shared_expert_intermediate_size"),
        "moe_router_topk": config.get("moe_router_topk", 2),
        "moe_router_pre_softmax": bool(config.get("moe_router_pre_softmax")),
        "moe_layer_freq": tuple(frequency),
    }


class _PlainLoader(yaml.SafeLoader):
    """Reads NeMo's YAML as data: whatever it tags as a Python object becomes None, and nothing is built."""


_PlainLoader.add_multi_constructor("!", lambda loader, suffix, node: None)
_PlainLoader.add_multi_constructor("tag:yaml.org,2002:python", lambda loader, suffix, node: None)

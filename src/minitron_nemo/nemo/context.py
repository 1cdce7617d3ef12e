"""NeMo's context beside a checkpoint's weights: what model NeMo is to build.

    writing     plain NeMo classes, so that `nl.AutoResume` and `llm.*` load a checkpoint without this package
    reading     `context/model.yaml` of a checkpoint that NeMo wrote, as plain data: no code is built from it

Communication: none.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import yaml
from lightning.fabric.plugins.environments import LightningEnvironment
from nemo.collections.common.tokenizers import AutoTokenizer
from nemo.lightning.io.pl import TrainerContext

from minitron_nemo.checks import require
from minitron_nemo.nemo.models import FAMILIES, ROPE_SCALING_FIELDS, plain_nemo_model
from minitron_nemo.runtime.model_artifact import CONTEXT, TOKENIZER
from minitron_nemo.shape import ModelShape
from minitron_nemo.text.tokenizer_files import copy_what_is_read
from nemo import lightning as nl


def write_context(shape: ModelShape, directory: Path) -> None:
    """Write `directory/context`. One process; `directory/tokenizer` is there already.

    NeMo copies the tokenizer's directory, which it loads a model by, file by file: of ours, what is read.
    """
    # Lightning would look for a launcher and take an allocation's SLURM variables for one
    plain = LightningEnvironment()
    trainer = nl.Trainer(accelerator="cpu", devices=1, strategy=nl.MegatronStrategy(), logger=False, plugins=[plain])
    del trainer.__io__.plugins  # not of the context: it would be a pickle there
    with tempfile.TemporaryDirectory() as read:
        copy_what_is_read(directory / TOKENIZER, Path(read) / TOKENIZER)
        model = plain_nemo_model(shape, AutoTokenizer(str(Path(read) / TOKENIZER)))
        context = TrainerContext(model=model, trainer=trainer, extra={})
        context.io_dump(directory / CONTEXT, yaml_attrs=["model"])


_ACTIVATION_NAMES = {"silu": "silu", "gelu": "gelu", "squared_relu": "squared_relu", "openai_gelu": "gelu"}
# reversed: of families that share a class, the first one counts
_FAMILY_OF_MODEL = {model.__name__: family for family, (model, _) in reversed(FAMILIES.items())}


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

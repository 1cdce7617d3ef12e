"""NeMo's own importer on a machine without transformer-engine."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest


def import_with_nemo(hf: Path, output: Path) -> None:
    """`llm.import_ckpt`, told of two things its Llama importer takes for granted: fused kernels and fused norms."""
    from nemo.collections import llm
    from nemo.collections.llm.gpt.model import llama

    from minitron_nemo import platform

    unfused = platform.transformer_config_overrides()
    config_class, read_config = llama.LlamaConfig, llama.HFLlamaImporter.config.fget
    apply_transforms = llama.io.apply_transforms

    def unfused_config(importer: llama.HFLlamaImporter) -> llm.LlamaConfig:
        llama.LlamaConfig = partial(config_class, **unfused)
        try:
            return read_config(importer)
        finally:
            llama.LlamaConfig = config_class

    def with_norms_apart(source: Any, target: Any, mapping: dict[str, str], transforms: list[Any]) -> Any:
        apart = {
            "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
            "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
        }
        for fused, own in apart.items():
            mapping = {key: name.replace(fused, own) for key, name in mapping.items()}
        return apply_transforms(source, target, mapping=mapping, transforms=transforms)

    with pytest.MonkeyPatch.context() as patch:
        if not platform.has_transformer_engine():
            patch.setattr(llama.HFLlamaImporter, "config", property(unfused_config))
            patch.setattr(llama.io, "apply_transforms", with_norms_apart)
        model = llm.LlamaModel(
            llm.LlamaConfig(
                num_layers=4, hidden_size=32, num_attention_heads=8, **unfused
            )  # the importer makes its own
        )
        llm.import_ckpt(model=model, source=f"hf://{hf}", output_path=output)

"""Where things are in a Megatron-core GPT model: parameters by their names, norms and linears in its built layers.

    what             local spec                                         transformer-engine's spec
    input norm       input_layernorm                                    inside self_attention.linear_qkv
    pre-MLP norm     pre_mlp_layernorm                                  inside mlp.linear_fc1; of an expert layer apart
    final norm       decoder.final_layernorm                            the same
    expert's linear  mlp.experts.local_experts.{e}.linear_fc2.weight    mlp.experts.linear_fc2.weight{e}

Names are the local spec's unless they say otherwise; layers and experts count from 0, over all ranks. A norm inside a
linear keeps its output in the kernel: what reads it there computes it once more from what enters the linear.

    entering    the residual stream as a norm reads it    [s/cp, b, h], [s/(cp*tp), b, h] under sequence parallelism

Communication: none.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from minitron_nemo.checks import require
from minitron_nemo.shape import ModelShape


@dataclass(frozen=True)
class NormOfLayer:
    """One of a layer's two norms of the residual stream."""

    name: str
    linear: str
    """The first linear that reads it, in which transformer-engine puts it."""


INPUT_NORM = NormOfLayer("input_layernorm", "self_attention.linear_qkv")
PRE_MLP_NORM = NormOfLayer("pre_mlp_layernorm", "mlp.linear_fc1")
NORMS_OF_LAYER = (INPUT_NORM, PRE_MLP_NORM)
"""In the order of the forward pass."""

EMBEDDING, OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"
"""The two that may be tied."""
FINAL_NORM = "decoder.final_layernorm"
LAYER = "decoder.layers.{i}."
EXPERT = "experts.local_experts.{e}."

READERS = {
    "head": "self_attention.linear_proj",
    "ffn": "mlp.linear_fc2",
    "shared_expert_ffn": "mlp.shared_experts.linear_fc2",
}
"""Axis inside a layer -> the linear that reads it, of which tensor parallelism splits the input."""

# ---- parameters by name ----------------------------------------------------------------------------------------------

_LAYER_INDEX = re.compile(r"^decoder\.layers\.(\d+)\.")
_EXPERT_INDEX = re.compile(r"\.experts\.local_experts\.(\d+)\.")
_GROUPED_EXPERT = re.compile(r"\.experts\.(linear_fc[12])\.weight(\d+)$")
_FUSED_NAMES = {f"{norm.name}.": f"{norm.linear}.layer_norm_" for norm in NORMS_OF_LAYER}


def in_layer(index: int, name: str) -> str:
    """The whole name of what is called `name` inside layer `index`."""
    return LAYER.replace("{i}", str(index)) + name


def layer_of(name: str) -> int | None:
    """Global layer index, from 0, of a parameter; None outside the layers."""
    found = _LAYER_INDEX.match(name)
    return int(found.group(1)) if found else None


def with_layer(name: str, index: int) -> str:
    """The same parameter of layer `index`; a name outside the layers stays as it is."""
    return _LAYER_INDEX.sub(in_layer(index, ""), name)


def expert_of(name: str) -> int | None:
    """Index, from 0, of the routed expert a parameter belongs to; None outside the experts."""
    found = _EXPERT_INDEX.search(local_name(name))
    return int(found.group(1)) if found else None


def with_expert(name: str, index: int) -> str:
    """The same parameter of expert `index`, local spec; a name outside the experts stays as it is."""
    return _EXPERT_INDEX.sub("." + EXPERT.replace("{e}", str(index)), local_name(name))


def pattern_of(name: str) -> str:
    """The local-spec name with `{i}` for its layer and `{e}` for its expert."""
    return _EXPERT_INDEX.sub("." + EXPERT, _LAYER_INDEX.sub(LAYER, local_name(name)))


def local_name(name: str) -> str:
    """The local-spec name of a parameter named in either spec."""
    for local, fused in _FUSED_NAMES.items():
        name = name.replace(fused, local)
    return _GROUPED_EXPERT.sub(r".experts.local_experts.\2.\1.weight", name)


def name_in_spec(name: str, spec: str, shape: ModelShape) -> str:
    """A local-spec name as it is called in `spec`: "local" or "transformer_engine" (with grouped experts)."""
    require(
        spec in ("local", "transformer_engine"), f"spec={spec!r} is not known; use 'local' or 'transformer_engine'."
    )
    if spec == "local":
        return name
    layer = layer_of(name)
    for local, fused in _FUSED_NAMES.items():
        if "mlp" in fused and layer is not None and shape.has_experts(layer):
            continue  # nothing to fuse it with: the router and every expert read this norm
        name = name.replace(local, fused)
    return re.sub(r"\.local_experts\.(\d+)\.(linear_fc[12])\.weight$", r".\2.weight\1", name)


# ---- norms of a built model ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BuiltNorm:
    """A norm of the residual stream, where it can be watched."""

    name: str
    """Of `module`, under its global layer index."""
    module: Any
    """What the stream enters: the norm, or the linear it is fused into."""
    is_fused: bool
    config: Any
    """TransformerConfig of its model."""

    def gamma(self) -> Tensor:
        """What it multiplies by, [h] float32: the stored weight, or 1 more."""
        stored: Tensor = self.module.layer_norm_weight if self.is_fused else self.module.weight
        return stored.float() + float(self.config.layernorm_zero_centered_gamma)

    def recomputed(self) -> Callable[[Tensor], Tensor]:
        """Of a fused norm the function from what enters it to its output, in float32: [s, b, h] -> [s, b, h].

        Raises: ValueError: there is no norm inside the linear.
        """
        require(
            getattr(self.module, "layer_norm_weight", None) is not None,
            f"{self.name} has no norm before it and none inside (no layer_norm_weight), and hidden channels are read "
            "at norm outputs. Use Megatron's local or transformer-engine GPT layer spec.",
        )

        def norm(entering: Tensor) -> Tensor:
            gamma, epsilon = self.gamma(), self.config.layernorm_epsilon
            if self.config.normalization == "RMSNorm":
                return nn.functional.rms_norm(entering.float(), gamma.shape, gamma, epsilon)
            beta = self.module.layer_norm_bias.float()
            return nn.functional.layer_norm(entering.float(), gamma.shape, gamma, beta, epsilon)

        return norm


def norm_in(layer: Any, norm: NormOfLayer) -> BuiltNorm:
    """One of the two norms of a built layer."""
    module = getattr(layer, norm.name)
    is_fused = getattr(module, "weight", None) is None
    name, module = (norm.linear, layer.get_submodule(norm.linear)) if is_fused else (norm.name, module)
    return BuiltNorm(in_layer(layer.layer_number - 1, name), module, is_fused, layer.config)


def final_norm_in(model: Any) -> BuiltNorm | None:
    """The norm behind the last layer of a bare GPTModel; None on the pipeline stages before the last."""
    module = getattr(model.decoder, "final_layernorm", None)
    return None if module is None else BuiltNorm(FINAL_NORM, module, False, model.config)


def norms_in(model: Any) -> dict[int, BuiltNorm]:
    """The norms that a bare GPTModel has on this pipeline stage, by number among the whole model's 2 l + 1."""
    found = {
        2 * (layer.layer_number - 1) + number: norm_in(layer, norm)
        for layer in model.decoder.layers
        for number, norm in enumerate(NORMS_OF_LAYER)
    }
    final = final_norm_in(model)
    return found if final is None else found | {2 * model.config.num_layers: final}

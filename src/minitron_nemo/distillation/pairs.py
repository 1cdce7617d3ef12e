"""Which states of student and teacher are compared, on which pipeline stage each lies, and the hook that reads it.

    place               read at                                                            shape
    embedding           output of the embedding, or of layer 0's input norm                [s/cp, b, h]
    block_output        output of the layer, or of the norm that follows: the next         [s/cp, b, h]
                        layer's input norm, after the last layer the final one
    attention_output    output of self_attention, with its bias, not yet added             [s/cp, b, h]
    mlp_input           output of pre_mlp_layernorm                                        [s/cp, b, h]
    relation            queries, keys and values of core attention, positions applied      3 x [s/cp, b, heads/tp, d]

Under sequence parallelism the first four hold s/(cp*tp) tokens, their channels whole. A norm fused into a
transformer-engine linear never leaves its kernel, so it is computed once more from the linear's input.

Communication: none.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from minitron_nemo.checks import require
from minitron_nemo.config.distillation import HiddenStateConfig
from minitron_nemo.places import INPUT_NORM, PRE_MLP_NORM, BuiltNorm, final_norm_in, norm_in
from minitron_nemo.plan import PruningPlan

State: TypeAlias = Tensor | tuple[Tensor, Tensor, Tensor]
See: TypeAlias = Callable[[Tensor, State], Tensor]
"""(what passes, the state: a function of it) -> what passes on in its place."""


@dataclass(frozen=True)
class Reading:
    """Where one model's state is read: `norm` i is the input norm of layer i, the final norm behind the last layer."""

    module: str
    """embedding, norm, layer, attention, mlp_norm or core_attention."""
    layer: int = 0

    def stage(self, config: TransformerConfig) -> int:
        """The pipeline stage that computes it."""
        if self.module == "embedding":
            return 0
        return next((rank for rank, last in enumerate(_layers_up_to(config)) if self.layer < last), _stages(config) - 1)

    def norm_cut_from(self, plan: PruningPlan) -> int | None:
        """Of a student's state behind a norm: which of the teacher's that was, in the order of plan.norm_scale."""
        if self.module not in _NORMS:
            return None
        behind_all = self.layer >= plan.target.num_layers
        layer = plan.source.num_layers if behind_all else int(plan.layer[self.layer])
        return 2 * layer + int(self.module == "mlp_norm")


@dataclass(frozen=True)
class Pair:
    """One comparison. Layers count from 0."""

    name: str
    place: str
    student: Reading
    teacher: Reading


def pairs_of(
    config: HiddenStateConfig, student: TransformerConfig, teacher: TransformerConfig, plan: PruningPlan | None
) -> list[Pair]:
    """What `config` compares, embedding first, then layer by layer.

    Raises: ValueError: a layer that a model does not have, or mapping=plan without a plan of these two models.
    """
    pairs = []
    if "embedding" in config.places:
        where = Reading("norm") if config.after_layernorm else Reading("embedding")
        pairs.append(Pair("embedding", "embedding", where, where))
    of_layers = [place for place in config.places if place != "embedding"]
    mapping = layer_mapping(config, student.num_layers, teacher.num_layers, plan) if of_layers else []
    for student_layer, teacher_layer in mapping:
        for place in of_layers:
            readings = (_reading(place, layer, config.after_layernorm) for layer in (student_layer, teacher_layer))
            pairs.append(Pair(f"{place}_{student_layer}_to_{teacher_layer}", place, *readings))
    return pairs


def layer_mapping(
    config: HiddenStateConfig, student_layers: int, teacher_layers: int, plan: PruningPlan | None
) -> list[tuple[int, int]]:
    """(student layer, teacher layer) of each compared pair."""
    if config.mapping == "plan":
        return list(enumerate(require_plan(plan, "mapping").layer.tolist()))
    if config.mapping == "uniform":
        return [(layer, (layer + 1) * teacher_layers // student_layers - 1) for layer in range(student_layers)]
    if config.mapping == "explicit":
        mapping = [(student, teacher) for student, teacher in config.pairs]
    else:
        back = [config.k] if config.mapping == "last_minus_k" else range(config.k - 1, -1, -1)
        mapping = [(student_layers - 1 - k, teacher_layers - 1 - k) for k in back]
    for student, teacher in mapping:
        require(
            0 <= student < student_layers and 0 <= teacher < teacher_layers,
            f"distillation.hidden_states.mapping={config.mapping} pairs student layer {student} with teacher layer "
            f"{teacher}, but they have {student_layers} and {teacher_layers} layers, counted from 0. Correct "
            f"distillation.hidden_states.{'pairs' if config.mapping == 'explicit' else 'k'}.",
        )
    return mapping


def require_plan(plan: PruningPlan | None, key: str) -> PruningPlan:
    require(
        plan is not None,
        f"distillation.hidden_states.{key}=plan needs the plan by which the student was cut from this teacher, and "
        f"there is none. Use a student made by prune, or set another {key}.",
    )
    assert plan is not None
    return plan


def watch(model: GPTModel, reading: Reading, see: See) -> RemovableHandle:
    """Show `see` what passes at `reading`, each time it does, and pass on what it returns.

    Args:
        model: holds the layer on this pipeline stage.
    """
    if reading.module == "embedding":
        return model.embedding.register_forward_hook(_on_output(see))
    if reading.module in _NORMS:
        norm = _norm_at(model, reading)
        if norm.is_fused:
            return norm.module.register_forward_pre_hook(_on_input(see, norm.recomputed()))
        return norm.module.register_forward_hook(_on_output(see))
    layer = _layer_at(model, reading)
    if reading.module == "layer":
        return layer.register_forward_hook(_on_first_output(see))
    if reading.module == "attention":
        return layer.self_attention.register_forward_hook(_on_biased_output(see))
    assert reading.module == "core_attention"
    return layer.self_attention.core_attention.register_forward_pre_hook(_on_queries_keys_values(see))


def gamma_at(model: GPTModel, reading: Reading) -> Tensor | None:
    """What the norm of a state behind one multiplies by, [h] float32; None: the state is of the stream itself.

    Args:
        model: holds the layer on this pipeline stage.
    """
    return _norm_at(model, reading).gamma().detach() if reading.module in _NORMS else None


_NORMS = {"norm": INPUT_NORM, "mlp_norm": PRE_MLP_NORM}


def _norm_at(model: GPTModel, reading: Reading) -> BuiltNorm:
    if reading.module == "norm" and reading.layer == model.config.num_layers:
        final = final_norm_in(model)
        assert final is not None, "the final norm is on the last pipeline stage"
        return final
    return norm_in(_layer_at(model, reading), _NORMS[reading.module])


def _layer_at(model: GPTModel, reading: Reading) -> Any:
    return next(layer for layer in model.decoder.layers if layer.layer_number == reading.layer + 1)


def _reading(place: str, layer: int, after_layernorm: bool) -> Reading:
    if place == "block_output":
        return Reading("norm", layer + 1) if after_layernorm else Reading("layer", layer)
    module = {"attention_output": "attention", "mlp_input": "mlp_norm", "relation": "core_attention"}[place]
    return Reading(module, layer)


def _stages(config: TransformerConfig) -> int:
    return config.pipeline_model_parallel_size


def _layers_up_to(config: TransformerConfig) -> list[int]:
    """Number of layers up to the end of each pipeline stage."""
    ends = [0]
    for rank in range(_stages(config)):
        ends.append(ends[-1] + get_num_layers_to_build(config, None, rank))
    return ends[1:]


# ---- hooks -----------------------------------------------------------------------------------------------------------


def _on_output(see: See) -> Callable[..., Tensor]:
    def hook(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        return see(output, output)

    return hook


def _on_first_output(see: See) -> Callable[..., tuple[Any, ...]]:
    """Of a layer, whose output is (states, cross-attention's context)."""

    def hook(_module: nn.Module, _args: Any, output: tuple[Any, ...]) -> tuple[Any, ...]:
        return see(output[0], output[0]), *output[1:]

    return hook


def _on_biased_output(see: See) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """Of a module that hands its bias on instead of adding it."""

    def hook(_module: nn.Module, _args: Any, output: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor | None]:
        value, bias = output
        if bias is not None:
            return see(value, value + bias), bias
        # without gradients Megatron adds the stream to it in place
        return see(value, value if value.requires_grad else value.clone()), bias

    return hook


def _on_input(see: See, measure: Callable[[Tensor], Tensor]) -> Callable[..., tuple[Any, ...]]:
    def hook(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return see(args[0], measure(args[0])), *args[1:]

    return hook


def _on_queries_keys_values(see: See) -> Callable[..., tuple[Any, ...]]:
    def hook(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        query, key, value, *rest = args
        return see(query, (query, key, value)), key, value, *rest

    return hook

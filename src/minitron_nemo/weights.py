"""Full parameters out of and into a model that is split over ranks, one at a time.

    with every rank:  model on TP x EP x PP  ->  stream_full_parameters  ->  (name, full tensor), ...
                      read(name) -> full tensor  ->  load_full_parameters  ->  model on TP x EP x PP

Names are the axis table's (local spec, global layer and expert index) whichever layer spec the model was built with, so
what is streamed from one layout and spec can be loaded into another. Peak extra memory: one full parameter, two while
the shards of one are being joined.

Communication: streaming gathers each parameter over tp and broadcasts it over pp (an expert's: gathers over expert tp,
broadcasts over ep, then pp); loading communicates nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor, nn

from minitron_nemo.axes import ParameterAxes, full_shape, join_from_tp, parameter_axes, parameter_names, split_for_tp
from minitron_nemo.checks import require
from minitron_nemo.parallel import (
    Groups,
    ProcessGroup,
    all_gather_shards,
    broadcast_from,
    gather_objects,
    group_rank,
    group_size,
)
from minitron_nemo.places import EMBEDDING, OUTPUT, expert_of, layer_of, local_name, with_expert, with_layer
from minitron_nemo.shape import ModelShape


def bare_gpt(model: nn.Module) -> GPTModel:
    """The `megatron.core` GPTModel inside any number of wrappers (mixed precision, data parallel, NeMo's model).

    Of a student beside its teacher, the student.
    """
    inner: Any = model
    while not isinstance(inner, GPTModel):  # by type: wrappers pass attributes of what they hold through
        held = next((name for name in ("student", "module") if name in inner._modules), None)
        if held is None:
            raise TypeError(
                f"{type(model).__name__} holds no megatron.core GPTModel. Pass a built model, after configure_model()."
            )
        inner = inner._modules[held]
    return inner


def local_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """This rank's parameters under the axis table's names: local spec, global layer and expert index; shards as they
    are.

    The second copy of tied embeddings that the last pipeline stage keeps appears as `output_layer.weight`.
    Raises: ValueError: a parameter the axis table does not know.
    """
    gpt = bare_gpt(model)
    found = {}
    for name, parameter in gpt.named_parameters():
        position = layer_of(name)
        if position is not None:
            layer, expert = gpt.decoder.layers[position], expert_of(name)
            name = with_layer(name, layer.layer_number - 1)
            if expert is not None:
                name = with_expert(name, layer.mlp.local_expert_indices[expert])
        parameter_axes(name)
        found[local_name(name)] = parameter
    return found


def stream_full_parameters(model: nn.Module, shape: ModelShape, groups: Groups) -> Iterator[tuple[str, Tensor]]:
    """Every full parameter of the model, in the order of `parameter_names(shape)`, equal on every rank.

    Args:
        model: bare or wrapped GPTModel of this rank.
    Yields:
        (name, tensor): the model's dtype and device, detached; on one rank it may share the parameter's memory.
        Every rank must take every item, as each one communicates.
    Communicates: ep and pp once for the names; per parameter one all-gather over tp on its stage, one broadcast over
        pp; for an expert's, over expert tp where it lives, then one broadcast over ep on its stage before that.
    Raises: ValueError: the model and `shape` do not have the same parameters.
    """
    mine = local_parameters(model)
    on_stage = _first_holders({name: (parameter.dtype,) for name, parameter in mine.items()}, groups.ep)
    home_of = _first_holders(on_stage, groups.pp)  # name -> (pipeline stage, expert-parallel rank, dtype)
    if shape.share_embeddings_and_output_weights:
        home_of.pop(OUTPUT, None)
    names = parameter_names(shape)
    _require_same_names(set(home_of), set(names))
    device = next(iter(mine.values())).device
    for name in names:
        row, sizes, (stage, expert_rank, dtype) = parameter_axes(name), full_shape(name, shape), home_of[name]
        full = None
        if stage == group_rank(groups.pp):
            if name in mine:
                shard = mine[name].detach()
                shards = all_gather_shards(shard, group=_tp_of(row, groups)) if row.tp_dim is not None else [shard]
                full = join_from_tp(shards, row, shape).contiguous()
                _require_sizes(name, full, sizes)
            if row.of_expert:
                full = torch.empty(sizes, dtype=dtype, device=device) if full is None else full
                full = broadcast_from(full, source=expert_rank, group=groups.ep)
        full = torch.empty(sizes, dtype=dtype, device=device) if full is None else full
        yield name, broadcast_from(full, source=stage, group=groups.pp)


def _first_holders(held: dict[str, tuple], group: ProcessGroup | None) -> dict[str, tuple]:
    """For every name that a rank of `group` holds: (the first such rank, *what it says of the name). Communicates."""
    first: dict[str, tuple] = {}
    for rank, theirs in enumerate(gather_objects(held, group=group)):
        for name, facts in theirs.items():
            first.setdefault(name, (rank, *facts))
    return first


def _tp_of(row: ParameterAxes, groups: Groups) -> ProcessGroup | None:
    return groups.etp if row.of_expert else groups.tp


def load_full_parameters(model: nn.Module, shape: ModelShape, groups: Groups, read: Callable[[str], Tensor]) -> None:
    """Fill this rank's parameters from full ones.

    Args:
        read: name -> full parameter, any float dtype and device; called once for each parameter this rank holds a part
            of, in table order. Ranks ask for different names, so it must not communicate.
    The optimizer's float32 copies are not touched: load before the optimizer is built.
    Raises: ValueError: a parameter of another size than `shape` says, or one the model lacks on every stage.
    """
    mine = local_parameters(model)
    if shape.share_embeddings_and_output_weights and OUTPUT in mine and EMBEDDING in mine:
        del mine[OUTPUT]  # one stage: the two names are one tensor, or the second is unused
    with torch.no_grad():
        for name in [*parameter_names(shape), OUTPUT]:
            parameter = mine.pop(name, None)
            if parameter is None:
                continue
            tied = name == OUTPUT and shape.share_embeddings_and_output_weights
            full = read(EMBEDDING if tied else name)
            _require_sizes(name, full, full_shape(name, shape))
            row = parameter_axes(name)
            tp = _tp_of(row, groups)
            shard = split_for_tp(full, row, shape, group_rank(tp), group_size(tp))
            _require_sizes(name, parameter, tuple(shard.shape))
            parameter.copy_(shard)
    require(not mine, f"The model has parameters that its shape does not: {', '.join(mine)}. {_SAME_SHAPE}")


_SAME_SHAPE = "Build the model from the same ModelShape."


def _require_same_names(held: set[str], expected: set[str]) -> None:
    missing, extra = sorted(expected - held), sorted(held - expected)
    require(not missing, f"The model lacks parameters that its shape promises: {', '.join(missing)}. {_SAME_SHAPE}")
    require(not extra, f"The model has parameters that its shape does not: {', '.join(extra)}. {_SAME_SHAPE}")


def _require_sizes(name: str, tensor: Tensor, sizes: tuple[int, ...]) -> None:
    require(
        tuple(tensor.shape) == sizes,
        f"{name} has shape {list(tensor.shape)} where {list(sizes)} is expected. "
        f"{_SAME_SHAPE.removesuffix('.')}, and read weights of that shape.",
    )

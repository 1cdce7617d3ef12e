"""Plans one after another: two put together into one, and one taken apart into two and back.

Nothing here communicates.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from minitron_nemo.checks import require
from minitron_nemo.plan import OF_A_LAYER, PruningPlan, axes_of
from minitron_nemo.shape import DIM_OF_AXIS


def compose(first: PruningPlan, second: PruningPlan) -> PruningPlan:
    """The plan from first's source to second's target; `second` is of first's student.

    Rows of layers and experts that `first` drops say nothing that is used.
    Raises: ValueError: the plans do not meet, turn the basis, or merge heads.
    """
    require(
        first.target == second.source,
        "The second plan is not of the first one's student: their shapes differ. Score the student of the first plan.",
    )
    require(
        not (first.has_basis or second.has_basis) and first.head_partner is None and second.head_partner is None,
        "Plans that turn the residual stream or merge heads do not compose. Prune in one round, or without them.",
    )
    axes = axes_of(first.source)
    place = {layer: index for index, layer in enumerate(first.layer.tolist())}
    # A layer that `first` drops takes the first kept one's choice, which is at least of the right size.
    inner_rows = [place.get(layer, 0) for layer in range(first.source.num_layers)]

    def by_layer(axis: str) -> Tensor:
        outer, inner = getattr(first, axis), getattr(second, axis)
        return torch.stack([outer[layer][inner[row]] for layer, row in enumerate(inner_rows)])

    entries: dict[str, Tensor] = {axis: by_layer(axis) for axis in OF_A_LAYER if axis in axes}
    if first.expert is not None and first.expert_ffn is not None and second.expert_ffn is not None:
        entries["expert_ffn"] = torch.stack(
            [
                _by_expert(first.expert[layer], first.expert_ffn[layer], second.expert_ffn[row])
                for layer, row in enumerate(inner_rows)
            ]
        )
    return PruningPlan(
        source=first.source,
        target=second.target,
        hidden=first.hidden[second.hidden],
        layer=first.layer[second.layer],
        origin=second.origin,
        **entries,
    )


def _by_expert(kept: Tensor, outer: Tensor, inner: Tensor) -> Tensor:
    """Neurons [e, k2] of each source expert: of its first choice [e, k1], the second choice [kept, k2] of its place."""
    place = {expert: index for index, expert in enumerate(kept.tolist())}
    return torch.stack([outer[expert][inner[place.get(expert, 0)]] for expert in range(outer.size(0))])


def split(plan: PruningPlan) -> tuple[PruningPlan, PruningPlan]:
    """The same cut in two: layers and the residual stream first, then neurons, heads and experts.

    Between the two stands a model whose stream is the student's and whose layers are whole inside. Merged heads belong
    to the second.
    """
    source, layers = plan.source, plan.layer.tolist()
    between = dataclasses.replace(
        source.keeping_layers(layers),
        hidden_size=plan.target.hidden_size,
        share_embeddings_and_output_weights=plan.target.share_embeddings_and_output_weights,
    )
    inside = {axis: getattr(plan, axis) for axis in axes_of(source) if axis not in ("hidden", "layer")}
    whole = {
        axis: torch.arange(getattr(source, DIM_OF_AXIS[axis])).repeat(*entry.shape[:-1], 1)
        for axis, entry in inside.items()
    }
    changes: dict[str, Any] = {**whole, "head_partner": None}
    stream = dataclasses.replace(plan, target=between, **changes)
    blocks = PruningPlan(
        source=between,
        target=plan.target,
        hidden=torch.arange(between.hidden_size),
        layer=torch.arange(between.num_layers),
        head_partner=plan.head_partner[layers] if plan.head_partner is not None else None,
        origin=plan.origin,
        **{axis: entry[layers] for axis, entry in inside.items()},
    )
    return stream, blocks


def joined(plan: PruningPlan, blocks: PruningPlan) -> PruningPlan:
    """`plan` with the neurons, heads and experts that `blocks`, a plan of the second half of its `split`, keeps."""
    layers, entries = plan.layer.tolist(), {}
    for axis in axes_of(plan.source):
        if axis not in ("hidden", "layer"):
            entries[axis] = getattr(plan, axis).clone()
            entries[axis][layers] = getattr(blocks, axis)
    return dataclasses.replace(plan, **entries)

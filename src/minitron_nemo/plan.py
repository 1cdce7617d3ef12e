"""The pruning plan: which indices of each named axis the student keeps.

    hidden             [k]          channels of the residual stream, the same everywhere; or a basis of it, [h, k] float
    ffn                [l, k]       neurons of a dense layer
    head               [l, k]       query heads
    group              [l, k]       key-value groups
    expert             [l, k]       experts
    expert_ffn         [l, e, k]    neurons of each expert
    shared_expert_ffn  [l, k]       neurons of the expert that sees every token
    layer              [k]          layers
    head_partner       [l, k]       of each kept head the dropped one that is merged into it, or -1
    norm_scale         [2l+1]       float: what the gammas of each norm are multiplied by; of a layer the input norm,
                                    then the pre-MLP norm; the final norm last

int64, global, ascending; l, e, h count the source's layers, experts and channels. Rows of dropped layers and experts
stay, so that the axes can be edited apart; an axis that a model does not have is None. The plan is the whole truth
about a pruning: the teacher is never permuted, and the same plan prunes any layout of it.

On disk: `plan.json` (shapes, kept layers, where scores came from) beside `plan.safetensors` (the other entries).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from minitron_nemo.checks import require, require_files
from minitron_nemo.runtimes import as_family
from minitron_nemo.shape import DIM_OF_AXIS, PRUNABLE_AXES, ModelShape

_BESIDE_AXES = ("head_partner", "norm_scale")
OF_A_LAYER = ("ffn", "head", "group", "expert", "shared_expert_ffn")
"""Axes of which every layer keeps its own, one row a layer."""
_ORTHONORMAL: MutableMapping[Tensor, int] = WeakTensorKeyDictionary()
"""Bases that were checked, which takes h k^2 products in float64, and the version of their values."""
INDICES, DESCRIPTION = "plan.safetensors", "plan.json"


def axes_of(shape: ModelShape) -> list[str]:
    """The named axes a model of this shape has, as a plan calls them."""
    return [axis for axis in PRUNABLE_AXES if DIM_OF_AXIS[axis] in shape.prunable_dims]


@dataclass(frozen=True)
class PruningPlan:
    """What is kept along each named axis, from `source` to `target`."""

    source: ModelShape
    target: ModelShape
    hidden: Tensor
    head: Tensor
    group: Tensor
    layer: Tensor
    ffn: Tensor | None = None
    expert: Tensor | None = None
    expert_ffn: Tensor | None = None
    shared_expert_ffn: Tensor | None = None
    head_partner: Tensor | None = None
    norm_scale: Tensor | None = None
    origin: Mapping[str, Any] = field(default_factory=dict)
    """Where the scores came from; plain JSON values."""

    def __post_init__(self) -> None:
        require_prunable(self.source, self.target)
        for axis in PRUNABLE_AXES:
            present = axis in axes_of(self.source)
            require(
                (getattr(self, axis) is not None) == present,
                f"plan.{axis} is {'missing' if present else 'given'}, but the source {'has' if present else 'has no'} "
                f"{DIM_OF_AXIS[axis]}. Make the plan again for this model.",
            )
            if present:
                self._check_axis(axis)
        self._check_heads()
        self._check_norms()
        expected = self.source.keeping_layers(self.layer.tolist()).moe_layer_freq
        require(
            self.target.moe_layer_freq == expected,
            f"target.moe_layer_freq={self.target.moe_layer_freq}, but the kept layers {self.layer.tolist()} make it "
            f"{expected}. Take the target's from source.keeping_layers.",
        )

    @property
    def has_basis(self) -> bool:
        """Whether the residual stream is turned into another basis, not only cut."""
        return self.hidden.is_floating_point()

    def _check_axis(self, axis: str) -> None:
        indices, dim = getattr(self, axis), DIM_OF_AXIS[axis]
        have, keep = getattr(self.source, dim), getattr(self.target, dim)
        if axis == "hidden" and self.has_basis:
            self._check_basis(have, keep)
            return
        rows: tuple[int, ...] = (self.source.num_layers,) if axis in OF_A_LAYER else ()
        if axis == "expert_ffn":
            rows = (self.source.num_layers, self.source.num_moe_experts or 0)
        require(
            indices.dtype == torch.int64 and tuple(indices.shape) == (*rows, keep),
            f"plan.{axis} has shape {list(indices.shape)} ({indices.dtype}), but {dim}={keep} needs {[*rows, keep]} "
            "(int64). Make the plan again for this target.",
        )
        outside = indices[(indices < 0) | (indices >= have)]
        require(
            outside.numel() == 0,
            f"plan.{axis} keeps index {_some(outside)}, outside 0 to {have - 1} ({dim}={have} in the "
            f"source). Correct plan.{axis}.",
        )
        misplaced = indices[..., 1:][indices.diff(dim=-1) <= 0]
        require(
            misplaced.numel() == 0,
            f"plan.{axis} must name each kept index once, in ascending order; {_some(misplaced)} stands after itself "
            "or a higher one. Sort it and remove repetitions.",
        )

    def _check_basis(self, have: int, keep: int) -> None:
        basis = self.hidden
        require(
            tuple(basis.shape) == (have, keep),
            f"plan.hidden is a basis of shape {list(basis.shape)}, but hidden_size {have} to {keep} needs "
            f"{[have, keep]}. Make the plan again for this target.",
        )
        if _ORTHONORMAL.get(basis) == basis._version:
            return  # this very tensor, of a plan that was taken over into this one
        off = (basis.double().t() @ basis.double() - torch.eye(keep, dtype=torch.float64)).abs().max().item()
        require(
            off < 1e-3,
            f"plan.hidden is a basis whose columns are not orthonormal: their products differ from the identity by "
            f"{off:.1e}, more than 1e-3. Orthonormalise it (torch.linalg.qr).",
        )
        _ORTHONORMAL[basis] = basis._version

    def _check_heads(self) -> None:
        per_group, keep = self.source.heads_per_group, self.target.heads_per_group
        for layer in range(self.source.num_layers):
            require(
                torch.equal(self.head[layer] // per_group, self.group[layer].repeat_interleave(keep)),
                f"plan.head of layer {layer} keeps heads {self.head[layer].tolist()}, but its kept groups "
                f"{self.group[layer].tolist()} need {keep} heads each (source groups have "
                f"{per_group}). Keep equally many heads of every kept group.",
            )
        partner = self.head_partner
        if partner is None:
            return
        paired = partner >= 0
        fits = partner.shape == self.head.shape and partner.dtype == torch.int64
        fits = fits and bool((partner[paired] // per_group == self.head[paired] // per_group).all())
        require(
            fits and not bool((partner.unsqueeze(-1) == self.head.unsqueeze(-2)).any()),
            f"plan.head_partner must name, for each of {list(self.head.shape)} kept heads, a dropped head of its own "
            "group or -1 (int64). Correct it, or leave it out.",
        )

    def _check_norms(self) -> None:
        scale, norms = self.norm_scale, 2 * self.source.num_layers + 1
        require(
            scale is None
            or (scale.is_floating_point() and scale.shape == (norms,) and bool(((scale > 0) & scale.isfinite()).all())),
            f"plan.norm_scale must hold a positive factor for each of the source's {norms} norms (2 a layer, and the "
            "final one), or be left out.",
        )
        tied = self.target.share_embeddings_and_output_weights
        require(
            self.has_basis or tied == self.source.share_embeddings_and_output_weights,
            "plan.target parts the output layer from the embedding (share_embeddings_and_output_weights=False), which "
            "only a basis of the residual stream calls for. Keep the source's true.",
        )
        require(
            not (self.has_basis and tied),
            "plan.hidden is a basis, for which the final norm's weights go into the output layer, but the target ties "
            "that to the embedding. Set the target's share_embeddings_and_output_weights=False, or keep channels.",
        )

    @property
    def unties(self) -> bool:
        """Whether the student gets an output layer of its own, which the source's is not."""
        return self.source.share_embeddings_and_output_weights and not self.target.share_embeddings_and_output_weights

    def kept_in_layer(self, source_layer: int | None, expert: int | None = None) -> dict[str, Tensor]:
        """Plan entries by axis for the parameters of a source layer (None: those outside the layers).

        Axes that stay whole are absent, so that nothing is copied for them.

        Args:
            expert: the source expert the parameter belongs to, if it belongs to one.
        """
        kept = {"hidden": self.hidden}
        if source_layer is not None:
            kept |= {axis: getattr(self, axis)[source_layer] for axis in axes_of(self.source) if axis in OF_A_LAYER}
        if source_layer is not None and expert is not None:
            assert self.expert_ffn is not None
            kept["expert_ffn"] = self.expert_ffn[source_layer, expert]
        kept = {axis: entry for axis, entry in kept.items() if not self._stays_whole(axis)}
        if source_layer is not None and self.head_partner is not None:
            kept["head_partner"] = self.head_partner[source_layer]
        return kept

    def _stays_whole(self, axis: str) -> bool:
        if axis == "hidden" and self.has_basis:
            return False
        return getattr(self.source, DIM_OF_AXIS[axis]) == getattr(self.target, DIM_OF_AXIS[axis])

    def describe(self) -> str:
        """A few lines a person reads before paying for the run."""
        dims = self.source.prunable_dims
        width = max(len(dim) for dim in (*dims, "non_embedding_parameters")) + 2
        lines = [f"{'':{width}}{'source':>14}{'target':>14}{'kept':>8}"]
        for dim in dims:
            lines.append(_row(dim, width, getattr(self.source, dim), getattr(self.target, dim)))
        for count in ("num_parameters", "num_non_embedding_parameters"):
            have, keep = getattr(self.source, count), getattr(self.target, count)
            lines.append(_row(count.removeprefix("num_"), width, have, keep))
        dropped = sorted(set(range(self.source.num_layers)) - set(self.layer.tolist()))
        lines.append(f"layers dropped: {', '.join(map(str, dropped)) if dropped else 'none'}")
        if self.origin:
            lines.append("scores: " + ", ".join(f"{key}={value}" for key, value in self.origin.items()))
        return "\n".join(lines)

    # ---- files -----------------------------------------------------------------------------------------------------

    def save(self, folder: Path | str) -> None:
        """Write the two files into `folder`; call it on one rank."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        entries = {axis: getattr(self, axis) for axis in (*PRUNABLE_AXES, *_BESIDE_AXES) if axis != "layer"}
        save_file(
            {axis: entry.contiguous().cpu() for axis, entry in entries.items() if entry is not None}, folder / INDICES
        )
        description = {
            "source": self.source.to_dict(),
            "target": self.target.to_dict(),
            "layer": self.layer.tolist(),
            "origin": dict(self.origin),
        }
        (folder / DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n")

    @staticmethod
    def is_in(folder: Path | str) -> bool:
        """Whether `save` wrote a plan there."""
        return (Path(folder) / DESCRIPTION).is_file()

    @classmethod
    def load(cls, folder: Path | str) -> PruningPlan:
        """Read and check what `save` wrote. Raises: FileNotFoundError: a file is missing. ValueError: not a plan."""
        folder = Path(folder)
        mend = "Run the prune stage to its end, or save a plan there."
        require_files(folder, (INDICES, DESCRIPTION), "pruning plan", mend)
        description = json.loads((folder / DESCRIPTION).read_text())
        entries = load_file(folder / INDICES)
        known = {*PRUNABLE_AXES, *_BESIDE_AXES} - {"layer"}
        require(
            set(entries) <= known,
            f"{folder / INDICES} holds {', '.join(sorted(set(entries) - known))}, which is no axis of a plan; known: "
            f"{', '.join(sorted(known))}.",
        )
        return cls(
            source=ModelShape.from_dict(description["source"]),
            target=ModelShape.from_dict(description["target"]),
            layer=torch.tensor(description["layer"], dtype=torch.int64),
            origin=description["origin"],
            **entries,
        )


def require_prunable(source: ModelShape, target: ModelShape) -> None:
    """ValueError unless `target` is `source` with prunable dims made smaller and heads that fit their groups."""
    for dim in source.prunable_dims:
        have, want = getattr(source, dim), getattr(target, dim)
        require(
            want is not None and want <= have,
            f"target.{dim}={want} is larger than the source's {dim}={have}; pruning only makes models smaller. "
            f"Set target.{dim} to at most {have}.",
        )
    have_other, want_other = source.to_dict(), target.to_dict()
    for key in have_other:
        unties = key == "share_embeddings_and_output_weights" and source.share_embeddings_and_output_weights
        renames = key == "family" and as_family(source, target.family).family == target.family
        require(
            key in (*source.prunable_dims, "moe_layer_freq") or have_other[key] == want_other[key] or unties or renames,
            f"target.{key}={want_other[key]} differs from the source's {key}={have_other[key]}, which pruning cannot "
            f"change. Leave target.{key} out.",
        )
    require(
        target.heads_per_group <= source.heads_per_group,
        f"target.num_attention_heads={target.num_attention_heads} with target.num_query_groups="
        f"{target.num_query_groups} makes {target.heads_per_group} heads per group, but the source's groups have "
        f"{source.heads_per_group}. Set target.num_attention_heads to a multiple of {target.num_query_groups} up to "
        f"{target.num_query_groups * source.heads_per_group}, or keep more query groups.",
    )


def _some(values: Tensor) -> str:
    """The first few distinct values."""
    distinct = values.unique().tolist()
    return ", ".join(map(str, distinct[:5])) + (", ..." if len(distinct) > 5 else "")


def _row(name: str, width: int, have: int, keep: int) -> str:
    return f"{name:{width}}{have:>14,}{keep:>14,}{keep / have:>8.1%}"

"""Surgery on disk: a Hugging Face folder in, the pruned Hugging Face folder out, and no model in between.

    header of every shard  ->  checked against config.json and the plan  ->  headers of the new shards
    a tensor               ->  its kept rows, a block at a time, cut along its other axes  ->  appended to its shard

For machines smaller than the model: beside what Python itself takes, a few blocks of some MiB are resident, whatever
the model's size. Only where a plan adds rows up (a basis of the stream, a head merge) a matrix is held whole, with its
float32 copies. The vocabulary is HF's own, without padding. Nothing communicates; one process runs it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from minitron_nemo.axes import parameter_names, part_axes
from minitron_nemo.axis_expressions import Axis, KeptOfAxes
from minitron_nemo.checks import require
from minitron_nemo.hf.checkpoint import require_no_weights
from minitron_nemo.hf.config import CONFIG, hf_config, require_same_shape
from minitron_nemo.hf.folder import Folder, hf_tensors
from minitron_nemo.hf.safetensors_stream import Planned, ShardWriter, StoredTensor
from minitron_nemo.plan import PruningPlan
from minitron_nemo.pruning.surgery import source_of
from minitron_nemo.shape import ModelShape
from minitron_nemo.text.tokenizer_files import copy_files_beside, require_ids_within

_PER_LAYER = ("layer_types", "mlp_layer_types", "moe_layer_freq", "no_rope_layers")
"""Lists of config.json with one entry a layer."""
_ALWAYS_WRITTEN = {
    *("head_dim", "num_key_value_heads", "mlp_only_layers", "decoder_sparse_step"),
    *("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor", "num_experts", "num_local_experts"),
    "tie_word_embeddings",
}
"""Keys, in families that have them, whose meaning follows from dims or places of layers that change, that transformers
4.57 and 5.x write differently, or in which the weights may have overruled config.json."""


def prune_hf(
    source: Path | str,
    plan: PruningPlan,
    output: Path | str,
    *,
    max_shard_bytes: int = 5 * 10**9,
    ignore: Sequence[str] = (),
) -> dict[str, Any]:
    """Write what `plan` keeps of the HF checkpoint `source` as a HF checkpoint; the source is not changed.

    The first byte is written after every header has been read and every tensor found in its place, and config.json
    last: a folder without it is unfinished.

    Args:
        source: directory with config.json and safetensors, a single file or shards with their index.
        plan: its source is the checkpoint's shape, but for the context's length and padding of the vocabulary.
        output: directory, made if need be; it must not hold safetensors yet.
        max_shard_bytes: size of a file; a larger tensor gets a file of its own.
        ignore: as of `Folder`.
    Returns: the new config.json.
    Raises: FileNotFoundError: a file is missing. CannotWrite: weights stand in `output`. ValueError: a damaged
        file, a tensor that is missing, unknown, quantized or of another shape, or a plan for another model.
    """
    source, output = Path(source), Path(output)
    folder = Folder(source, ignore=ignore)
    mend = "Prune the model that the plan was made for, or make a plan for this one."
    require_same_shape(folder.shape(), plan.source, source, mend=mend)
    pruned_config = _pruned_config(folder.raw_config, plan)
    cuts = _all_cuts(folder, plan)
    require_ids_within(source, folder.vocab_size)
    require_no_weights(output)
    copy_files_beside(source, output)
    writer = ShardWriter(output, {cut.name: Planned(cut.stored.dtype, cut.sizes) for cut in cuts}, max_shard_bytes)
    for cut in cuts:
        for rows in cut.blocks(plan.source):
            writer.append(cut.name, rows)
    writer.finish()
    (output / CONFIG).write_text(json.dumps(pruned_config, indent=2, sort_keys=True) + "\n")
    return pruned_config


@dataclass(frozen=True)
class _Cut:
    """One HF tensor of the student: where its source lies and how it is cut."""

    name: str
    """HF name under the student's layer index."""
    sizes: tuple[int, ...]
    stored: StoredTensor
    axes: tuple[Axis, ...]
    kept: KeptOfAxes

    def blocks(self, shape: ModelShape) -> Iterator[Tensor]:
        """The pruned tensor's rows, in order; `shape` is the source's."""
        first, *others = self.axes
        if first.mixes(self.kept):
            blocks = iter([first.reduce(self.stored.read(), 0, shape, self.kept)])
        else:
            blocks = self.stored.blocks(first.kept_rows(shape, self.kept))
        for block in blocks:
            for dim, axis in enumerate(others, start=1):
                block = axis.reduce(block, dim, shape, self.kept)
            yield block


def _all_cuts(folder: Folder, plan: PruningPlan) -> list[_Cut]:
    """Every tensor of the student in table order, each found in the source with the sizes config.json calls for."""
    require(
        folder.vocab_size <= plan.source.padded_vocab_size,
        f"{folder.path} has vocab_size={folder.vocab_size}, more than the plan's padded_vocab_size="
        f"{plan.source.padded_vocab_size}. Make a plan for this model.",
    )
    found = folder.parameters(plan.source)
    cuts = []
    for name in parameter_names(plan.target):
        source_name, kept = source_of(name, plan, lambda norm: found[norm][0].read())
        if source_name in found:
            tensors = hf_tensors(name, plan.target, folder.family, folder.vocab_size)
            cuts += [
                _Cut(hf_name, sizes, stored, axes, kept)
                for (hf_name, sizes), stored, axes in zip(
                    tensors, found[source_name], part_axes(source_name, plan.source), strict=True
                )
            ]
    return cuts


def _pruned_config(config: dict[str, Any], plan: PruningPlan) -> dict[str, Any]:
    """The source's config.json with what pruning changes; every other key as it is."""
    before, after = hf_config(plan.source), hf_config(plan.target)
    unlike = {key for key in after if key not in before or before[key] != after[key]}
    changed = {key: after[key] for key in after if key in unlike or key in _ALWAYS_WRITTEN}
    for key in _PER_LAYER:
        if isinstance(config.get(key), list):
            changed[key] = _of_kept_layers(key, config[key], plan)
    if isinstance(config.get("max_window_layers"), int):  # layers from here on have the sliding window
        changed["max_window_layers"] = sum(layer < config["max_window_layers"] for layer in plan.layer.tolist())
    dropped = {"auto_map"} | (before.keys() - after.keys())  # its code is not copied; a renamed family has other keys
    return {key: value for key, value in config.items() if key not in dropped} | changed


def _of_kept_layers(key: str, values: Sequence[Any], plan: PruningPlan) -> list[Any]:
    require(
        len(values) == plan.source.num_layers,
        f"config.json's {key} has {len(values)} entries for {plan.source.num_layers} layers. Correct it.",
    )
    return [values[layer] for layer in plan.layer.tolist()]

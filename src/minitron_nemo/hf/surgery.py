"""Surgery on disk: a Hugging Face folder in, the pruned Hugging Face folder out, and no model in between.

    header of every shard  ->  checked against config.json and the plan  ->  headers of the new shards
    a tensor               ->  its kept rows, a block at a time, cut along its other axes  ->  appended to its shard

For machines smaller than the model: beside what Python itself takes, a few blocks of some MiB are resident, whatever
the model's size. Only where a plan adds rows up (a basis of the stream, a head merge) a matrix is held whole, with its
float32 copies. The vocabulary is HF's own, without padding. Nothing communicates; one process runs it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minitron_nemo.axes import parameter_names, part_axes
from minitron_nemo.axis_expressions import Axis, KeptOfAxes
from minitron_nemo.checks import require
from minitron_nemo.hf.checkpoint import Checkpoint, hf_tensors, is_held, require_no_weights
from minitron_nemo.hf.config import CONFIG, hf_config, read_config, require_same_shape, shape_from_config
from minitron_nemo.hf.families import Family, family_of
from minitron_nemo.hf.safetensors_stream import Planned, ShardWriter, StoredTensor
from minitron_nemo.places import EMBEDDING, OUTPUT
from minitron_nemo.plan import PruningPlan
from minitron_nemo.pruning.surgery import source_of
from minitron_nemo.shape import ModelShape
from minitron_nemo.text.tokenizer_files import copy_files_beside, require_ids_within

_NOT_WEIGHTS = re.compile(r"\.rotary_emb\.inv_freq$")
"""Buffers that old checkpoints carry and config.json says as well."""
_PER_LAYER = ("layer_types", "mlp_layer_types", "moe_layer_freq", "no_rope_layers")
"""Lists of config.json with one entry a layer."""
_ALWAYS_WRITTEN = ("head_dim", "num_key_value_heads", "mlp_only_layers", "decoder_sparse_step")
"""Keys whose meaning follows from dims or places of layers that change, in families that have them."""


def prune_hf(
    source: Path | str, plan: PruningPlan, output: Path | str, *, max_shard_bytes: int = 5 * 10**9
) -> dict[str, Any]:
    """Write what `plan` keeps of the HF checkpoint `source` as a HF checkpoint; the source is not changed.

    The first byte is written after every header has been read and every tensor found in its place, and config.json
    last: a folder without it is unfinished.

    Args:
        source: directory with config.json and safetensors, a single file or shards with their index.
        plan: its source is the checkpoint's shape, but for the context's length and padding of the vocabulary.
        output: directory, made if need be; it must not hold safetensors yet.
        max_shard_bytes: size of a file; a larger tensor gets a file of its own.
    Returns: the new config.json.
    Raises: FileNotFoundError: a file is missing. FileExistsError: weights stand in `output`. ValueError: a damaged
        file, a tensor that is missing, unknown, quantized or of another shape, or a plan for another model.
    """
    source, output = Path(source), Path(output)
    config = read_config(source)
    mend = "Prune the model that the plan was made for, or make a plan for this one."
    require_same_shape(shape_from_config(config), plan.source, source, mend=mend)
    pruned_config = _pruned_config(config, plan)
    cuts = _all_cuts(source, config, plan)
    require_ids_within(source, config["vocab_size"])
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


def _all_cuts(source: Path, config: dict[str, Any], plan: PruningPlan) -> list[_Cut]:
    """Every tensor of the student in table order, each found in the source with the sizes config.json calls for."""
    family, vocab_size = family_of(config["model_type"]), config["vocab_size"]
    config = family.with_defaults(config)
    require(
        vocab_size <= plan.source.padded_vocab_size,
        f"{source} has vocab_size={vocab_size}, more than the plan's padded_vocab_size="
        f"{plan.source.padded_vocab_size}. Make a plan for this model.",
    )
    checkpoint = Checkpoint(source)
    expected = {
        name: hf_tensors(name, plan.source, family, vocab_size)
        for name in parameter_names(plan.source)
        if is_held(name, family, config)
    }
    found = {name: [checkpoint.find(*tensor) for tensor in tensors] for name, tensors in expected.items()}
    known = {hf_name for tensors in expected.values() for hf_name, _ in tensors}
    if plan.source.share_embeddings_and_output_weights:
        known |= _second_copy_of_tied_embeddings(checkpoint, family, found)
    unknown = sorted(name for name in checkpoint.tensors if name not in known and not _NOT_WEIGHTS.search(name))
    require(
        not unknown,
        f"{source} holds tensors that a {family.model_type} of its config.json does not have: "
        f"{', '.join(unknown[:5])}{', ...' if len(unknown) > 5 else ''}. Remove them, or prune the model they belong "
        "to; what they mean is not known here, so nothing was written.",
    )
    cuts = []
    for name in parameter_names(plan.target):
        source_name, kept = source_of(name, plan, lambda norm: found[norm][0].read())
        if source_name in expected:
            tensors = hf_tensors(name, plan.target, family, vocab_size)
            cuts += [
                _Cut(hf_name, sizes, stored, axes, kept)
                for (hf_name, sizes), stored, axes in zip(
                    tensors, found[source_name], part_axes(source_name, plan.source), strict=True
                )
            ]
    return cuts


def _second_copy_of_tied_embeddings(
    checkpoint: Checkpoint, family: Family, found: dict[str, list[StoredTensor]]
) -> set[str]:
    """The output layer that some checkpoints hold beside the embedding it is tied to: left out, if it is the same."""
    (output,) = family.hf_names(OUTPUT)
    if output in checkpoint.tensors:
        (embedding,) = found[EMBEDDING]
        copy = checkpoint.find(output, embedding.shape)
        require(
            copy.dtype == embedding.dtype
            and all(torch.equal(a, b) for a, b in zip(copy.blocks(), embedding.blocks(), strict=True)),
            f"config.json of {checkpoint.path} ties the output layer to the embedding (tie_word_embeddings=true), but "
            f"{output} differs from {embedding.name}. Correct tie_word_embeddings, or remove {output}.",
        )
    return {output}


def _pruned_config(config: dict[str, Any], plan: PruningPlan) -> dict[str, Any]:
    """The source's config.json with what pruning changes; every other key as it is."""
    before, after = hf_config(plan.source), hf_config(plan.target)
    changed = {key: after[key] for key in after if before[key] != after[key] or key in _ALWAYS_WRITTEN}
    for key in _PER_LAYER:
        if isinstance(config.get(key), list):
            changed[key] = _of_kept_layers(key, config[key], plan)
    if isinstance(config.get("max_window_layers"), int):  # layers from here on have the sliding window
        changed["max_window_layers"] = sum(layer < config["max_window_layers"] for layer in plan.layer.tolist())
    return {key: value for key, value in config.items() if key != "auto_map"} | changed  # its code is not copied


def _of_kept_layers(key: str, values: Sequence[Any], plan: PruningPlan) -> list[Any]:
    require(
        len(values) == plan.source.num_layers,
        f"config.json's {key} has {len(values)} entries for {plan.source.num_layers} layers. Correct it.",
    )
    return [values[layer] for layer in plan.layer.tolist()]

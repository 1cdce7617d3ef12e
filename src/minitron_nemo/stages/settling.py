"""What a prune config asks for of a model: the student's shape, and how it is cut where that is left open."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from minitron_nemo.checks import Mistake, did_you_mean, require
from minitron_nemo.config.pruning import CompensationConfig, DepthCorrectionConfig, SurgeryConfig
from minitron_nemo.config.stages import PruneConfig
from minitron_nemo.parallel import rank_zero_works
from minitron_nemo.pruning import kept_layers
from minitron_nemo.pruning.basis import missed_by_axes, missed_by_channels, stream_moments
from minitron_nemo.pruning.ranking import top_k
from minitron_nemo.pruning.targets import resolve_target
from minitron_nemo.runtimes import as_family
from minitron_nemo.scores import STREAM, Importance
from minitron_nemo.shape import PRUNABLE_DIMS, ModelShape

logger = logging.getLogger(__name__)

CLEARLY = 0.75
"""Of what channels miss, axes may miss at most so much where they are to part a tie: at 0.88 a real model was better
off tied by 64 calibration samples, and after distillation, and parted by 16 (docs/log.md)."""


def settle(
    config: PruneConfig, importance: Importance, source: ModelShape
) -> tuple[PruneConfig, ModelShape, list[int] | None]:
    """The config with its surgery settled for this model; the shape it asks for; the layers it keeps where they are
    said.

    Raises: ValueError: nothing to prune, or a target that does not fit.
    """
    base, layers, resolve = asked(
        config, source, lambda number: kept_layers(importance, source, number, layers=config.layers, depth=config.depth)
    )
    target = resolve(base)
    surgery = config.surgery.settled(source, target)
    if source.share_embeddings_and_output_weights and target.hidden_size < source.hidden_size:
        untied = replace(base, share_embeddings_and_output_weights=False)
        if surgery.turns:
            target = resolve(untied)
            logger.warning(
                "prune.surgery.basis=rotation parts the tied embeddings: the final norm goes into the output layer, "
                "whose %s parameters are the student's own. prune.surgery.basis=channels keeps them tied.",
                f"{target.padded_vocab_size * target.hidden_size:,}",
            )
        elif _is_basis_open(config):
            turned = _turned(config, untied, target)
            if turned is not None and rank_zero_works(partial(parting_pays, config, importance, target, turned)):
                surgery, target = config.surgery.settled(source, turned, basis="rotation"), turned
    _say_what_is_moot(config.surgery, surgery)
    return replace(config, surgery=surgery), target, layers


def asked(
    config: PruneConfig, source: ModelShape, choose: Callable[[int], list[int]]
) -> tuple[ModelShape, list[int] | None, Callable[[ModelShape], ModelShape]]:
    """What is cut from, under its family's name; the layers it keeps where they are said; and what makes the student's
    shape of it, before surgery is settled.

    Args:
        choose: which layers stay of so many, where dense ones and such with experts are mixed.
    Raises: ValueError: nothing to prune, or a dim or layer that there is not.
    """
    require(
        bool(config.dims) or bool(config.keep) or config.budget.cost is not None or config.layers is not None,
        "prune.target is empty: nothing would be pruned. Set for example prune.target.hidden_size=3072, "
        "prune.keep.ffn_hidden_size=0.6 or prune.budget.parameters=4.5B.",
    )
    for dim in config.target.keys() - config.dims.keys():  # the others are looked at with their sizes
        require(dim in PRUNABLE_DIMS, f"target.{dim} is no dim of a model; {did_you_mean(dim, PRUNABLE_DIMS)}")
    dims, layers, base = config.dims, config.layers, as_family(source, config.family)
    beyond = [layer for layer in layers or () if layer >= source.num_layers]
    require(not beyond, f"layers names {beyond}, and the model has 0 to {source.num_layers - 1}. Leave them out.")
    if layers is not None:
        dims.setdefault("num_layers", len(layers))
    if source.moe_layer_freq is not None and "num_layers" in dims:  # which layers stay decides how many have experts
        layers = choose(dims.pop("num_layers"))
        base = base.keeping_layers(layers)

    def resolve(base: ModelShape) -> ModelShape:
        options: dict[str, Any] = {"target": dims, "keep": config.keep, "multiple_of": config.multiple_of}
        return resolve_target(base, budget=config.budget, **options)

    return base, layers, resolve


def _turned(config: PruneConfig, untied: ModelShape, tied: ModelShape) -> ModelShape | None:
    """The tied student with fewer axes and an output layer of its own, on the same budget; None where none is left."""
    others = {
        dim: getattr(tied, dim)
        for dim in untied.prunable_dims
        if dim != "hidden_size" and getattr(tied, dim) != getattr(untied, dim)
    }
    budget = replace(config.budget, dims={"hidden_size": 1.0})
    with contextlib.suppress(Mistake):  # no budget for two tables
        return resolve_target(untied, target=others, keep={}, budget=budget, multiple_of=config.multiple_of)
    return None


def _say_what_is_moot(asked: SurgeryConfig, surgery: SurgeryConfig) -> None:
    """Where a method decides how weights are refitted, settings of the other way say nothing."""
    if asked.refit is not None or asked.method != "calibrated":
        return
    others = {"compensation": CompensationConfig(), "depth_correction": DepthCorrectionConfig()}
    moot = [f"prune.surgery.{name}" for name, usual in others.items() if getattr(asked, name) != usual]
    if surgery.is_sequential and moot:
        logger.warning(
            "%s: not read by a sequential refit, which prune.surgery.method=calibrated is. Set "
            "prune.surgery.sequential, or prune.surgery.refit=none.",
            " and ".join(moot),
        )
    elif not surgery.is_sequential and asked.is_sequential:
        logger.warning(
            "prune.surgery.method=calibrated is refit=none here: a LayerNorm takes off the mean over all channels, "
            "which a sequential refit of some of them cannot. prune.surgery.basis=rotation takes axes, and an output "
            "layer of the student's own where embeddings are tied."
        )


def _is_basis_open(config: PruneConfig) -> bool:
    """Whether a budget that counts embeddings chooses the hidden size, and nobody said of what axes."""
    said = config.surgery.basis is not None or config.surgery.method != "calibrated"
    chooses = (
        config.rounds == 1
        and "hidden_size" in config.budget.dims
        and "hidden_size" not in {**config.dims, **config.keep}
    )
    return config.budget.cost in ("parameters", "memory") and chooses and not said


def parting_pays(config: PruneConfig, importance: Importance, tied: ModelShape, untied: ModelShape) -> bool:
    """Whether, of two students of one budget, the untied one's axes miss clearly less of the stream than the tied one's
    channels, though they are fewer; says so. All else of the two is alike."""
    cost = str(config.budget.cost)
    budget = f"prune.budget.{cost}={getattr(config.budget, cost)}"
    if STREAM not in importance.moments:
        logger.warning(
            "%s: embeddings stay tied, on %s channels. Whether %s axes and an output layer of their own would be "
            "better is compared where importance was estimated with estimate_importance.importance.stream=normalised; "
            "prune.surgery.basis=rotation takes them.",
            budget,
            tied.hidden_size,
            untied.hidden_size,
        )
        return False
    stream, _ = stream_moments(importance)
    scores = importance.scores("hidden", config.batch_aggregation, config.sequence_aggregation)
    is_refitted = config.surgery.settled(importance.shape, tied).is_sequential
    by_channels = missed_by_channels(stream, top_k(scores, tied.hidden_size), refitted=is_refitted)
    by_axes = missed_by_axes(stream, untied.hidden_size)
    pays = by_axes < CLEARLY * by_channels
    logger.warning(
        "%s: embeddings that stay tied leave %s channels, which miss %.1f%% of the residual stream; parted, %s axes, "
        "which miss %.1f%%. They %s. prune.surgery.basis=%s says otherwise.",
        budget,
        tied.hidden_size,
        100 * by_channels,
        untied.hidden_size,
        100 * by_axes,
        "are parted" if pays else "stay tied",
        "channels" if pays else "rotation",
    )
    return pays

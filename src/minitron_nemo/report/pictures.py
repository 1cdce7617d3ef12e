"""Each picture of the page with what to read from it."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from markupsafe import Markup

from minitron_nemo.report.correlation import between_aggregations, between_artifacts, between_depth_metrics
from minitron_nemo.report.figures.candidates import Tried, front_of_sizes, ranks_over_tokens
from minitron_nemo.report.figures.layer_bars import layer_bars
from minitron_nemo.report.figures.loss_curves import Series, loss_curves, source_curves
from minitron_nemo.report.figures.rank_tables import agreement_tables
from minitron_nemo.report.figures.score_maps import expert_map, head_map, hidden_profile, neuron_map
from minitron_nemo.report.figures.svg import SERIES, TEACHER
from minitron_nemo.report.run import Run
from minitron_nemo.report.scores import Pruning, share_kept_from_top
from minitron_nemo.scores import GREEDY, Importance
from minitron_nemo.shape import ModelShape

AxisScores = npt.NDArray[np.float64]

_DEPTH_CAPTIONS = {
    "block_influence": "Block influence: how much a layer turns the residual stream, 1 less the mean cosine between "
    "what goes in and what comes out.",
    "loss": "Loss: how many nats per token the loss on calibration text grows when a layer is left out; below 0 the "
    "model is better without it.",
    "kl": "KL: how far the predictions move from the intact model's when a layer is left out, in nats per token.",
    "squared_error": "Squared error: the squared change of the logits when a layer is left out, as a share of the "
    "intact model's squared logits.",
    "accuracy": "Accuracy: the share of a task's questions by which the model answers fewer rightly when a layer is "
    "left out.",
    GREEDY: "Greedy: the order in which layers were dropped one after another, each time the one the remaining model "
    "needed least; 0 went first, and layers that stayed to the end share the highest bar.",
}

_HOW_TO_READ = (
    "A number is Spearman's rank correlation: 1 where both put everything in the same order, so that either would "
    "prune alike, 0 where the orders are unrelated, -1 where they are opposite."
)


def curves(run: Run, teacher_loss: float | None) -> Markup | None:
    """The rows that were trained; None where none was.

    Args:
        teacher_loss: held-out loss of the reference teacher, nats per token.
    """
    series = _series(run)
    if not any(each.history.training.tokens or each.history.validation.tokens for each in series):
        return None
    caption = (
        "Lower is better; at equal tokens, the distance between two curves is what the better start or the better "
        "loss is worth. Lines with dots are losses on validation text, thin ones the training loss (running mean over "
        "a twentieth of the run; faint: as logged). The axis is cut above the highest loss after a twentieth of the "
        "tokens."
    )
    if teacher_loss is not None:
        caption += " Dashed: held-out loss of the teacher, which the students approach."
    if any(each.is_distilled for each in series):
        caption += (
            " The distilled student's training loss is its distance from the teacher, another quantity than "
            "cross-entropy, and has its own axis below."
        )
    if any(each.history.validation_agreement.tokens for each in series):
        caption += (
            " Its dots are that distance on validation text; agreement is the share of validation tokens for which "
            "student and teacher find the same next token likeliest."
        )
    return figure(loss_curves(series, teacher_loss), caption) + _source_curves(series)


def _source_curves(series: list[Series]) -> Markup:
    several = [each for each in series if each.history.source_losses]
    if not several:
        return Markup("")
    caption = (
        "Validation loss of each source of the text, in the colours of the models above. A source that falls more "
        "slowly than the others has too small a share of the training text, or is less like the teacher's own."
    )
    return figure(source_curves(several), caption)


def _series(run: Run) -> list[Series]:
    """One of each row with a history; teachers in grey, the others in colours by the order of their rows."""
    colours, series = itertools.cycle(SERIES), []
    for model in run.models:
        history = run.history(model.name)
        if history is None and model.name in run.artifacts:
            continue  # it was not trained
        colour = TEACHER if model.is_teacher else next(colours)  # a missing row has one too: it may still be trained
        if history is not None:
            is_distilled = run.artifacts[model.name].stage == "distill"
            series.append(Series(model.label, history, colour, is_distilled))
    return series


def scores(pruning: Pruning) -> list[Markup]:
    """Importance of every axis that has scores, and of layers; what the plan keeps, on it."""
    drawn = {
        "ffn": _neurons,
        "shared_expert_ffn": _shared_neurons,
        "expert": _experts,
        "expert_ffn": _expert_neurons,
        "head": _heads,
        "hidden": _hidden,
    }
    pictures = [draw(pruning, pruning.scores[axis]) for axis, draw in drawn.items() if axis in pruning.scores]
    return pictures + [_layers(pruning, metric, blocks) for metric, blocks in pruning.depth.items()]


def _neurons(pruning: Pruning, values: AxisScores) -> Markup:
    caption = (
        "FFN neurons. Each row is a layer, its neurons sorted by score: the faster a row fades, the fewer neurons "
        "do its work, and the less is lost right of the line. A row that stays bright pays more for the same cut."
    )
    return figure(neuron_map(values, _number_kept(pruning, "ffn")), caption + _agreement(pruning, "ffn"))


def _shared_neurons(pruning: Pruning, values: AxisScores) -> Markup:
    caption = (
        "Neurons of the shared expert, which sees every token, sorted by score in each layer as above; layers "
        "without one are blank."
    )
    svg = neuron_map(values, _number_kept(pruning, "shared_expert_ffn"), "shared")
    return figure(svg, caption + _agreement(pruning, "shared_expert_ffn"))


def _experts(pruning: Pruning, values: AxisScores) -> Markup:
    caption = (
        "Routed experts, one cell each: the brighter, the more an expert adds to the tokens routed to it. An "
        "expert at the lowest brightness may have got no token at all. Layers without experts are blank."
    )
    if "expert" in pruning.kept:
        caption += " A dot marks a kept expert."
    return figure(expert_map(values, pruning.kept.get("expert")), caption)


def _expert_neurons(pruning: Pruning, values: AxisScores) -> Markup:
    caption = (
        "Neurons inside the routed experts. Each expert's neurons are sorted by score, then the experts of a layer "
        "are averaged: the faster a row fades, the less is lost right of the line in a typical expert of it."
    )
    svg = neuron_map(values, _number_kept(pruning, "expert_ffn"), "expert-neurons")
    return figure(svg, caption + _agreement(pruning, "expert_ffn"))


def _heads(pruning: Pruning, values: AxisScores) -> Markup:
    caption = "Attention heads, one cell each; the brighter, the more important."
    if "head" in pruning.kept:
        caption += " A dot marks a kept head; every kept query group keeps equally many."
    heads_per_group = pruning.source.heads_per_group if pruning.source else values.shape[1]
    return figure(head_map(values, pruning.kept.get("head"), heads_per_group), caption)


def _hidden(pruning: Pruning, values: AxisScores) -> Markup:
    caption = (
        "Hidden channels, shared by all layers. A cut where the curve has fallen steeply loses little; where it is "
        "flat, the channels are of nearly equal worth and each one dropped costs."
    )
    return figure(hidden_profile(values, _number_kept(pruning, "hidden")), caption + _agreement(pruning, "hidden"))


def _layers(pruning: Pruning, metric: str, blocks: Mapping[int, AxisScores]) -> Markup:
    kept = pruning.kept.get("layer")
    caption = _DEPTH_CAPTIONS.get(metric, f"Layers by {metric}; the higher, the more important.")
    if len(blocks) > 1:
        caption += (
            " The panel of n layers shows what leaving out a block of n neighbouring layers does, at the place of "
            "its first layer."
        )
    caption += " A triangle points at the lowest bar, the layer or block to drop first by this metric."
    if 1 in blocks and kept is not None and len(kept) < len(blocks[1]):
        caption += " Hollow bars are the layers that the plan drops."
    return figure(layer_bars(metric, blocks, kept), caption)


def agreements(artifacts: Mapping[str, Importance], shown: str | None, pruning: Pruning) -> list[Markup]:
    """Rank correlations between the metrics of one importance, and between the run's importance artifacts.

    Args:
        artifacts: by name.
        shown: the one whose scores `pruning` holds.
    """
    inside = _inside(artifacts[shown]) if shown is not None else []
    return [*inside, *_between(artifacts, *pruning.aggregations)]


def _inside(importance: Importance) -> list[Markup]:
    pictures = []
    if tables := between_aggregations(importance):
        caption = (
            "Between the ways to make one score of an activation, for each axis (aggregation over samples / along "
            f"a sample's tokens). {_HOW_TO_READ} Correlations are of units in the same layer, averaged over layers; "
            "aggregations that give all of them one score are left out. Where all numbers are high, the choice of "
            "aggregation matters little."
        )
        pictures.append(figure(agreement_tables(tables, "aggregations"), caption))
    if tables := between_depth_metrics(importance):
        caption = f"Between the depth metrics, over the scores of single layers. {_HOW_TO_READ}"
        pictures.append(figure(agreement_tables(tables, "depth-metrics"), caption))
    return pictures


def _between(artifacts: Mapping[str, Importance], batch: str, sequence: str) -> list[Markup]:
    pictures = []
    shapes: list[ModelShape] = []
    for importance in artifacts.values():
        if importance.shape not in shapes:
            shapes.append(importance.shape)
    for number, shape in enumerate(shapes):
        alike = {name: importance for name, importance in artifacts.items() if importance.shape == shape}
        tables = between_artifacts(alike, batch, sequence)
        if not tables:
            continue
        caption = (
            f"Between the run's importance artifacts of one shape ({shape.num_layers} layers, hidden size "
            f"{shape.hidden_size:,}), for each axis, by {batch} over samples of the {sequence} over a sample's tokens. "
            f"{_HOW_TO_READ} High numbers between runs over other samples mean that there were enough of them."
        )
        pictures.append(figure(agreement_tables(tables, f"artifacts-{number}"), caption))
    return pictures


def search(key: str, found: Mapping[str, Any]) -> list[Markup]:
    """
    Args:
        key: begins the ids.
        found: search.json, its candidates best first.
    """
    tried = [
        Tried(
            each["id"], each["parameters"], each["loss_cut"], [(at, loss) for at, loss in each["curve"]],
            each["on_front"],
        )
        for each in found["candidates"]
    ]  # fmt: skip
    sizes = (
        "Size against held-out loss (nats per token); lower left is better. Above, after the cut alone: filled dots "
        "and their line are the Pareto front, candidates that no other beats in both. Below, after distillation: "
        "filled dots had all the tokens, hollow ones were left out on the way. The star is the winner."
    )
    ranks = (
        "Rank of each distilled candidate, at the cut and after each rung; a line that ends was left out there. Where "
        "lines still cross late, the rungs are too early to tell the candidates apart (search.halving.never_before)."
    )
    return [
        figure(front_of_sizes(key, tried, found["winner"], found["teacher"]["held_out_loss"]), sizes),
        figure(ranks_over_tokens(key, tried, found["winner"]), ranks),
    ]


def _number_kept(pruning: Pruning, axis: str) -> int | None:
    return int(pruning.kept[axis].shape[-1]) if axis in pruning.kept else None


def _agreement(pruning: Pruning, axis: str) -> str:
    """Whether the cut in the picture is the plan's: a plan may rank by other scores than those shown."""
    kept, scores = pruning.kept.get(axis), pruning.scores[axis]
    if kept is None or kept.shape[:-1] != scores.shape[:-1]:
        return ""
    share = share_kept_from_top(scores, kept)
    if share == 1.0:
        return " The plan keeps exactly those with the highest scores shown here."
    return f" Of those the plan keeps, {share:.0%} are among the highest by the scores shown here."


def figure(svg: str, caption: str) -> Markup:
    """A picture with what to read from it."""
    return Markup("<figure><div>{}</div><figcaption>{}</figcaption></figure>").format(Markup(svg), caption)

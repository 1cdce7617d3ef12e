"""One HTML file from a run: numbers, curves, importance pictures, shapes, provenance.

The file asks nothing of the network: style and pictures are inside it, and there is no script. `page.html` is the
template, with every value escaped but the pictures, which `figures` draws.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from minitron_nemo.artifact import Artifact
from minitron_nemo.report import figures, rows
from minitron_nemo.report.correlation import between_aggregations, between_artifacts, between_depth_metrics
from minitron_nemo.report.run import VARIANTS, Run
from minitron_nemo.report.scores import Pruning, counts, importances, share_kept_from_top
from minitron_nemo.scores import GREEDY, Importance
from minitron_nemo.shape import ModelShape

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


def render(run: Run, values: dict[str, Any]) -> str:
    """The page as text.

    Args:
        run: the run that was read.
        values: its summary, `rows.summarize(run)`.
    """
    pruning = Pruning.read(run)
    holds = values["order"]["holds"]
    correction = next((row["tokens"] for row in values["rows"] if row["name"] == "corrected_teacher"), None)
    versions, common = _versions(run)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    package = files("minitron_nemo.report")
    template = environment.from_string(package.joinpath("page.html").read_text(encoding="utf-8"))
    return template.render(
        name=run.path.name,
        style=Markup(package.joinpath("page.css").read_text(encoding="utf-8")),
        summary=values,
        headers=rows.headers(values),
        rows=[rows.cells(row) for row in values["rows"]],
        verdict={True: "holds", False: "fails", None: "unknown"}[holds],
        correction_tokens=rows.count(correction) if correction else None,
        export=str(run.artifacts["export"].path) if "export" in run.artifacts else None,
        curves=_curves(run, values),
        no_curves="No training history in this run directory, so no curves.",
        origin=pruning.origin,
        counts=counts(pruning.kept, pruning.sizes),
        pictures=_pictures(pruning),
        agreements=_agreements(importances(run), pruning),
        shapes=_shapes(run, pruning),
        versions=versions,
        provenance=[_provenance(name, artifact, common) for name, artifact in sorted(run.artifacts.items())],
    )


def _curves(run: Run, values: dict[str, Any]) -> Markup | None:
    histories = {v.name: found for v in VARIANTS if v.name in figures.SERIES and (found := run.history(v.name))}
    if not any(history.training.tokens or history.validation.tokens for history in histories.values()):
        return None
    labels = {variant.name: variant.label for variant in VARIANTS}
    losses = {row["name"]: row["held_out_loss"] for row in values["rows"]}
    distillation = [name for name in histories if run.artifacts[name].stage == "distill"]
    teacher_loss = losses.get(values["reference_teacher"])
    svg = figures.loss_curves(histories, labels, distillation, teacher_loss)
    caption = (
        "Lower is better; at equal tokens, the distance between two curves is what the better start or the better "
        "loss is worth. Lines with dots are losses on validation text, thin ones the training loss (running mean over "
        "a twentieth of the run; faint: as logged). The axis is cut above the highest loss after a twentieth of the "
        "tokens."
    )
    if teacher_loss is not None:
        caption += " Dashed: held-out loss of the teacher, which the students approach."
    if distillation:
        caption += (
            " The distilled student's training loss is its distance from the teacher, another quantity than "
            "cross-entropy, and has its own axis below."
        )
    if any(history.validation_agreement.tokens for history in histories.values()):
        caption += (
            " Its dots are that distance on validation text; agreement is the share of validation tokens for which "
            "student and teacher find the same next token likeliest."
        )
    return _figure(svg, caption)


def _pictures(pruning: Pruning) -> list[Markup]:
    scores, kept, pictures = pruning.scores, pruning.kept, []
    if "ffn" in scores:
        caption = (
            "FFN neurons. Each row is a layer, its neurons sorted by score: the faster a row fades, the fewer neurons "
            "do its work, and the less is lost right of the line. A row that stays bright pays more for the same cut."
        )
        svg = figures.neuron_map(scores["ffn"], _number_kept(pruning, "ffn"))
        pictures.append(_figure(svg, caption + _agreement(pruning, "ffn")))
    if "shared_expert_ffn" in scores:
        caption = (
            "Neurons of the shared expert, which sees every token, sorted by score in each layer as above; layers "
            "without one are blank."
        )
        svg = figures.neuron_map(scores["shared_expert_ffn"], _number_kept(pruning, "shared_expert_ffn"), "shared")
        pictures.append(_figure(svg, caption + _agreement(pruning, "shared_expert_ffn")))
    if "expert" in scores:
        caption = (
            "Routed experts, one cell each: the brighter, the more an expert adds to the tokens routed to it. An "
            "expert at the lowest brightness may have got no token at all. Layers without experts are blank."
        )
        if "expert" in kept:
            caption += " A dot marks a kept expert."
        pictures.append(_figure(figures.expert_map(scores["expert"], kept.get("expert")), caption))
    if "expert_ffn" in scores:
        caption = (
            "Neurons inside the routed experts. Each expert's neurons are sorted by score, then the experts of a layer "
            "are averaged: the faster a row fades, the less is lost right of the line in a typical expert of it."
        )
        svg = figures.neuron_map(scores["expert_ffn"], _number_kept(pruning, "expert_ffn"), "expert-neurons")
        pictures.append(_figure(svg, caption + _agreement(pruning, "expert_ffn")))
    if "head" in scores:
        caption = "Attention heads, one cell each; the brighter, the more important."
        if "head" in kept:
            caption += " A dot marks a kept head; every kept query group keeps equally many."
        heads_per_group = pruning.source.heads_per_group if pruning.source else scores["head"].shape[1]
        pictures.append(_figure(figures.head_map(scores["head"], kept.get("head"), heads_per_group), caption))
    if "hidden" in scores:
        caption = (
            "Hidden channels, shared by all layers. A cut where the curve has fallen steeply loses little; where it is "
            "flat, the channels are of nearly equal worth and each one dropped costs."
        )
        svg = figures.hidden_profile(scores["hidden"], _number_kept(pruning, "hidden"))
        pictures.append(_figure(svg, caption + _agreement(pruning, "hidden")))
    for metric, blocks in pruning.depth.items():
        caption = _DEPTH_CAPTIONS.get(metric, f"Layers by {metric}; the higher, the more important.")
        if len(blocks) > 1:
            caption += (
                " The panel of n layers shows what leaving out a block of n neighbouring layers does, at the place of "
                "its first layer."
            )
        caption += " A triangle points at the lowest bar, the layer or block to drop first by this metric."
        if 1 in blocks and "layer" in kept and len(kept["layer"]) < len(blocks[1]):
            caption += " Hollow bars are the layers that the plan drops."
        pictures.append(_figure(figures.layer_bars(metric, blocks, kept.get("layer")), caption))
    return pictures


def _agreements(artifacts: Mapping[str, Importance], pruning: Pruning) -> list[Markup]:
    """Rank correlations between the metrics of the run's importance, and between its importance artifacts."""
    pictures = []
    how_to_read = (
        "A number is Spearman's rank correlation: 1 where both put everything in the same order, so that either would "
        "prune alike, 0 where the orders are unrelated, -1 where they are opposite."
    )
    shown = artifacts.get("importance")
    if shown is not None:
        if tables := between_aggregations(shown):
            caption = (
                "Between the ways to make one score of an activation, for each axis (aggregation over samples / along "
                f"a sample's tokens). {how_to_read} Correlations are of units in the same layer, averaged over layers; "
                "aggregations that give all of them one score are left out. Where all numbers are high, the choice of "
                "aggregation matters little."
            )
            pictures.append(_figure(figures.agreement_tables(tables, "aggregations"), caption))
        if tables := between_depth_metrics(shown):
            caption = f"Between the depth metrics, over the scores of single layers. {how_to_read}"
            pictures.append(_figure(figures.agreement_tables(tables, "depth-metrics"), caption))
    shapes: list[ModelShape] = []
    for importance in artifacts.values():
        if importance.shape not in shapes:
            shapes.append(importance.shape)
    batch, sequence = pruning.aggregations
    for number, shape in enumerate(shapes):
        alike = {name: importance for name, importance in artifacts.items() if importance.shape == shape}
        tables = between_artifacts(alike, batch, sequence)
        if not tables:
            continue
        caption = (
            f"Between the run's importance artifacts of one shape ({shape.num_layers} layers, hidden size "
            f"{shape.hidden_size:,}), for each axis, by {batch} over samples of the {sequence} over a sample's tokens. "
            f"{how_to_read} High numbers between runs over other samples mean that there were enough of them."
        )
        pictures.append(_figure(figures.agreement_tables(tables, f"artifacts-{number}"), caption))
    return pictures


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


def _figure(svg: str, caption: str) -> Markup:
    return Markup("<figure><div>{}</div><figcaption>{}</figcaption></figure>").format(Markup(svg), caption)


def _shapes(run: Run, pruning: Pruning) -> list[dict[str, Any]]:
    before = pruning.source or run.shape("corrected_teacher") or run.shape("teacher")
    after = pruning.target or run.shape("student_pruned") or run.shape("distilled")
    if before is None or after is None:
        return []
    measures = {name: (getattr(before, name), getattr(after, name)) for name in (*before.prunable_dims, "kv_channels")}
    measures |= {
        "padded_vocab_size": (before.padded_vocab_size, after.padded_vocab_size),
        "parameters": (before.num_parameters, after.num_parameters),
        "parameters without embeddings": (before.num_non_embedding_parameters, after.num_non_embedding_parameters),
        "FLOPs per token, forward": (_flops(before), _flops(after)),
        "KV cache, bytes per token (bf16)": (before.kv_bytes_per_token(), after.kv_bytes_per_token()),
    }
    return [{"name": name, "before": old, "after": new, "changed": old != new} for name, (old, new) in measures.items()]


def _flops(shape: ModelShape) -> int:
    return shape.flops_per_token(shape.seq_length)


def _versions(run: Run) -> tuple[str, dict[str, str]]:
    """A sentence on the versions, and those that every artifact shares."""
    found = [artifact.manifest.get("versions", {}) for artifact in run.artifacts.values()]
    common = {name: version for name, version in found[0].items() if all(other.get(name) == version for other in found)}
    if any(other != common for other in found):
        return "Not every stage ran with the same versions; those that differ stand with their stage.", common
    return f"Every stage ran with {_listed(common)}.", common


def _listed(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))


def _provenance(name: str, artifact: Artifact, common: dict[str, str]) -> dict[str, Any]:
    manifest = artifact.manifest
    own = {key: version for key, version in manifest.get("versions", {}).items() if common.get(key) != version}
    return {
        "name": name,
        "stage": artifact.stage,
        "seconds": f"{rows.seconds_of(artifact) or 0:,.1f}",
        "digest": artifact.digest,
        "inputs": manifest.get("inputs", []),
        "versions": _listed(own),
        "metrics": json.dumps(artifact.metrics, indent=2, sort_keys=True, default=str),
        "config": json.dumps(manifest.get("config", {}), indent=2, sort_keys=True, default=str),
    }


def write_report(run: Run, into: Path) -> dict[str, Any]:
    """Write report.html and summary.json into a directory; returns the summary."""
    values = rows.summarize(run)
    (into / "report.html").write_text(render(run, values), encoding="utf-8")
    (into / "summary.json").write_text(json.dumps(values, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    return values

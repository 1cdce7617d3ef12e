"""What a prune config leaves open, and how it is settled for a model."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from minitron_nemo.config.pruning import BudgetConfig, CompensationConfig, SurgeryConfig
from minitron_nemo.config.stages import PruneConfig
from minitron_nemo.scores import NORM, STREAM, Importance
from minitron_nemo.shape import ModelShape
from minitron_nemo.stages.settling import settle
from support.megatron import TINY, smaller
from support.plans import random_scores
from support.ranks import Ranks
from support.tiny_run import TinyRun

TIED = smaller(TINY, share_embeddings_and_output_weights=True, hidden_size=32, num_attention_heads=4)
BUDGET = BudgetConfig(parameters=str(TIED.num_parameters * 3 // 4), dims={"hidden_size": 1.0})


def settled(shape: ModelShape = TIED, **surgery: Any) -> SurgeryConfig:
    return SurgeryConfig(method="calibrated", **surgery).settled(shape, smaller(shape, hidden_size=24))


def test_calibrated_surgery_is_a_sequential_refit_and_keeps_a_tie() -> None:
    untied = settled(smaller(TIED, share_embeddings_and_output_weights=False))
    assert (untied.basis, untied.is_sequential) == ("rotation", True)
    assert (settled().basis, settled().is_sequential) == ("channels", True)
    assert settled(basis="rotation").turns
    assert settled(norm_scale="none").is_sequential and settled(norm_scale="size").is_sequential


@pytest.mark.parametrize("asked", [{"compensate": True}, {"correct_depth": True}, {"norm_scale": "energy"}])
def test_what_is_asked_for_beside_it_takes_its_place(asked: dict[str, Any]) -> None:
    surgery = settled(**asked)
    assert not surgery.is_sequential
    assert surgery.compensates(TIED, smaller(TIED, ffn_hidden_size=20))
    with pytest.raises(ValueError, match=r"surgery\.refit=sequential, which fits weights and norms itself"):
        settled(**asked, refit="sequential")


def test_channels_of_a_layernorm_model_are_compensated_for() -> None:
    shape = smaller(TIED, normalization="LayerNorm")
    surgery = settled(shape)
    assert (surgery.basis, surgery.is_sequential, surgery.scales_norms_by) == ("channels", False, "energy")
    whole = SurgeryConfig(method="calibrated").settled(shape, smaller(shape, ffn_hidden_size=20))
    assert whole.is_sequential, "where no channel goes, nothing is in the way"


def scored(stream: Tensor | None) -> Importance:
    """Random scores, beside a stream of these second moments [h, h]."""
    importance = random_scores(TIED)
    if stream is None:
        return importance
    norm = stream.diagonal().expand(2 * TIED.num_layers + 1, -1)
    return dataclasses.replace(importance, moments={**importance.moments, STREAM: stream, NORM: norm})


def axes_off_the_channels(rank: int) -> Tensor:
    """All of the stream in a few directions that hold a share of every channel each, and a little of everything."""
    directions = torch.randn(TIED.hidden_size, rank, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return directions @ directions.T + 0.02 * torch.eye(TIED.hidden_size, dtype=torch.float64)


@pytest.mark.parametrize(
    ("stream", "basis", "words"),
    [
        (axes_off_the_channels(8), "rotation", r"They are parted\. prune\.surgery\.basis=channels says otherwise"),
        (torch.eye(TIED.hidden_size, dtype=torch.float64), "channels", r"They stay tied\. prune\.surgery\.basis=rotat"),
        (None, "channels", r"estimated with estimate_importance\.importance\.stream=normalised"),
    ],
    ids=["few axes", "all alike", "not measured"],
)
def test_a_budget_of_parameters_says_whether_a_tie_is_worth_keeping(
    stream: Tensor | None, basis: str, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    config = PruneConfig(budget=BUDGET, surgery=SurgeryConfig(method="calibrated"))
    made, target, _ = settle(config, scored(stream), TIED)
    assert made.surgery.basis == basis
    assert target.share_embeddings_and_output_weights == (basis == "channels")
    alike = {"hidden_size": TIED.hidden_size, "share_embeddings_and_output_weights": True}
    assert dataclasses.replace(target, **alike) == TIED, "nothing else pays for a second table"
    assert 0.85 < target.num_parameters / (TIED.num_parameters * 0.75) <= 1.01
    assert re.search(words, caplog.text) and f"prune.budget.parameters={BUDGET.parameters}" in caplog.text


@pytest.mark.parametrize(
    "said",
    [
        {"surgery": SurgeryConfig(method="calibrated", basis="channels"), "budget": BUDGET},
        {"surgery": SurgeryConfig(), "budget": BUDGET},
        {"surgery": SurgeryConfig(method="calibrated"), "target": {"hidden_size": 24}},
        {
            "surgery": SurgeryConfig(method="calibrated"),
            "target": {"hidden_size": 24},
            "budget": BudgetConfig(parameters="20K", dims={"ffn_hidden_size": 1.0}),
        },
        {
            "surgery": SurgeryConfig(method="calibrated"),
            "budget": BudgetConfig(parameters="3.9K", dims={"hidden_size": 1.0}),
        },
        {
            "surgery": SurgeryConfig(method="calibrated"),
            "budget": BudgetConfig(non_embedding_parameters="9K", dims={"hidden_size": 1.0}),
        },
    ],
    ids=[
        "basis",
        "papers' method",
        "target",
        "budget of the FFN",
        "no budget for two tables",
        "budget without embeddings",
    ],
)
def test_a_tie_stays_where_nothing_compares(said: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    made, target, _ = settle(PruneConfig(**said), scored(axes_off_the_channels(8)), TIED)
    assert not made.surgery.turns and target.share_embeddings_and_output_weights
    assert "tied" not in caplog.text


def test_a_second_table_is_paid_for_by_axes_alone() -> None:
    shape = smaller(TIED, padded_vocab_size=512)  # a table is a third of all
    budget = BudgetConfig(parameters=str(shape.num_parameters * 3 // 4))
    config = PruneConfig(budget=budget, surgery=SurgeryConfig(method="calibrated"))
    unscored = random_scores(TIED).scores("hidden", "l2", "mean").argsort()[:6]
    off_the_kept = torch.full((TIED.hidden_size,), 0.01, dtype=torch.float64).index_fill(0, unscored, 1.0).diag()
    streams = torch.eye(TIED.hidden_size, dtype=torch.float64), off_the_kept
    importances = (dataclasses.replace(scored(stream), shape=shape) for stream in streams)
    tied, parted = (settle(config, importance, shape)[1] for importance in importances)
    assert tied.share_embeddings_and_output_weights and not parted.share_embeddings_and_output_weights
    assert parted.hidden_size < tied.hidden_size < shape.hidden_size
    assert parted.ffn_hidden_size == tied.ffn_hidden_size, "which a budget would shrink too"


@pytest.mark.parametrize(
    ("surgery", "shape", "words"),
    [
        ({"compensation": CompensationConfig(num_samples=8)}, TIED, r"prune\.surgery\.compensation: not read by a seq"),
        ({}, smaller(TIED, normalization="LayerNorm"), r"is refit=none here: a LayerNorm"),
        ({}, TIED, None),
        ({"compensation": CompensationConfig(num_samples=8), "refit": "none"}, TIED, None),
    ],
    ids=["settings of the other way", "LayerNorm", "nothing", "the other way"],
)
def test_what_a_method_does_not_read_or_cannot_do_is_said(
    surgery: dict[str, Any], shape: ModelShape, words: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    config = PruneConfig(target={"hidden_size": 24}, surgery=SurgeryConfig(method="calibrated", **surgery))
    settle(config, random_scores(shape), shape)
    assert re.search(words, caplog.text) if words else not caplog.text


def prune_tied(model: str, importance: str, data: str, output: str) -> tuple[bool, bool, list[dict[str, Any]]]:
    from minitron_nemo.config.trainer import Calibrating
    from minitron_nemo.stages import prune

    student = prune.run(
        PruneConfig(
            model=model,
            importance=importance,
            target={"hidden_size": 24},
            surgery=SurgeryConfig(method="calibrated"),
            trainer=Calibrating(precision="fp32", micro_batch_size=1),
            output=output,
        )
    )
    plan = prune.PruningPlan.load(student.path)
    return plan.has_basis, plan.target.share_embeddings_and_output_weights, student.facts["sequential_refit"]


def test_a_tied_model_is_refitted_on_its_channels(ranks: Ranks, tiny_tied_run: TinyRun, tmp_path: Any) -> None:
    run = tiny_tied_run
    given = run.teacher, run.importance, run.data, str(tmp_path / "student")
    ((turned, tied, places),) = ranks("single").run(prune_tied, *given)
    assert not turned and tied
    assert all(place["error"] < place["plain_error"] for place in places)

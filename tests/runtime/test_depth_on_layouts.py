"""Depth scores through the engine: a task's accuracy, all metrics together, and layers dropped one after another."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from torch import Tensor
from torch.testing import assert_close

from minitron_nemo.config.data import DataConfig
from minitron_nemo.config.importance import DEPTH_METRICS, DepthConfig, GreedyConfig, ImportanceConfig
from minitron_nemo.config.trainer import TrainerConfig
from minitron_nemo.importance.depth import DepthScores
from minitron_nemo.runtime.depth_sweep import estimate_depth, greedy_layers
from minitron_nemo.scores import Importance
from minitron_nemo.stages import estimate_importance
from minitron_nemo.text.questions import Question, read_questions
from support.depth_by_hand import costs_by_hand, whole_logits, without_layers
from support.megatron import TINY, build_gpt
from support.ranks import Ranks, current_layout
from support.tiny_run import TinyRun, trainer_values

SHAPE = dataclasses.replace(TINY, init_method_std=0.1)  # 4 layers
ALPHABET = " abcdefghijklmnopqrstuvwxyz."
SIZES = [1, 2]
SUBJECTS = ["cat", "old dog", "bird"]


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> list[Question]:
    """Of two and three options, of different length, with and without a blank."""
    records = [
        {"context": f"the _ {verb} {thing}.", "blank": "_", "options": SUBJECTS[: 2 + number % 2], "answer": number % 2}
        for number, (verb, thing) in enumerate(
            [("saw", "the sun"), ("ate", "the fish"), ("hid", "the key"), ("is", "the best")]
        )
    ]
    records += [{"context": f"who {verb}", "options": SUBJECTS, "answer": 2} for verb in ("ran", "slept in the hay")]
    path = tmp_path_factory.mktemp("task") / "task.jsonl"
    path.write_text("\n".join(json.dumps(record) for record in records))
    return read_questions(
        path, lambda text: [1 + ALPHABET.index(letter) for letter in text], prefix=0, seq_length=SHAPE.seq_length
    )


def make_batches(dp_rank: int = 0, dp_size: int = 1) -> list[dict[str, Tensor]]:
    """Four samples, two a micro-batch; a data-parallel rank takes its share."""
    text = torch.randint(SHAPE.padded_vocab_size, (4, 9), generator=torch.Generator().manual_seed(3))
    samples = {
        "tokens": text[:, :-1].contiguous(),
        "labels": text[:, 1:].contiguous(),
        "loss_mask": torch.ones(4, 8),
        "position_ids": torch.arange(8).repeat(4, 1),
    }
    share = {name: tensor[dp_rank::dp_size] for name, tensor in samples.items()}
    return [{name: tensor[start : start + 2] for name, tensor in share.items()} for start in range(0, 4 // dp_size, 2)]


def run(questions: list[Question], normalize: bool = False) -> tuple[DepthScores, list[int], list[int]]:
    """Scores, and the orders of dropping by loss and by accuracy, on the current layout."""
    model = build_gpt(SHAPE)
    batches = make_batches(parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size())
    config = DepthConfig(
        metrics=["accuracy", "block_influence", "squared_error"], block_sizes=SIZES, task="given", normalize=normalize
    )
    task: dict[str, Any] = {"questions": questions, "micro_batch_size": 3}
    scores = estimate_depth(model, SHAPE, batches, config, **task, total=len(batches))
    loss, right = GreedyConfig(metric="loss", drop=3), GreedyConfig(metric="accuracy", drop=2)
    by_loss = greedy_layers(model, SHAPE, batches, DepthConfig(greedy=loss))
    by_task = greedy_layers(model, SHAPE, batches, DepthConfig(greedy=right, task="given"), **task)
    return scores, by_loss, by_task


def accuracy_by_hand(questions: list[Question], gone: set[int], *, normalize: bool = False) -> float:
    """One option at a time, unpadded."""
    model, correct = without_layers(SHAPE, gone), 0
    for question in questions:
        likelihoods = []
        for option in question.options:
            logs = whole_logits(model, torch.tensor([option.tokens[:-1]]))[0].log_softmax(-1)
            first = len(option.tokens) - option.num_scored
            total = sum(float(logs[place - 1, option.tokens[place]]) for place in range(first, len(option.tokens)))
            likelihoods.append(total / option.num_characters if normalize else total)
        correct += likelihoods.index(max(likelihoods)) == question.answer
    return correct / len(questions)


def accuracy_drops_by_hand(questions: list[Question], dropped: set[int], **options: Any) -> dict[int, Tensor]:
    full = accuracy_by_hand(questions, set(), **options)
    return {
        size: torch.tensor(
            [
                full - accuracy_by_hand(questions, dropped | set(range(start, start + size)), **options)
                for start in range(SHAPE.num_layers - size + 1)
            ]
        )
        for size in SIZES
    }


def loss_by_hand(gone: set[int]) -> float:
    """Of the model without these layers, less the whole one's."""
    samples = {name: torch.cat([batch[name] for batch in make_batches()]) for name in ("tokens", "labels", "loss_mask")}
    full = whole_logits(build_gpt(SHAPE), samples["tokens"])
    removed = whole_logits(without_layers(SHAPE, gone), samples["tokens"])
    costs = costs_by_hand(full, removed, samples["labels"], samples["loss_mask"], SHAPE.padded_vocab_size)
    return costs["loss"]


@pytest.mark.parametrize("normalize", [False, True])
def test_accuracy_drop_equals_questions_asked_one_by_one(questions: list[Question], normalize: bool) -> None:
    scores, _, _ = run(questions, normalize)
    expected = accuracy_drops_by_hand(questions, set(), normalize=normalize)
    assert list(scores) == ["accuracy", "block_influence", "squared_error"]
    for size in SIZES:
        assert_close(scores["accuracy"][size], expected[size], rtol=0, atol=1e-6)
    assert len({float(value) for values in expected.values() for value in values}) > 2  # removals tell apart


def test_layers_are_dropped_by_what_the_model_without_the_others_loses(questions: list[Question]) -> None:
    _, by_loss, by_task = run(questions)
    dropped: list[int] = []
    for _ in range(3):
        remaining = set(range(SHAPE.num_layers)) - set(dropped)
        dropped.append(min(remaining, key=lambda layer: loss_by_hand({*dropped, layer})))
    assert by_loss == dropped
    alone = estimate_depth(build_gpt(SHAPE), SHAPE, make_batches(), DepthConfig(metrics=["loss"]))["loss"][1]
    assert by_loss != alone.argsort()[:3].tolist()  # another order than without scoring again
    dropped = []
    for _ in range(2):
        drops = accuracy_drops_by_hand(questions, set(dropped))[1]
        dropped.append(min(set(range(SHAPE.num_layers)) - set(dropped), key=lambda layer: float(drops[layer])))
    assert by_task == dropped


@pytest.mark.parametrize("layout", ["tp2-sp", "pp2", "dp2"])
def test_scores_and_drops_are_the_same_on_every_layout(ranks: Ranks, questions: list[Question], layout: str) -> None:
    expected, by_loss, by_task = run(questions)
    for scores, rank_by_loss, rank_by_task in ranks(layout).run(run, questions):
        assert (rank_by_loss, rank_by_task) == (by_loss, by_task)
        for metric, by_size in expected.items():
            for size, values in by_size.items():
                # accuracies are counts: equal, unless two options are equally likely up to rounding
                assert_close(scores[metric][size], values, rtol=1e-5, atol=1e-7, msg=f"{metric} {size} on {layout}")


def test_the_order_of_dropping_is_a_score_of_layers_that_leaves_out_the_protected() -> None:
    model, batches = build_gpt(SHAPE), make_batches()
    greedy = GreedyConfig(metric="loss", drop=2, keep_first=1)
    scores = estimate_depth(model, SHAPE, iter(batches), DepthConfig(metrics=["kl"], greedy=greedy))
    assert_close(scores["kl"], estimate_depth(model, SHAPE, batches, DepthConfig(metrics=["kl"]))["kl"])
    first = min({1, 2, 3}, key=lambda layer: loss_by_hand({layer}))
    second = min({1, 2, 3} - {first}, key=lambda layer: loss_by_hand({first, layer}))
    expected = torch.full((4,), 2.0)
    expected[first], expected[second] = 0, 1
    assert scores["greedy"].keys() == {1} and torch.equal(scores["greedy"][1], expected)


def test_dropping_more_layers_than_a_model_can_lose_is_an_error() -> None:
    model = build_gpt(SHAPE)
    for values, most in (({"drop": 4}, 3), ({"drop": 2, "keep_first": 2, "keep_last": 1}, 1)):
        config = DepthConfig(greedy=GreedyConfig(metric="loss", **values))
        with pytest.raises(ValueError, match=f"cannot be dropped of 4, .*: at most {most} can, as one must stay"):
            greedy_layers(model, SHAPE, make_batches(), config)


# ---- the stage -------------------------------------------------------------------------------------------------------


def run_stage(run: TinyRun, task: str, output: str) -> dict[str, Any]:
    """The importance artifact with every depth metric, on the current layout; its metrics."""
    layout = current_layout()
    artifact = estimate_importance.run(
        estimate_importance.EstimateImportanceConfig(
            model=run.teacher,
            importance=ImportanceConfig(num_samples=2),
            depth=DepthConfig(
                metrics=list(DEPTH_METRICS),
                block_sizes=SIZES,
                greedy=GreedyConfig(metric="kl", drop=2),
                num_samples=4,
                task=task,
            ),
            trainer=TrainerConfig(**trainer_values(pipeline_model_parallel_size=layout.pp)),
            data=DataConfig(prepared=run.data),
            output=output,
        )
    )
    return artifact.metrics


def test_the_stage_writes_every_depth_metric(ranks: Ranks, tiny_run: TinyRun, tmp_path: Path) -> None:
    task = tmp_path / "task.jsonl"
    task.write_text('{"context": "import _ as system", "options": ["os", "sys"], "answer": "os", "blank": "_"}\n')
    found = {}
    for layout in ("single", "pp2"):
        output = str(tmp_path / layout)
        metrics, *_ = ranks(layout).run(run_stage, tiny_run, str(task), output)
        assert (metrics["depth_samples"], metrics["depth_questions"]) == (4, 1)
        found[layout] = Importance.load(output)
    expected = found["single"]
    assert set(expected.depth) == {*DEPTH_METRICS, "greedy"}
    assert sorted(expected.layer_scores("greedy").tolist()) == [0, 1, 2, 2]
    assert expected.depth_samples == dict.fromkeys(DEPTH_METRICS, 4) | {"accuracy": 1}  # an order is no mean
    sizes = {"block_influence": [1, 2, 3], "greedy": [1]}
    for metric, by_size in expected.depth.items():
        assert sorted(by_size) == sizes.get(metric, SIZES)
        assert torch.equal(expected.layer_scores(metric), by_size[1])
        for size, values in by_size.items():
            assert_close(found["pp2"].depth[metric][size], values, rtol=1e-5, atol=2e-6, msg=f"{metric} {size}")

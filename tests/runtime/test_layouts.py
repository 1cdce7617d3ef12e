"""Whatever the layout, a stage makes the same artifact: trained, scored, pruned, evaluated on two ranks as on one."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from minitron_nemo.aggregation import Aggregation
from minitron_nemo.config.data import DataConfig
from minitron_nemo.config.distillation import DistillationConfig, HiddenStateConfig
from minitron_nemo.config.importance import ImportanceConfig
from minitron_nemo.config.trainer import Layout, TrainerConfig
from minitron_nemo.config.training import OptimConfig, TrainingConfig
from minitron_nemo.runtime.distributed_checkpoint import CONTENT, save_weights
from minitron_nemo.scores import Importance
from minitron_nemo.stages import distill, estimate_importance, evaluate, pretrain, prune
from support.megatron import TINY, build_gpt
from support.ranks import Ranks, current_layout
from support.tiny_run import TARGET, TinyRun, read_weights, trainer_values

LAYOUTS = ["tp2", "pp2", "dp2", "tp2-sp"]
STEPS = 3
LOSS_TOLERANCE = 1e-4  # float32 sums in another order, for three steps
GRAD_NORM_TOLERANCE = 1e-4  # relative, for the same reason
WEIGHT_TOLERANCE = (
    1e-3  # of training's largest change to the parameter; Adam divides small gradients' noise by their size
)
EVALUATION_TOLERANCE = 1e-5  # float32 sums in another order, without training


def trainer(**values: Any) -> TrainerConfig:
    """The trainer of the layout this rank was started for."""
    layout = current_layout()
    return TrainerConfig(
        **trainer_values(
            tensor_model_parallel_size=layout.tp,
            pipeline_model_parallel_size=layout.pp,
            context_parallel_size=layout.cp,
            sequence_parallel=layout.sequence_parallel,
            **values,
        )
    )


def training() -> TrainingConfig:
    return TrainingConfig(steps=STEPS, checkpoint_every=0, optim=OptimConfig(lr=1e-2, min_lr=1e-3, warmup_steps=1))


# ---- what runs on the ranks ------------------------------------------------------------------------------------------


def run_distill(
    run: TinyRun,
    output: str,
    distillation: DistillationConfig | None = None,
    memory: dict[str, Any] | None = None,
    **data: Any,
) -> None:
    distill.run(
        distill.DistillConfig(
            teacher=run.teacher,
            student=run.student,
            distillation=distillation or DistillationConfig(),
            trainer=trainer(**memory or {}),
            offload_teacher=memory is not None,
            training=training(),
            data=DataConfig(prepared=run.data, **data),
            output=output,
        )
    )


def run_distill_hidden_states(run: TinyRun, output: str) -> None:
    """Every block's output and the embedding beside the logits, projected as the plan of the student says."""
    hidden = HiddenStateConfig(enabled=True, mapping="plan", projection_init="plan")
    run_distill(run, output, DistillationConfig(cross_entropy_weight=0.1, hidden_states=hidden))


def run_distill_documents(run: TinyRun, output: str) -> None:
    """Documents of a sample do not see each other; the hidden states and cross-entropy go by the same tokens."""
    hidden = HiddenStateConfig(enabled=True, places=["embedding", "block_output"], k=0)
    config = DistillationConfig(cross_entropy_weight=0.1, hidden_states=hidden)
    run_distill(run, output, config, reset_at_documents=True, pad_documents_to=4)


def run_pretrain(run: TinyRun, output: str) -> None:
    """Plain cross-entropy, from the pruned student."""
    pretrain.run(
        pretrain.PretrainConfig(
            initial=run.student,
            trainer=trainer(),
            training=training(),
            data=DataConfig(prepared=run.data),
            output=output,
        )
    )


def run_importance(run: TinyRun, output: str) -> None:
    estimate_importance.run(
        estimate_importance.EstimateImportanceConfig(
            model=run.teacher,
            importance=ImportanceConfig(num_samples=8),
            trainer=trainer(),
            data=DataConfig(prepared=run.data),
            output=output,
        )
    )


def run_prune(run: TinyRun, output: str, rounds: int = 1) -> None:
    prune.run(
        prune.PruneConfig(
            model=run.teacher,
            importance=run.importance,
            target=TARGET,
            rounds=rounds,
            trainer=trainer(),
            output=output,
        )
    )


def run_evaluate(run: TinyRun, output: str) -> float:
    artifact = evaluate.run(
        evaluate.EvaluateConfig(
            model=run.teacher, num_samples=7, trainer=trainer(), data=DataConfig(prepared=run.data), output=output
        )
    )
    return artifact.metrics["held_out_loss"]


# ---- the claims ------------------------------------------------------------------------------------------------------

TRAININGS: dict[str, Callable[[TinyRun, str], None]] = {
    "distill": run_distill,
    "distill tied": run_distill_hidden_states,
    "distill documents": run_distill_documents,
    "pretrain": run_pretrain,
}


class OneRank:
    """What one process makes of the same inputs; each once."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.made: dict[str, str] = {}

    def train(self, what: str, run: TinyRun) -> str:
        if what not in self.made:
            self.made[what] = str(run.directory / f"single {what}")
            self.ranks("single").run(TRAININGS[what], run, self.made[what])
        return self.made[what]

    def weights(self, path: str) -> dict[str, Tensor]:
        [weights] = self.ranks("single").run(read_weights, path)
        return weights


@pytest.fixture(scope="module")
def one_rank(ranks: Ranks) -> OneRank:
    return OneRank(ranks)


def history(path: str, key: str) -> list[float]:
    records = [json.loads(line) for line in (Path(path) / "history.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    return [record[key] for record in records]


@pytest.mark.parametrize(
    ("what", "layout"),
    [
        ("distill", "tp2"),
        ("distill", "pp2"),
        ("distill", "dp2"),
        ("distill", "tp2-sp"),
        ("distill tied", "pp2"),  # two stages hold the table and add its gradient up
        ("distill documents", "tp2-pp2"),
        ("pretrain", "tp2"),
        ("pretrain", "pp2"),
    ],
)
def test_training_takes_the_same_steps_on_every_layout(
    ranks: Ranks, tiny_run: TinyRun, one_rank: OneRank, request: pytest.FixtureRequest, what: str, layout: str
) -> None:
    run = request.getfixturevalue("tiny_tied_run") if what == "distill tied" else tiny_run
    expected, output = one_rank.train(what, run), str(run.directory / f"{layout} {what}")
    ranks(layout).run(TRAININGS[what], run, output)

    torch.testing.assert_close(history(output, "loss"), history(expected, "loss"), rtol=0, atol=LOSS_TOLERANCE)
    torch.testing.assert_close(
        history(output, "grad_norm"), history(expected, "grad_norm"), rtol=GRAD_NORM_TOLERANCE, atol=0
    )
    assert history(output, "lr") == history(expected, "lr")
    before, wanted = one_rank.weights(run.student), one_rank.weights(expected)
    for name, tensor in one_rank.weights(output).items():
        change = (wanted[name] - before[name]).abs().max()
        assert change > 0, f"training left {name} as it was"
        assert (tensor - wanted[name]).abs().max() <= WEIGHT_TOLERANCE * change, f"{name} on {layout}"


@pytest.mark.parametrize(
    ("layout", "memory"),
    [
        ("single", {"recompute_granularity": "full"}),
        ("single", {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "mlp"]}),
        ("tp2-sp", {"recompute_granularity": "full", "recompute_num_layers": 2}),
    ],
)
def test_what_saves_memory_changes_no_loss(
    ranks: Ranks, tiny_run: TinyRun, one_rank: OneRank, layout: str, memory: dict[str, Any]
) -> None:
    """Activations formed again in backward, and the teacher's layers in host memory."""
    expected, output = one_rank.train("distill", tiny_run), str(tiny_run.directory / f"{layout} {memory}")
    ranks(layout).run(run_distill, tiny_run, output, None, memory)
    tolerance = LOSS_TOLERANCE if layout != "single" else 0
    torch.testing.assert_close(history(output, "loss"), history(expected, "loss"), rtol=0, atol=tolerance)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_importance_scores_are_the_same_on_every_layout(ranks: Ranks, tiny_run: TinyRun, layout: str) -> None:
    output = str(tiny_run.directory / f"{layout} importance")
    ranks(layout).run(run_importance, tiny_run, output)
    found, expected = Importance.load(output), Importance.load(tiny_run.importance)
    assert found.num_samples == expected.num_samples
    for axis in expected.axes:
        for pair in itertools.product(Aggregation, Aggregation):
            tensor = expected.scores(axis, *pair)
            # variances subtract: their error is of the size of the largest
            torch.testing.assert_close(
                found.scores(axis, *pair), tensor, rtol=1e-4, atol=1e-5 * float(tensor.max()), msg=f"{axis} {pair}"
            )


@pytest.mark.parametrize("layout", ["tp2", "pp2"])
def test_pruning_on_two_ranks_gives_the_same_student_to_the_bit(
    ranks: Ranks, tiny_run: TinyRun, one_rank: OneRank, layout: str
) -> None:
    output = str(tiny_run.directory / f"{layout} student")
    ranks(layout).run(run_prune, tiny_run, output)
    expected, found = one_rank.weights(tiny_run.student), one_rank.weights(output)
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_pruning_in_rounds_is_the_same_on_a_split_model(ranks: Ranks, tiny_run: TinyRun, one_rank: OneRank) -> None:
    found = []
    for layout in ("single", "tp2"):
        output = str(tiny_run.directory / f"{layout} student of two rounds")
        ranks(layout).run(run_prune, tiny_run, output, 2)
        found.append(one_rank.weights(output))
    assert list(found[0]) == list(found[1])
    for name, tensor in found[0].items():
        assert torch.equal(found[1][name], tensor), name


def test_held_out_loss_is_the_same_on_every_layout(ranks: Ranks, tiny_run: TinyRun) -> None:
    """Seven samples: where two ranks share them, one gets a sample that must not count."""
    [expected] = ranks("single").run(run_evaluate, tiny_run, str(tiny_run.directory / "single evaluation"))
    for layout in LAYOUTS:
        losses = ranks(layout).run(run_evaluate, tiny_run, str(tiny_run.directory / f"{layout} evaluation"))
        assert losses == pytest.approx([expected] * 2, rel=0, abs=EVALUATION_TOLERANCE), layout


def save_a_model(directory: Path) -> dict[str, Any]:
    """How a layer is named, as it is told to every model that is saved, once one was."""
    save_weights(build_gpt(TINY), directory)
    return CONTENT


def test_a_saved_model_leaves_nothing_of_its_layout_to_the_next(ranks: Ranks, tmp_path: Path) -> None:
    for content in ranks("dp2").run(save_a_model, tmp_path):
        assert content == CONTENT


def test_every_parallel_size_of_a_layout_is_megatrons_under_the_same_name() -> None:
    known = inspect.signature(parallel_state.initialize_model_parallel).parameters
    for name in Layout().sizes:
        assert name in known and hasattr(parallel_state, f"get_{name.removesuffix('_size')}_world_size"), name
    assert set(Layout().of_model) <= {field.name for field in dataclasses.fields(TransformerConfig)}

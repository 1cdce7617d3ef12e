"""What cannot work is said by its value, its limit and its mend before a model is built, and what changes is said."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from minitron_nemo.checks import Mistake
from minitron_nemo.config.distillation import DistillationConfig, HiddenStateConfig
from minitron_nemo.config.stages import DistillConfig, PretrainConfig
from minitron_nemo.config.trainer import Layout, TrainerConfig
from minitron_nemo.config.training import OptimConfig, TrainingConfig
from minitron_nemo.layer_spec import layers_by_stage
from minitron_nemo.nemo.history import History
from minitron_nemo.plan import PruningPlan
from minitron_nemo.runtime.layout import prepare_layout
from minitron_nemo.stages.distill import plan_of_both
from minitron_nemo.stages.training import continue_only_the_same, require_recomputed_layers
from support.megatron import TINY
from support.tiny_run import TinyRun

SIX = dataclasses.replace(TINY, num_layers=6)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"recompute_num_layers": 7}, r"recompute_num_layers=7 .*uniform does not fit the 6 layers.* 1, 2, 3, 6\."),
        ({"recompute_num_layers": 4}, r"There it can be 1, 2, 3, 6\."),
        ({"recompute_num_layers": 7, "recompute_method": "block"}, r"There it can be 1, 2, 3, 4, 5, 6\."),
        ({"recompute_num_layers": 3, "pipeline_model_parallel_size": 4}, r"the [12] layers of a pipeline stage \(6 "),
    ],
)
def test_more_layers_recomputed_together_than_there_are(values: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        require_recomputed_layers(SIX, TrainerConfig(recompute_granularity="full", **values))  # type: ignore[arg-type]
    require_recomputed_layers(SIX, TrainerConfig(recompute_granularity="full", recompute_num_layers=3))
    require_recomputed_layers(SIX, TrainerConfig(recompute_num_layers=7))  # not read


def test_how_many_layers_stages_have() -> None:
    found = [layers_by_stage(*each) for each in ((6, 2), (6, 4), (7, 2), (9, 4))]
    assert found == [[3, 3], [1, 2, 2, 1], [4, 3], [2, 3, 3, 1]]


@pytest.mark.parametrize(
    ("layout", "length", "said"),
    [
        ({"context_parallel_size": 2}, 10, r"trainer.seq_length=10 cannot be split .*2 x trainer.context.*=4.* 8, 12"),
        (
            {"tensor_model_parallel_size": 2, "sequence_parallel": True},
            9,
            r"trainer.seq_length=9 leaves a rank 9 tokens, .*multiple of 2\.",
        ),
    ],
)
def test_a_sequence_that_does_not_split(layout: dict[str, object], length: int, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        prepare_layout(Layout(**layout), TINY, seq_length=length)  # type: ignore[arg-type]


def test_a_plan_of_other_models_is_refused_where_hidden_losses_go_by_it(tiny_run: TinyRun) -> None:
    plan, path = PruningPlan.load(tiny_run.student), Path(tiny_run.student)
    hidden = HiddenStateConfig(enabled=True, mapping="plan")
    config = DistillConfig(teacher="t", student="s", distillation=DistillationConfig(hidden_states=hidden))
    deeper = dataclasses.replace(plan.source, num_layers=5)
    wider = dataclasses.replace(plan.target, ffn_hidden_size=56)
    assert plan_of_both(config, path, plan.source, plan.target).layer.equal(plan.layer)
    with pytest.raises(Mistake, match=r"is of another teacher: its num_layers is 4, and that of distill.teacher=t 5"):
        plan_of_both(config, path, deeper, plan.target)
    with pytest.raises(Mistake, match=r"another student: its ffn_hidden_size is 48, and that of distill.student=s 56"):
        plan_of_both(config, path, plan.source, wider)
    unread = dataclasses.replace(config, distillation=DistillationConfig())
    plan_of_both(unread, path, deeper, wider)  # the student's own, which nothing goes by
    with pytest.raises(Mistake, match="is of another teacher"):
        plan_of_both(dataclasses.replace(unread, plan=str(path)), path, deeper, plan.target)


def test_a_last_line_of_the_history_that_was_cut_off_is_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "history.jsonl"
    lines = [json.dumps({"step": step, "loss": 1.0}) for step in (1, 2, 3)]
    history = History(file, label="x", steps=9, tokens_per_step=1, flops_per_step=1)
    file.write_text("\n".join([*lines[:2], lines[2][:-7]]))
    assert [record["step"] for record in history.kept(9)] == [1, 2]
    assert f"The last line of {file} was cut off" in capsys.readouterr().err
    file.write_text("\n".join([lines[0], lines[1][:-7], lines[2]]))
    with pytest.raises(Mistake, match=r"cannot be read at line 2 of 3"):
        history.kept(9)


def test_a_rate_that_bends_later_is_said_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def config(steps: int) -> PretrainConfig:
        optim = OptimConfig(lr=1e-2, min_lr=1e-3, warmup_steps=3)
        return PretrainConfig(initial="m", training=TrainingConfig(steps=steps, optim=optim))

    (tmp_path / "checkpoints" / "step-2").mkdir(parents=True)  # in the warm-up, which knows no length
    continue_only_the_same(tmp_path, config(40))
    continue_only_the_same(tmp_path, config(20))
    said = capsys.readouterr().err
    assert "after step 2 with training.steps=20 instead of 40" in said and "leaves the one it would have had" in said

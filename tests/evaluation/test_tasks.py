"""Tasks of lm_eval: the same numbers on a Hugging Face folder and on our checkpoint, on any layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from minitron_nemo.config.trainer import TrainerConfig
from minitron_nemo.stages import evaluate
from support.local_tasks import write_tasks
from support.ranks import Ranks, current_layout
from support.tiny_run import TinyRun, trainer_values


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_tasks(tmp_path_factory.mktemp("tasks"))


def evaluate_on(model: str, output: str, tasks: list[str], **options: Any) -> dict[str, Any]:
    layout = current_layout()
    values = trainer_values(tensor_model_parallel_size=layout.tp, pipeline_model_parallel_size=layout.pp) | {
        "micro_batch_size": 2
    }
    config = evaluate.EvaluateConfig(
        model=model,
        tasks=tasks,
        output=output,
        batch_size=3,
        trainer=TrainerConfig(**values),
        **({"num_samples": 0} | options),
    )
    return evaluate.run(config).metrics


def test_both_paths_and_all_layouts_give_the_same_numbers(
    ranks: Ranks, tiny_run: TinyRun, tasks: dict[str, Path], tmp_path: Path
) -> None:
    files = [str(file) for file in tasks.values()]
    [expected] = ranks("single").run(evaluate_on, str(tiny_run.hf), str(tmp_path / "hf"), files)
    assert set(expected["tasks"]) == {"local_choice", "local_whole", "local_answer"}
    assert expected["tasks"]["local_choice"]["num_fewshot"] == 2
    whole = json.loads((tmp_path / "hf" / "results.json").read_text())
    for layout in ("single", "tp2", "pp2", "dp2"):
        output = tmp_path / layout
        for found in ranks(layout).run(evaluate_on, tiny_run.teacher, str(output), files):
            assert found["parameters"] == expected["parameters"]
        ours = json.loads((output / "results.json").read_text())
        for name, theirs in whole.items():
            for task, numbers in theirs["all"]["results"].items():
                for metric, value in numbers.items():
                    if isinstance(value, float):
                        assert ours[name]["all"]["results"][task][metric] == pytest.approx(value, rel=1e-5), metric

"""Tasks of lm_eval: the same numbers on a Hugging Face folder and on our checkpoint, on any layout."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml

from minitron_nemo.artifact import open_artifact
from minitron_nemo.checks import Interrupted, Mistake
from minitron_nemo.config.evaluation import asked_by
from minitron_nemo.config.trainer import TrainerConfig
from minitron_nemo.evaluation import run as evaluation
from minitron_nemo.evaluation.comparison import compare
from minitron_nemo.evaluation.tasks import build, require_fit, wanted
from minitron_nemo.stages import evaluate
from minitron_nemo.stopping import STOP_FILE
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


# ---- the project's own multiple choice -------------------------------------------------------------------------------


def own_accuracies(model: str, file: str) -> tuple[float, float]:
    """acc and acc_norm of a file of questions, as importance and training count them."""
    from minitron_nemo import engine, platform
    from minitron_nemo.evaluation.questions import open_questions
    from minitron_nemo.importance.removal import Pass
    from minitron_nemo.runtime.depth_sweep import option_likelihoods
    from minitron_nemo.runtime.layout import prepare_layout
    from minitron_nemo.text.encoding import Encoder
    from minitron_nemo.text.questions import accuracy
    from minitron_nemo.text.tokenizer import load_tokenizer

    trainer = TrainerConfig(**trainer_values())
    source = engine.open_model(model, key="model")
    prepare_layout(trainer, source.shape, seq_length=trainer.seq_length)
    core = engine.open_core(source, trainer, platform.dtype_of(trainer.precision))
    encoder = Encoder(load_tokenizer(source.tokenizer))
    questions = open_questions(file, encoder, seq_length=source.shape.seq_length, key="depth.task")
    found = option_likelihoods(core, [Pass()], questions, 4, vocab_size=source.vocab_size)
    plain, normed = (float(accuracy(questions, found, normalize=normalize)[0]) for normalize in (False, True))
    return plain, normed


BLANK = {
    "task": "local_blank",
    "doc_to_text": "{{answer}}",
    "doc_to_choice": "{{options | map('trim') | list}}",
    "doc_to_target": "a b {{context}}",
    "num_fewshot": 0,
}
"""As Winogrande is asked: the choices are contexts, and the same text is scored after each."""


@pytest.mark.parametrize(("kind", "layout"), [("jsonl", "single"), ("examples", "dp2"), ("blank", "single")])
def test_the_multiple_choice_of_importance_and_training_gives_lm_evals_numbers(
    ranks: Ranks, tiny_run: TinyRun, tasks: dict[str, Path], tmp_path: Path, kind: str, layout: str
) -> None:
    config = yaml.safe_load(tasks["choice"].read_text())
    config |= {"jsonl": {"num_fewshot": 0}, "examples": {}, "blank": BLANK}[kind]
    file = tmp_path / "choice.yaml"
    file.write_text(yaml.safe_dump(config))
    ranks("single").run(evaluate_on, str(tiny_run.hf), str(tmp_path / "hf"), [str(file)])
    [theirs] = json.loads((tmp_path / "hf" / "results.json").read_text()).values()
    numbers = theirs["all"]["results"][config["task"]]
    asked = tasks["choice"].parent / "test.jsonl" if kind == "jsonl" else file
    for ours in ranks(layout).run(own_accuracies, tiny_run.teacher, str(asked)):
        assert ours == pytest.approx((numbers["acc,none"], numbers["acc_norm,none"]))


def test_a_task_that_is_no_multiple_choice_of_one_right_answer_is_refused(
    ranks: Ranks, tiny_run: TinyRun, tasks: dict[str, Path], tmp_path: Path
) -> None:
    no_acc = tmp_path / "choice.yaml"
    no_acc.write_text(tasks["choice"].read_text().replace("metric: acc\n", "metric: acc_norm\n", 1))
    for file, said in (
        (tasks["answer"], r"depth\.task=.*answer\.yaml must be one task of output_type multiple_choice, not generate"),
        (no_acc, r"depth\.task=.*choice\.yaml: a question has 0 right answers by the task's acc"),
        (tmp_path / "gone.yaml", r"depth\.task=.*gone\.yaml is not a file"),
    ):
        with pytest.raises(Mistake, match=said):
            ranks("single").run(own_accuracies, tiny_run.teacher, str(file))


# ---- stopped, and killed ---------------------------------------------------------------------------------------------


def stop_after_one_task(model: str, output: str, tasks: list[str], stop_file: str) -> dict[str, Any]:
    """Stopped when the first task is over, by a file that appears then; asked again, the same goes on."""
    keep = evaluation.Unfinished.keep
    asked: list[str] = []

    def keep_and_stop(self: Any, name: str, record: Any) -> None:
        keep(self, name, record)
        asked.append(name)
        if len(asked) == 1:
            Path(stop_file).touch()

    os.environ[STOP_FILE] = stop_file
    evaluation.Unfinished.keep = keep_and_stop  # type: ignore[method-assign]
    try:
        with pytest.raises(Interrupted, match="stopped after local_choice"):
            evaluate_on(model, output, tasks)
        Path(stop_file).unlink()
        metrics = evaluate_on(model, output, tasks)
    finally:
        evaluation.Unfinished.keep = keep  # type: ignore[method-assign]
        del os.environ[STOP_FILE]
    return {"asked": asked, **metrics}


def test_a_task_that_is_over_is_not_asked_again_after_a_stop(
    ranks: Ranks, tiny_run: TinyRun, tasks: dict[str, Path], tmp_path: Path
) -> None:
    files = [str(tasks["choice"]), str(tasks["whole"])]
    stop_file = str(tmp_path / "stop")
    [found] = ranks("single").run(stop_after_one_task, tiny_run.teacher, str(tmp_path / "it"), files, stop_file)
    assert found["asked"] == ["local_choice", "local_whole"]
    assert set(found["tasks"]) == set(found["asked"])
    assert not (tmp_path / "it.unfinished").exists()
    assert open_artifact(tmp_path / "it").metrics["tasks"] == found["tasks"]


# ---- beside a teacher ------------------------------------------------------------------------------------------------


def headline(value: float, *, better: bool = True, samples: int = 100) -> dict[str, Any]:
    return {
        "metric": "acc", "value": value, "stderr": 0.01, "higher_is_better": better, "num_fewshot": 5,
        "samples": samples,
    }  # fmt: skip


def test_a_student_is_compared_where_it_was_asked_the_same() -> None:
    student = {"a": headline(0.45), "b": headline(12.5, better=False), "c": headline(0.4)}
    teacher = {"a": headline(0.5), "b": headline(10.0, better=False), "c": headline(0.4, samples=7)}
    found = compare(student, 55, teacher, 100)
    assert found.verdict[0].startswith("Keeps 85% of the teacher at 55% of its parameters (mean over 2 tasks")
    assert found.verdict[1] == "Asked otherwise of the teacher, and not compared: c."
    assert "| a | acc | 5 | 0.4500" in found.markdown()


# ---- mistakes --------------------------------------------------------------------------------------------------------


def test_a_file_that_a_task_reads_is_named_where_it_is_missing(tasks: dict[str, Path], tmp_path: Path) -> None:
    yaml = tmp_path / "choice.yaml"
    yaml.write_text(tasks["choice"].read_text().replace("test.jsonl", "gone.jsonl"))
    every, _ = wanted([str(yaml)], (), None)
    with pytest.raises(Mistake, match=r"local_choice reads .*gone\.jsonl, which does not exist"):
        require_fit(every, run_code=False)


def test_a_path_without_a_task_is_named(tmp_path: Path) -> None:
    with pytest.raises(Mistake, match=r"missing\.yaml is not a file"):
        wanted([str(tmp_path / "missing.yaml")], (), None)
    with pytest.raises(Mistake, match="is a folder without a task"):
        wanted([str(tmp_path)], (), None)


def test_code_of_the_model_runs_only_where_the_user_allows_it(tasks: dict[str, Path], tmp_path: Path) -> None:
    yaml = tmp_path / "code.yaml"
    yaml.write_text(tasks["answer"].read_text() + "unsafe_code: true\n")
    every, _ = wanted([str(yaml)], (), None)
    with pytest.raises(Mistake, match=r"evaluate\.run_code=true"):
        require_fit(every, run_code=False)
    require_fit(every, run_code=True)


@pytest.mark.parametrize("limit", [1.0, 0, -3, 1.5, True, "all"])
def test_a_limit_that_could_be_read_in_two_ways_is_refused(limit: Any) -> None:
    with pytest.raises(Mistake, match="limit"):
        evaluate.EvaluateConfig(tasks=["mmlu"], limit=limit)
    evaluate.EvaluateConfig(tasks=["mmlu"], limit=1)
    evaluate.EvaluateConfig(tasks=["mmlu"], limit=0.5)


@pytest.mark.slow
def test_an_unknown_task_gets_the_closest_names_and_one_without_its_data_says_what_it_looked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(Mistake, match=r"winogrand is neither .* the nearest names are .*winogrande"):
        wanted(["winogrand"], (), None)
    every, manager = wanted([], asked_by("papers"), None)
    assert [(each.name, each.num_fewshot) for each in every][:3] == [
        ("mmlu", 5), ("winogrande", 5), ("arc_challenge", 25),
    ]  # fmt: skip
    with pytest.raises(Mistake, match="mbpp runs on this machine"):
        require_fit(every, run_code=False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)  # as the command line does
    with pytest.raises(Mistake, match=r"data of winogrande cannot be had .* looked for allenai/winogrande .*_xl in /"):
        build(every[1], manager)

"""evaluate: held-out loss and perplexity of a model, over all of the validation text or its first samples, and its
scores on tasks of lm-evaluation-harness. Of each source of a blend its own loss, with a teacher how far the model is
from it, and what it writes after a few prompts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from minitron_nemo import engine, platform
from minitron_nemo.artifact import Artifact, is_artifact, open_artifact, writing
from minitron_nemo.checks import require
from minitron_nemo.config.stages import EvaluateConfig
from minitron_nemo.evaluation.held_out import measure_held_out
from minitron_nemo.evaluation.samples import require_can_sample, require_chat_template, write_samples
from minitron_nemo.hf.check import number_of_parameters
from minitron_nemo.parallel import rank_zero_works
from minitron_nemo.resuming import Unfinished
from minitron_nemo.runtime.layout import prepare_layout
from minitron_nemo.runtime.model_artifact import ModelInput
from minitron_nemo.text.blend import held_out_sources, open_blend, require_tokenizer_of
from minitron_nemo.text.tokenizer import load_tokenizer

RESULTS, TABLE, SAMPLES = "results.json", "tasks.md", "samples.json"


def run(config: EvaluateConfig) -> Artifact:
    against = _against(config)
    if (Path(config.model) / "config.json").is_file():
        return _run_hugging_face(config, against)
    source = engine.open_model(config.model, key="evaluate.model")
    tokenizer = load_tokenizer(source.tokenizer)
    teacher = None if config.teacher is None else engine.open_model(config.teacher, key="evaluate.teacher")
    blend = [] if config.num_samples == 0 else open_blend(config.data)
    if blend:
        require_tokenizer_of(blend[0][0], tokenizer)
        if teacher is not None:
            require_tokenizer_of(blend[0][0], load_tokenizer(teacher.tokenizer))
    require_chat_template(config, tokenizer)
    require_can_sample(config, tokenizer)
    prepare_layout(config.trainer, source.shape, seq_length=config.trainer.seq_length)
    core = engine.open_core(source, config.trainer, platform.dtype_of(config.trainer.precision))
    output = Path(config.output)
    inputs = [*source.artifacts, *(teacher.artifacts if teacher else []), *(each for each, _ in blend), *against]
    unfinished = Unfinished(output, config, inputs)
    metrics: dict[str, Any] = {"parameters": source.shape.num_parameters}
    if blend:
        texts = held_out_sources(blend, config.trainer.seq_length)
        metrics |= _held_out(config, source, core, texts, unfinished, teacher)
    samples = write_samples(core, tokenizer, source.vocab_size, config)
    results: dict[str, Any] = {}
    if config.has_tasks:
        from minitron_nemo.evaluation.run import evaluate_core

        results = evaluate_core(config, source, core, tokenizer, unfinished)
    return _write(config, inputs, unfinished, metrics, results, against, samples)


def _run_hugging_face(config: EvaluateConfig, against: list[Artifact]) -> Artifact:
    """A Hugging Face folder: tasks alone, asked by lm_eval's own class in one process."""
    from minitron_nemo.evaluation.run import evaluate_hf

    require(
        not config.prompts and config.teacher is None,
        f"evaluate.model={config.model} is a Hugging Face folder; evaluate.teacher and evaluate.prompts are for model "
        "artifacts. Leave them out, or import it: minitron import-hf.",
    )
    require(
        config.has_tasks,
        f"evaluate.model={config.model} is a Hugging Face folder, whose held-out loss is not measured here. Name "
        "evaluate.tasks or a preset, or import it: minitron import-hf.",
    )
    require_chat_template(config, load_tokenizer(config.model))
    platform.activate()
    inputs = [*([open_artifact(config.model, key="evaluate.model")] if is_artifact(config.model) else []), *against]
    unfinished = Unfinished(Path(config.output), config, inputs)
    if not is_artifact(config.model):
        unfinished.clear()  # nothing says whether the folder is still what it was
        unfinished.records = {}
    metrics = {"parameters": number_of_parameters(config.model)}
    return _write(config, inputs, unfinished, metrics, evaluate_hf(config, unfinished), against)


def _against(config: EvaluateConfig) -> list[Artifact]:
    """The evaluation to compare with, if there is one."""
    if config.against is None:
        return []
    found = open_artifact(config.against, made_by=("evaluate",), key="evaluate.against")
    require(
        bool(found.metrics.get("tasks")),
        f"evaluate.against={config.against} is an evaluation without tasks. Evaluate the teacher with the same tasks.",
    )
    return [found]


def _held_out(
    config: EvaluateConfig,
    source: ModelInput,
    core: Any,
    texts: dict[str, str],
    unfinished: Unfinished,
    teacher: ModelInput | None,
) -> dict[str, Any]:
    kept = "held-out loss"
    if kept in unfinished.records:
        record: dict[str, Any] = unfinished.records[kept]
        return record
    label = Path(config.output).name
    found = measure_held_out(core, source, texts, config, unfinished, teacher=teacher, label=label).metrics()
    if config.has_tasks:
        rank_zero_works(partial(unfinished.keep, kept, found))
    return found


def _write(
    config: EvaluateConfig,
    inputs: list[Artifact],
    unfinished: Unfinished,
    metrics: dict[str, Any],
    results: dict[str, Any],
    against: list[Artifact],
    samples: Sequence[dict[str, str]] = (),
) -> Artifact:
    output = Path(config.output)
    with writing(output, stage="evaluate", config=config, inputs=inputs) as draft:
        draft.facts["model"] = config.model
        draft.metrics.update(metrics)
        if samples:
            rank_zero_works(lambda: (draft.path / SAMPLES).write_text(json.dumps(samples, indent=1) + "\n"))
        if results:
            rank_zero_works(partial(_write_tasks, draft.path, results, metrics["parameters"], against))
            draft.metrics["tasks"] = _headlines(results)
    unfinished.clear()
    return open_artifact(output)


def _headlines(results: dict[str, Any]) -> dict[str, Any]:
    return {task: headline for entry in results.values() for task, headline in entry["tasks"].items()}


def _write_tasks(directory: Path, results: dict[str, Any], parameters: int, against: list[Artifact]) -> None:
    """lm_eval's own numbers, and the table, which is shown too."""
    from minitron_nemo.evaluation.comparison import compare

    teacher, teacher_parameters = (against[0].metrics[key] if against else None for key in ("tasks", "parameters"))
    notes = [note for entry in results.values() for note in entry["notes"]]
    comparison = compare(_headlines(results), parameters, teacher, teacher_parameters, notes)
    (directory / RESULTS).write_text(json.dumps(results, indent=2, sort_keys=True) + "\n")
    (directory / TABLE).write_text(comparison.markdown())
    Console().print(comparison.table())

"""What is known of lm_eval 0.4.13 is right in our numbers: how texts begin, chat templates, limits, examples."""

from __future__ import annotations

import json
import math
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import lm_eval.tasks
import pytest
import torch
import yaml
from lm_eval.tasks._yaml_loader import load_yaml
from tokenizers import Tokenizer, processors
from transformers import AutoModelForCausalLM, AutoTokenizer

from minitron_nemo.checks import Mistake
from minitron_nemo.config.evaluation import PAPERS, QUICK
from minitron_nemo.config.stages import EvaluateConfig
from minitron_nemo.config.trainer import TrainerConfig
from minitron_nemo.evaluation.tasks import build, wanted
from minitron_nemo.stages import evaluate, import_hf
from support.door import Door, kill_once_there
from support.local_tasks import write_tasks
from support.ranks import Ranks
from support.tiny_run import TinyRun, trainer_values

BOS = "<|endoftext|>"
CHAT = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
TEMPLATES = {"default": BOS + CHAT, "bare": "{% for m in messages %}{{ m.content }}\n{% endfor %}"}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def talking(ranks: Ranks, tiny_run: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """The tiny teacher with a tokenizer that begins every text and knows two chat templates: as a Hugging Face folder,
    and as our artifact."""
    folder = tmp_path_factory.mktemp("talking")
    shutil.copytree(tiny_run.hf, folder / "hf")
    tokenizer = Tokenizer.from_file(str(folder / "hf" / "tokenizer.json"))
    begin = processors.TemplateProcessing(single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, 0)])
    tokenizer.post_processor = begin
    tokenizer.save(str(folder / "hf" / "tokenizer.json"))
    file = folder / "hf" / "tokenizer_config.json"
    named = [{"name": name, "template": template} for name, template in TEMPLATES.items()]
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": named}))
    ranks("single").run(import_talking, str(folder / "hf"), str(folder / "ours"))
    return str(folder / "hf"), str(folder / "ours")


def import_talking(hf: str, output: str) -> None:
    trainer = TrainerConfig(**trainer_values())
    import_hf.run(import_hf.ImportHfConfig(model=hf, trainer=trainer, output=output))


def config_of(model: str, output: Path | str, tasks: list[Path], **options: Any) -> EvaluateConfig:
    return EvaluateConfig(
        model=model,
        tasks=[str(file) for file in tasks],
        output=str(output),
        batch_size=5,
        num_samples=0,
        trainer=TrainerConfig(**trainer_values()),
        **options,
    )


def scores(*given: Any, **options: Any) -> dict[str, Any]:
    """By task and metric, all of lm_eval's numbers."""
    artifact = evaluate.run(config_of(*given, **options))
    found = json.loads((artifact.path / "results.json").read_text())
    return {
        f"{task} {metric}": value
        for entry in found.values()
        for task, numbers in entry["all"]["results"].items()
        for metric, value in numbers.items()
        if isinstance(value, float)
    }


# ---- how a text begins -----------------------------------------------------------------------------------------------


def test_how_probable_a_beginning_is_after_a_beginning_counts_on_no_path(
    ranks: Ranks, talking: tuple[str, str], tasks: dict[str, Path], tmp_path: Path
) -> None:
    hf, ours = talking
    texts = [json.loads(line)["text"] for line in (tasks["whole"].parent / "texts.jsonl").read_text().splitlines()]
    texts = [text[:40] for text in texts[:2]]  # one window each
    (tmp_path / "texts.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    file = tmp_path / "whole.yaml"
    file.write_text(tasks["whole"].read_text().replace(str(tasks["whole"].parent / "texts"), str(tmp_path / "texts")))

    tokenizer, model = AutoTokenizer.from_pretrained(hf), AutoModelForCausalLM.from_pretrained(hf).double()
    assert tokenizer("x").input_ids[0] == tokenizer.bos_token_id
    nats = 0.0
    for text in texts:
        ids = torch.tensor([tokenizer(text).input_ids])
        assert ids.shape[1] <= model.config.max_position_embeddings
        told = model(ids).logits[0].log_softmax(-1)[:-1]
        nats += float(told.gather(1, ids[0, 1:, None]).sum())
    expected = -nats / sum(len(text.encode()) for text in texts) / math.log(2)
    for name, path in (("theirs", hf), ("ours", ours)):
        (found,) = ranks("single").run(scores, path, tmp_path / name, [file])
        assert found["local_whole bits_per_byte,none"] == pytest.approx(expected, rel=1e-5), name


# ---- chat templates --------------------------------------------------------------------------------------------------


def test_both_paths_agree_under_each_chat_template(
    ranks: Ranks, talking: tuple[str, str], tasks: dict[str, Path], tmp_path: Path
) -> None:
    files = [tasks["whole"], _prompted(tasks["choice"], tmp_path)]
    found = {}
    for template in (None, "default", "bare"):
        theirs, ours = (
            ranks("single").run(scores, model, tmp_path / f"{template}-{number}", files, chat_template=template)[0]
            for number, model in enumerate(talking)
        )
        assert ours == pytest.approx(theirs, rel=1e-5), template
        found[template] = theirs
    per_choice = [of["local_prompted perplexity,none"] for of in found.values()]
    assert len({round(each, 3) for each in per_choice}) == 3  # each was asked otherwise


def _prompted(choice: Path, folder: Path) -> Path:
    """A likelihood after a prompt, whose number moves with every token of the prompt."""
    config = yaml.safe_load(choice.read_text()) | {
        "task": "local_prompted",
        "output_type": "loglikelihood",
        "doc_to_target": " {{options[0]}}",
        "metric_list": [{"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False}],
    }
    del config["doc_to_choice"]
    file = folder / "prompted.yaml"
    file.write_text(yaml.safe_dump(config))
    return file


def test_a_chat_template_takes_the_space_before_a_choice_as_the_docs_say(tasks: dict[str, Path]) -> None:
    asked = {}
    for templated in (False, True):
        every, manager = wanted([str(tasks["choice"])], (), 0)
        (task,) = build(every[0], manager).loaded["tasks"].values()
        task.build_all_requests(
            rank=0, world_size=1, apply_chat_template=templated, chat_template=lambda chat, **_: str(chat)
        )
        asked[templated] = [instance.args[1] for instance in task.instances]
    assert asked[False] == [f" {choice}" for choice in asked[True]] and not asked[True][0].startswith(" ")


def test_a_template_that_the_tokenizer_lacks_is_named_before_anything_is_asked(
    tiny_run: TinyRun, talking: tuple[str, str], tasks: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(Mistake, match=r"chat_template=bear.* no template of that name; did you mean bare\?"):
        evaluate.run(config_of(talking[0], tmp_path / "it", [tasks["choice"]], chat_template="bear"))
    with pytest.raises(Mistake, match=r"has no chat template\. Set it to null"):
        evaluate.run(config_of(str(tiny_run.hf), tmp_path / "it", [tasks["choice"]], chat_template="default"))


# ---- limits, examples, metrics ---------------------------------------------------------------------------------------


def test_a_limit_below_one_is_a_share_and_examples_from_the_measured_split_are_noted(
    ranks: Ranks, tiny_run: TinyRun, tasks: dict[str, Path], tmp_path: Path
) -> None:
    config = yaml.safe_load(tasks["choice"].read_text())
    del config["fewshot_split"], config["dataset_kwargs"]["data_files"]["train"]
    file = tmp_path / "alone.yaml"
    file.write_text(yaml.safe_dump(config))
    for limit, samples in ((0.5, 7), (1, 1), (None, 13)):
        output = tmp_path / str(limit)
        (found,) = ranks("single").run(metrics_of, str(tiny_run.hf), output, [file], limit=limit)
        assert found["local_choice"]["samples"] == samples
        table = (output / "tasks.md").read_text()
        assert "local_choice has no split for examples: its 2 examples before each question come from test" in table


def metrics_of(*given: Any, **options: Any) -> dict[str, Any]:
    found: dict[str, Any] = evaluate.run(config_of(*given, **options)).metrics["tasks"]
    return found


def test_the_metric_that_is_quoted_can_be_named_and_a_wrong_name_gets_the_nearest(tasks: dict[str, Path]) -> None:
    file = str(tasks["choice"])
    every, manager = wanted([file], (), None, {"local_choice": "acc_norm"})
    assert build(every[0], manager).metric == "acc_norm"
    every, manager = wanted([file], (), None, {"local_choice": "acc_nrm"})
    with pytest.raises(Mistake, match=r"local_choice has no acc_nrm; did you mean acc_norm\?"):
        build(every[0], manager)
    with pytest.raises(Mistake, match=r"local_chose is none of evaluate\.tasks; did you mean local_choice\?"):
        wanted([file], (), None, {"local_chose": "acc"})


# ---- answers that are drawn, and code --------------------------------------------------------------------------------

DRAWN = """
task: local_drawn
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
output_type: generate_until
test_split: test
unsafe_code: true
doc_to_text: "{{prompt}}"
doc_to_target: "{{target}}"
repeats: 20
generation_kwargs: {until: ["\\n\\n"], max_gen_toks: 6, do_sample: true, temperature: 1.5, top_p: 0.95}
filter_list:
  - name: all
    filter:
      - {function: custom, filter_fn: !function drawn.as_they_are}
metric_list:
  - {metric: !function drawn.different, aggregation: mean, higher_is_better: true, k: [1]}
"""
FUNCTIONS = """
import os

def as_they_are(resps, docs):
    return resps

def different(references, predictions, k):
    assert os.environ["HF_ALLOW_CODE_EVAL"] == "1" and k == [1]
    (answers,) = predictions
    return {"pass@1": len(set(answers)) / len(answers), "answers": len(answers)}
"""


def test_a_question_gets_as_many_answers_as_its_task_repeats_and_code_runs_where_it_may(
    ranks: Ranks, tiny_run: TinyRun, tasks: dict[str, Path], tmp_path: Path
) -> None:
    file = tmp_path / "drawn.yaml"
    file.write_text(DRAWN % (tasks["answer"].parent / "sums.jsonl"))
    (tmp_path / "drawn.py").write_text(FUNCTIONS)
    options = {"run_code": True, "limit": 2}
    for model in (tiny_run.teacher, str(tiny_run.hf)):
        (found,) = ranks("single").run(
            metrics_of, model, tmp_path / "it", [file], metrics={"local_drawn": "answers"}, **options
        )
        assert found["local_drawn"]["value"] == 20
        shutil.rmtree(tmp_path / "it")
    (found,) = ranks("single").run(
        metrics_of, tiny_run.teacher, tmp_path / "it", [file], metrics={"local_drawn": "pass@1"}, **options
    )
    assert found["local_drawn"]["value"] > 0.5
    with pytest.raises(Mistake, match=r"local_drawn has no pass@2; did you mean pass@1\?"):
        ranks("single").run(
            metrics_of, tiny_run.teacher, tmp_path / "no", [file], metrics={"local_drawn": "pass@2"}, **options
        )
    assert "HF_ALLOW_CODE_EVAL" not in os.environ


# ---- presets ---------------------------------------------------------------------------------------------------------

PAPERS_SETTINGS = {  # arXiv:2408.11796; file in lm_eval/tasks, examples, metric
    "mmlu": ("mmlu/default/_mmlu.yaml", 5, "acc"),
    "winogrande": ("winogrande/default.yaml", 5, "acc"),
    "arc_challenge": ("arc/arc_challenge.yaml", 25, "acc_norm"),
    "hellaswag": ("hellaswag/hellaswag.yaml", 10, "acc_norm"),
    "gsm8k": ("gsm8k/gsm8k.yaml", 5, "exact_match"),
    "truthfulqa_mc2": ("truthfulqa/truthfulqa_mc2.yaml", 0, "acc"),
    "mbpp": ("mbpp/mbpp.yaml", 0, "pass_at_1"),
    "humaneval": ("humaneval/humaneval.yaml", 0, "pass@1"),
}


def test_the_papers_preset_has_the_papers_settings_and_names_that_lm_eval_knows() -> None:
    assert {each.task: (each.num_fewshot, each.metric) for each in PAPERS} == {
        task: settings for task, (_, *rest) in PAPERS_SETTINGS.items() for settings in [tuple(rest)]
    }
    folder = Path(lm_eval.tasks.__file__).parent
    for asked in (*PAPERS, *QUICK):
        file, _, metric = PAPERS_SETTINGS[asked.task]
        config = load_yaml(folder / file, resolve_func=False)
        lists = config.get("metric_list") or config["aggregate_metric_list"]
        names = [str(each["metric"]).rpartition(".")[2] for each in lists]
        assert config.get("task") == asked.task or config["group"] == asked.task
        assert ("pass_at_k" if metric == "pass@1" else metric) in names, (asked.task, names)
        assert asked.runs_code == bool(config.get("unsafe_code"))
        if config.get("num_fewshot") == 0:
            assert asked.num_fewshot == 0
    humaneval = PAPERS[-1]
    own = load_yaml(folder / "humaneval" / "humaneval.yaml", resolve_func=False)
    generation = humaneval.changes["generation_kwargs"]
    assert humaneval.changes["repeats"] == 20 and own["metric_list"][0]["k"] == [1]
    assert generation == own["generation_kwargs"] | {"do_sample": True, "temperature": 0.2, "top_p": 0.95}
    assert not list(folder.glob("**/xlsum_en*"))


def test_what_a_preset_changes_reaches_the_task(tasks: dict[str, Path]) -> None:
    """As HumanEval's twenty answers do."""
    changes = {"repeats": 20, "generation_kwargs": {"until": ["x"], "do_sample": True}}
    (plain,), manager = wanted([str(tasks["answer"])], (), None)
    (task,) = build(replace(plain, changes=changes), manager).loaded["tasks"].values()
    task.build_all_requests(rank=0, world_size=1)
    assert {instance.repeats for instance in task.instances} == {20}
    assert task.instances[0].args[1] == changes["generation_kwargs"]
    assert task.config.metric_list == plain.config["metric_list"]


# ---- killed ----------------------------------------------------------------------------------------------------------


def test_a_task_that_was_over_when_the_run_was_killed_is_not_asked_again(
    door: Door, tiny_run: TinyRun, tasks: dict[str, Path], tmp_path: Path
) -> None:
    long = tmp_path / "long.yaml"  # many answers, so that the kill meets it
    long.write_text(tasks["answer"].read_text().replace("max_gen_toks: 6", "max_gen_toks: 20") + "repeats: 200\n")
    values = {f"trainer.{key}": value for key, value in trainer_values().items() if key != "global_batch_size"}
    values |= {
        "evaluate.model": tiny_run.teacher,
        "evaluate.num_samples": 0,
        "evaluate.teacher": "null",
        "evaluate.prompts": "[]",
        "evaluate.tasks": f"[{tasks['choice']},{long}]",
        "evaluate.output": tmp_path / "it",
    }
    command = [
        "evaluate",
        "recipe=quickstart",
        f"run_dir={tmp_path}",
        *(f"{key}={value}" for key, value in values.items()),
    ]
    kept = tmp_path / "it.unfinished"
    kill_once_there(kept / "made_by.json", command)
    records = json.loads((kept / "records.json").read_text())
    assert list(records) == ["local_choice"]
    records["local_choice"]["tasks"]["local_choice"]["value"] = 0.125  # what no model gives for 13 questions
    (kept / "records.json").write_text(json.dumps(records))

    done = door(*command)
    assert done.code == 0, done.err
    found = json.loads((tmp_path / "it" / "results.json").read_text())
    assert found["local_choice"]["tasks"]["local_choice"]["value"] == 0.125
    assert found["local_answer"]["tasks"]["local_answer"]["samples"] == 5 and not kept.exists()

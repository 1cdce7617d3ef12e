"""What evaluate measures of each source, of the distance to a teacher, and what the model writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from minitron_nemo.artifact import open_artifact
from minitron_nemo.config.data import Prepared
from minitron_nemo.config.stages import EvaluateConfig
from minitron_nemo.config.trainer import Passing
from minitron_nemo.stages import evaluate
from support.ranks import Ranks
from support.tiny import SEQ_LENGTH
from support.tiny_run import TinyRun, trainer_values


def config_of(run: TinyRun, prepared: Any, output: Path, **values: Any) -> EvaluateConfig:
    kept = {key: value for key, value in trainer_values().items() if key in Passing.__dataclass_fields__}
    trainer, data = Passing(**kept | values.pop("layout", {})), Prepared(prepared=prepared)
    values = {"model": run.student, "teacher": run.teacher} | values
    return EvaluateConfig(trainer=trainer, data=data, output=str(output), **values)


def metrics_of(*args: Any, **values: Any) -> dict[str, Any]:
    return evaluate.run(config_of(*args, **values)).metrics


def test_each_source_has_its_loss_and_together_they_are_the_loss(
    tiny_run: TinyRun, tiny_blend: list[dict[str, Any]], ranks: Ranks, tmp_path: Path
) -> None:
    found = ranks("tp1").run(metrics_of, tiny_run, tiny_blend, tmp_path / "all")[0]
    alone = ranks("tp1").run(metrics_of, tiny_run, tiny_run.data, tmp_path / "alone")[0]

    sources = found["sources"]
    assert set(sources) == {"data", "poems.jsonl", "lists.jsonl"}
    assert sum(each["tokens"] for each in sources.values()) == found["tokens"]
    for key in ("held_out_loss", "kl"):
        mean = sum(each[key] * each["tokens"] for each in sources.values()) / found["tokens"]
        assert mean == pytest.approx(found[key], rel=1e-12)
        assert sources["data"][key] == alone[key]
        assert abs(sources["poems.jsonl"][key] - sources["data"][key]) > 1e-3
    assert list(alone["sources"].values()) == [{key: alone[key] for key in ("held_out_loss", "tokens", "kl")}]


def test_some_samples_are_of_every_source(
    tiny_run: TinyRun, tiny_blend: list[dict[str, Any]], ranks: Ranks, tmp_path: Path
) -> None:
    whole = ranks("tp1").run(metrics_of, tiny_run, tiny_blend, tmp_path / "all", teacher=None)[0]["sources"]
    some = ranks("tp1").run(metrics_of, tiny_run, tiny_blend, tmp_path / "some", teacher=None, num_samples=11)[0]

    windows = {name: each["tokens"] / SEQ_LENGTH for name, each in whole.items()}
    taken = {name: each["tokens"] / SEQ_LENGTH for name, each in some["sources"].items()}
    assert sum(taken.values()) == 11 and "kl" not in some
    for name, size in windows.items():
        assert abs(taken[name] - 11 * size / sum(windows.values())) < 1 or taken[name] == 1


def test_kl_is_that_of_the_two_models_whole_logits_on_every_layout(
    tiny_run: TinyRun, ranks: Ranks, tmp_path: Path
) -> None:
    expected = ranks("tp1").run(kl_by_hand, tiny_run, 5)[0]
    assert expected > 0.01
    for layout in ("tp1", "tp2", "pp2", "dp2"):
        size = {"tensor_model_parallel_size": 2} if layout == "tp2" else {}
        size |= {"pipeline_model_parallel_size": 2} if layout == "pp2" else {}
        output = tmp_path / layout
        found = ranks(layout).run(metrics_of, tiny_run, tiny_run.data, output, num_samples=5, layout=size)
        assert [each["kl"] for each in found] == pytest.approx([expected] * len(found), rel=1e-5), layout


def kl_by_hand(run: TinyRun, samples: int) -> float:
    """From whole logits, on one process."""
    from minitron_nemo import engine
    from minitron_nemo.runtime.forward import last_logits
    from minitron_nemo.runtime.layout import prepare_layout
    from minitron_nemo.text.blend import held_out_sources, open_blend
    from minitron_nemo.text.windows import batches

    config = config_of(run, run.data, Path("unused"))
    teacher, student = (engine.open_model(path, key="model") for path in (run.teacher, run.student))
    prepare_layout(config.trainer, teacher.shape, seq_length=SEQ_LENGTH)
    (text,) = held_out_sources(open_blend(config.data), SEQ_LENGTH).values()
    (batch,) = batches(text, SEQ_LENGTH, samples, samples)
    of_teacher, of_student = (
        last_logits(engine.open_core(model, config.trainer, torch.float32), batch["tokens"])[..., : model.vocab_size]
        .double()
        .log_softmax(-1)
        for model in (teacher, student)
    )
    per_token = (of_teacher.exp() * (of_teacher - of_student)).sum(-1)
    return float((per_token * batch["loss_mask"]).sum() / batch["loss_mask"].sum())


def test_greedy_samples_are_those_of_transformers_on_every_layout(
    tiny_run: TinyRun, ranks: Ranks, tmp_path: Path
) -> None:
    prompts = ["def one(", "import"]
    tokenizer = AutoTokenizer.from_pretrained(tiny_run.hf)
    model = AutoModelForCausalLM.from_pretrained(tiny_run.hf, torch_dtype=torch.float32)
    written = {}
    for layout in ("tp1", "tp2", "pp2"):
        size = {"tensor_model_parallel_size": 2} if layout == "tp2" else {}
        size |= {"pipeline_model_parallel_size": 2} if layout == "pp2" else {}
        values = {"model": tiny_run.teacher, "teacher": None, "prompts": prompts, "new_tokens": 9, "num_samples": 3}
        ranks(layout).run(metrics_of, tiny_run, tiny_run.data, tmp_path / layout, **values, layout=size)
        written[layout] = json.loads((open_artifact(tmp_path / layout).path / "samples.json").read_text())

    assert written["tp1"] == written["tp2"] == written["pp2"]
    modes = [(each["prompt"], each["mode"]) for each in written["tp1"]]
    assert modes == [(prompt, mode) for prompt in prompts for mode in ("greedy", "sampled")]
    for prompt, greedy in zip(prompts, written["tp1"][::2], strict=True):
        ids = tokenizer(prompt, return_tensors="pt")
        expected = model.generate(**ids, max_new_tokens=9, do_sample=False)[0, ids.input_ids.shape[1] :]
        assert greedy["text"] == tokenizer.decode(expected, skip_special_tokens=True)
    assert any(a["text"] != b["text"] for a, b in zip(written["tp1"][::2], written["tp1"][1::2], strict=True))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"chat_template": "default"}, "has no chat template. Set it to null."),
        ({"new_tokens": 500}, f"longer than trainer.seq_length={SEQ_LENGTH}. Shorten the prompt, or lower new_tokens."),
        ({"prompts": [""]}, "evaluate.prompts: '' is no token to this tokenizer. Leave it out."),
        ({"prompts": [], "teacher": "nowhere"}, "evaluate.teacher=nowhere"),
    ],
)
def test_what_cannot_be_continued_is_said_before_anything_is_built(
    tiny_run: TinyRun, tmp_path: Path, values: dict[str, Any], said: str
) -> None:
    values = {"prompts": ["def one("], "teacher": None} | values
    with pytest.raises((ValueError, FileNotFoundError)) as refused:
        evaluate.run(config_of(tiny_run, tiny_run.data, tmp_path / "it", **values))
    assert said in str(refused.value)

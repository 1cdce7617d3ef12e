"""What a model's speed and memory are said to be: by the clock, at the batch that was asked for and at the largest."""

from __future__ import annotations

import itertools
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, LlamaConfig

from minitron_nemo.checks import Mistake
from minitron_nemo.config.throughput import ThroughputConfig, TimedModel
from minitron_nemo.evaluation.throughput import Timed, comparison, measure
from minitron_nemo.hf.config import hf_config
from minitron_nemo.hf.writer import transformers_writer
from minitron_nemo.published import PUBLISHED
from minitron_nemo.stages.throughput import run, timed_model, write_shape
from support.hf import DIMS, TOKENS, hf_model

TINY = {**DIMS, "model_type": "llama", "architectures": ["LlamaForCausalLM"]}


def config_of(**values: Any) -> ThroughputConfig:
    quick = {"dtype": "fp32", "batch_size": 3, "prompt_tokens": 5, "new_tokens": 4, "repeats": 2, "max_batch_size": 7}
    return ThroughputConfig(**quick | values)


def timed(folder: Path, label: str, config: ThroughputConfig, **dims: int) -> Timed:
    shape = write_shape(folder / label, {**TINY, **dims})
    return timed_model(shape, TimedModel(str(shape), label), config)


def test_speeds_are_tokens_over_the_seconds_of_the_first_and_of_the_rest(tmp_path: Path) -> None:
    config = config_of(largest_batch=False)
    models = [timed(tmp_path, "teacher", config), timed(tmp_path, "student", config, num_hidden_layers=2)]
    # of each turn: it begins, all have their first token, they begin again and have all; teacher, student, twice
    clock = itertools.accumulate([0, 2, 8, 1, 1, 2, 1, 2, 8, 1, 1, 2]).__next__
    teacher, student = measure(models, config, clock)["rows"]

    assert teacher["time_to_first_token_s"] == 2 and student["time_to_first_token_s"] == 1
    assert teacher["prefill_tokens_per_s"] == 3 * 5 / 2  # three sequences of five
    assert teacher["decode_tokens_per_s"] == 3 * (4 - 1) / (8 - 2)  # without the first
    assert student["decode_tokens_per_s"] == 3 * (4 - 1) / (2 - 1)
    assert teacher["times_first_model"] == {"prefill": 1, "decode": 1}
    assert student["times_first_model"] == {"prefill": 2, "decode": 6}
    assert student["seconds"] == {"first": [1, 1], "all": [2, 2]}
    assert (student["weights"], student["dtype"], student["largest"]) == ("random", "float32", False)


def test_the_largest_batch_doubles_as_far_as_its_limit_and_says_which(tmp_path: Path) -> None:
    config = config_of(max_batch_size=13)
    models = [timed(tmp_path, "teacher", config), timed(tmp_path, "student", config)]
    found = measure(models, config, time.process_time)

    batches = [(row["label"], row["batch_size"], row["largest"]) for row in found["rows"]]
    assert batches == [
        ("teacher", 3, False), ("student", 3, False), ("teacher", 12, True), ("student", 12, True)
    ]  # fmt: skip
    assert any(said.startswith("The largest batch is 3 doubled, at most 13 sequences and") for said in found["remarks"])
    table = comparison(found).markdown()
    assert "| teacher (random weights) | 12 (largest) | 5 + 4 |" in table and "1.00x" in table

    alone = measure(models, config_of(max_batch_size=13, max_memory_gigabytes=1e-6), time.process_time)
    assert [row["batch_size"] for row in alone["rows"]] == [3, 3, 3, 3]


def test_peak_memory_is_that_of_the_model_and_not_of_the_process(tmp_path: Path) -> None:
    """A model of 68 MB beside one of 3 MB, the large one first."""
    config = config_of(largest_batch=False)
    sizes = {"large": {"vocab_size": 340_000}, "small": {"vocab_size": 16_000}}
    models = [timed(tmp_path, label, config, **dims) for label, dims in sizes.items()]
    large, small = measure(models, config, time.process_time)["rows"]

    for row in (large, small):
        assert row["peak_memory_bytes"] > 0.9 * 4 * row["parameters"]
    assert large["peak_memory_bytes"] < 3 * 4 * large["parameters"]
    assert small["peak_memory_bytes"] < 0.6 * 4 * large["parameters"]


def test_the_end_of_text_ends_nothing_and_what_is_written_is_the_models_own(tmp_path: Path) -> None:
    model = hf_model(LlamaConfig(**DIMS, eos_token_id=0), tmp_path)
    with torch.no_grad():
        model.lm_head.weight[0] = 40 * model.lm_head.weight[1]  # likeliest about every other time
    model.save_pretrained(tmp_path)
    GenerationConfig(eos_token_id=0, do_sample=True, max_new_tokens=1, temperature=3.0).save_pretrained(tmp_path)
    prompts = TOKENS.tolist()

    written = transformers_writer(tmp_path, torch.float32, torch.device("cpu"))(prompts, 6)

    tokens = TOKENS
    with torch.no_grad():
        for _ in range(6):  # without a cache
            tokens = torch.cat([tokens, model(tokens).logits[:, -1:].argmax(-1)], dim=1)
    assert written == tokens[:, TOKENS.shape[1] :].tolist()
    assert any(0 in each[:-1] for each in written)


# ---- what cannot be timed --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"models": []}, r"throughput\.models is empty"),
        (
            {"models": [TimedModel("{folder}/nowhere")]},
            r"throughput\.models\[0\]\.model=.*nowhere is no directory with a config\.json\. Give a Hugging Face",
        ),
        ({"models": [TimedModel("llama-3.1-8B")]}, r"did you mean Llama-3\.1-8B\?"),
        (
            {"models": [TimedModel("{folder}/tiny")], "prompt_tokens": 30},
            r"prompt_tokens=30 and new_tokens=4 are 34 tokens, and tiny reads at most 32 \(max_position_embeddings\)",
        ),
        (
            {"models": [TimedModel("{folder}/tiny")], "engine": "vllm"},
            r"throughput\.engine=vllm needs vLLM, which is not installed\. Install it \(pip install vllm",
        ),
    ],
    ids=["nothing", "no folder", "a name nearly published", "a prompt longer than positions", "no vllm"],
)
def test_what_cannot_be_timed_is_refused_before_anything_is_loaded(
    tmp_path: Path, values: dict[str, Any], expected: str
) -> None:
    write_shape(tmp_path / "tiny", TINY)
    models = [TimedModel(each.model.format(folder=tmp_path)) for each in values["models"]]
    config = config_of(**values | {"models": models, "output": str(tmp_path / "output")})
    with pytest.raises(Mistake, match=expected):
        run(config)
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"batch_size": 0}, r"^batch_size=0 must be at least 1"),
        ({"new_tokens": 1}, r"^new_tokens=1 must be at least 2; the prompt makes the first"),
        ({"engine": "tgi"}, r"^engine=tgi is not known; use transformers or vllm"),
        ({"dtype": "fp8"}, r"^dtype=fp8 is not known"),
        ({"models": [TimedModel("a/export"), TimedModel("b/export")]}, r"^models: 2 are called 'export'\. Give each a"),
        ({"models": [TimedModel(label="x")]}, r"^models\[0\] names no model"),
    ],
)
def test_values_that_mean_nothing_are_refused(values: dict[str, Any], expected: str) -> None:
    with pytest.raises(Mistake, match=expected):
        ThroughputConfig(**values)


def test_too_few_tokens_for_the_clock_are_refused(tmp_path: Path) -> None:
    config = config_of(largest_batch=False, repeats=1)
    clock = itertools.accumulate([0, 2, 2]).__next__
    with pytest.raises(Mistake, match=r"throughput\.new_tokens=4 took tiny no longer than the first of them"):
        measure([timed(tmp_path, "tiny", config)], config, clock)


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_published_shape_is_what_transformers_builds_of_it(name: str, tmp_path: Path) -> None:
    folder = write_shape(tmp_path / "it", hf_config(PUBLISHED[name]))
    assert json.loads((folder / "config.json").read_text())["vocab_size"] == PUBLISHED[name].padded_vocab_size
    made = timed_model(folder, TimedModel(name), ThroughputConfig())
    assert (made.parameters, made.label) == (PUBLISHED[name].num_parameters, name)

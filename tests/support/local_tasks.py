"""Small tasks of lm_eval on this disk: a multiple choice with a split for examples, an answer, and whole texts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

WORDS = ["def", "return", "import", "self", "class", "for", "while", "in", "not", "lambda"]


def questions(count: int, start: int = 0) -> list[dict[str, Any]]:
    """Of two to four options, of different length."""
    found = []
    for number in range(start, start + count):
        options = [WORDS[(number * 3 + place * (1 + number % 2)) % len(WORDS)] for place in range(2 + number % 3)]
        options[-1] += " x" * (number % 4 + 1)
        context = f"line {number}: {WORDS[number % 7]} a b"
        found.append({"context": context, "options": options, "answer": number % len(options)})
    return found


def write_tasks(directory: Path) -> dict[str, Path]:
    """Name -> YAML file; the data beside it, by absolute paths."""
    directory.mkdir(parents=True, exist_ok=True)
    data = {
        "test": questions(13),
        "train": questions(5, start=40),
        "texts": [{"text": f"def f_{number}(x):\n    return x + {number}\n" * (1 + number)} for number in range(4)],
        "sums": [{"prompt": f"a_{number} = ", "target": str(number)} for number in range(5)],
    }
    for name, records in data.items():
        (directory / f"{name}.jsonl").write_text("\n".join(json.dumps(each) for each in records))
    configs: dict[str, dict[str, Any]] = {
        "choice": {
            "output_type": "multiple_choice",
            "data_files": {"test": "test", "train": "train"},
            "test_split": "test",
            "fewshot_split": "train",
            "num_fewshot": 2,
            "doc_to_text": "{{context}}",
            "doc_to_choice": "{{options}}",
            "doc_to_target": "{{answer}}",
            "metric_list": [
                {"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")
            ],
        },
        "whole": {
            "output_type": "loglikelihood_rolling",
            "data_files": {"test": "texts"},
            "test_split": "test",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
        },
        "answer": {
            "output_type": "generate_until",
            "data_files": {"test": "sums"},
            "test_split": "test",
            "doc_to_text": "{{prompt}}",
            "doc_to_target": "{{target}}",
            "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 6},
            "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        },
    }
    files = {}
    for name, config in configs.items():
        paths = {split: str(directory / f"{file}.jsonl") for split, file in config.pop("data_files").items()}
        files[name] = directory / f"{name}.yaml"
        whole = {"task": f"local_{name}", "dataset_path": "json", "dataset_kwargs": {"data_files": paths}, **config}
        files[name].write_text(yaml.safe_dump(whole))
    return files

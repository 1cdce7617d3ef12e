"""Prepared data small enough for a test, and what is in it."""

from __future__ import annotations

import dataclasses
import json
import sysconfig
from pathlib import Path

import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset

from minitron_nemo.artifact import Artifact
from minitron_nemo.config.stages import PrepareDataConfig
from minitron_nemo.stages.prepare_data import run
from minitron_nemo.text.blend import split_prefixes
from minitron_nemo.text.tokenizer import load_tokenizer

STDLIB_FOLDER = Path(sysconfig.get_paths()["stdlib"])


def prepare_config(directory: Path) -> PrepareDataConfig:
    """Real text of three kinds: a package's modules, the same again as JSONL records, and a sentence that looks odd."""
    root = directory / "corpus"
    root.mkdir()
    for file in (STDLIB_FOLDER / "email").glob("*.py"):
        (root / file.name).write_bytes(file.read_bytes())
    records = [{"text": file.read_text()} for file in sorted((STDLIB_FOLDER / "email").glob("*.py"))]
    records += [{"text": f"Record {number} ends with <|endoftext|> before its end."} for number in range(40)]
    (root / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return PrepareDataConfig(output=str(directory / "data"), corpus=str(root), vocab_size=384, validation_fraction=0.2)


def prepare_blend(config: PrepareDataConfig, tokenizer: Path, output: Path) -> Artifact:
    """Two sources with weights 3 and 1, the second much the smaller."""
    corpus = [{"path": config.corpus, "weight": 3}, {"path": str(STDLIB_FOLDER / "json"), "weight": 1, "glob": "*.py"}]
    return run(dataclasses.replace(config, output=str(output), corpus=corpus, tokenizer=str(tokenizer)))


def prepare_instructions(kind: str, tokenizer: Path, directory: Path) -> Artifact:
    """Eighty prompts of different lengths with answers, as `jsonl` or `parquet`."""
    root = directory / "instructions"
    root.mkdir()
    records = [
        {"question": f"Q{'?' * (number % 5)} {number}\nA: ", "answer": f"{number} times {'yes ' * (1 + number % 7)}"}
        for number in range(80)
    ]
    if kind == "jsonl":
        (root / "chat.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), root / "chat.parquet")
    return run(
        PrepareDataConfig(
            output=str(directory / "data"),
            corpus=str(root),
            text_key="answer",
            prompt_key="question",
            tokenizer=str(tokenizer),
            validation_fraction=0.4,
        )
    )


def documents(artifact: Artifact, split: str) -> list[list[int]]:
    return [ids.tolist() for prefix in split_prefixes(artifact, split) for ids in IndexedDataset(prefix)]


def decoded(artifact: Artifact, split: str) -> list[str]:
    tokenizer = load_tokenizer(artifact.path / "tokenizer")
    return [tokenizer.decode(ids[:-1], skip_special_tokens=False) for ids in documents(artifact, split)]


def answers(artifact: Artifact, batch: dict[str, torch.Tensor]) -> str:
    """What a batch's loss mask lets through."""
    tokenizer = load_tokenizer(artifact.path / "tokenizer")
    assert all((batch[key] >= 0).all() for key in ("tokens", "labels"))
    assert set(batch["loss_mask"].unique().tolist()) == {0.0, 1.0}
    return tokenizer.decode(batch["labels"][batch["loss_mask"] == 1], skip_special_tokens=True)

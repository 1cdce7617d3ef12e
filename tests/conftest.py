"""Fixtures every test can ask for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from minitron_nemo.artifact import Artifact
from minitron_nemo.config.stages import PrepareDataConfig
from minitron_nemo.stages import prepare_data
from support.door import Door
from support.nemo_import import import_with_nemo
from support.prepared import prepare_blend, prepare_config, prepare_instructions
from support.ranks import Ranks
from support.tiny import TinyChain, compress_once, write_corpus, write_teacher
from support.tiny_run import TinyRun, make_artifacts, prepare_other_sources

_HEAVY = {"ranks", "door", "slurm_cluster"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what is `quick`; and the longest first, so that no process of `pytest -n` is left alone with it."""
    for item in items:
        if not _HEAVY.intersection(getattr(item, "fixturenames", ())) and not item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.quick)
    items.sort(key=lambda item: item.path.name != "test_readme.py")


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Real gloo ranks: `ranks("tp2").run(function, *args)` returns one result a rank; see support/ranks.py."""
    ranks = Ranks()
    yield ranks
    ranks.close()


@pytest.fixture(scope="session")
def door() -> Iterator[Door]:
    """Commands as a user types them: `door("prune", "recipe=quickstart")`; see support/door.py."""
    door = Door()
    yield door
    door.close()


@pytest.fixture(scope="session")
def tiny_chain(door: Door, tmp_path_factory: pytest.TempPathFactory) -> TinyChain:
    """The quickstart in miniature, run once; tests read its artifacts and write elsewhere."""
    return compress_once(door, tmp_path_factory.mktemp("tiny"))


# ---- one small compression whose artifacts many tests start from: made once, on one process ----


def _tiny_run(ranks: Ranks, directory: Path, *, tied: bool) -> TinyRun:
    corpus = write_corpus(directory / "corpus")
    run = TinyRun(directory, write_teacher(directory / "hf", corpus, tied=tied))
    ranks("single").run(make_artifacts, run, corpus)
    return run


@pytest.fixture(scope="session")
def tiny_run(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    return _tiny_run(ranks, tmp_path_factory.mktemp("tiny"), tied=False)


@pytest.fixture(scope="session")
def tiny_tied_run(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    """The same with the output layer tied to the embedding, whose gradient two pipeline stages add up."""
    return _tiny_run(ranks, tmp_path_factory.mktemp("tiny-tied"), tied=True)


@pytest.fixture(scope="session")
def tiny_blend(tiny_run: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The tiny run's data, and an artifact of two unequal sources of another kind of text."""
    return prepare_other_sources(tiny_run, tmp_path_factory.mktemp("tiny-blend"))


@pytest.fixture(scope="session")
def nemo_checkpoint(ranks: Ranks, tiny_run: TinyRun) -> Path:
    """What NeMo's `llm.import_ckpt` makes of the same HF teacher."""
    output = tiny_run.directory / "nemo_checkpoint"
    ranks("single").run(import_with_nemo, tiny_run.hf, output)
    return output


# ---- prepared data ----


@pytest.fixture(scope="session")
def data_config(tmp_path_factory: pytest.TempPathFactory) -> PrepareDataConfig:
    return prepare_config(tmp_path_factory.mktemp("prepared"))


@pytest.fixture(scope="session")
def prepared(data_config: PrepareDataConfig) -> Artifact:
    return prepare_data.run(data_config)


@pytest.fixture(scope="session")
def blended(data_config: PrepareDataConfig, prepared: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return prepare_blend(data_config, prepared.path / "tokenizer", tmp_path_factory.mktemp("blend") / "data")


@pytest.fixture(scope="session", params=["jsonl", "parquet"])
def instructions(
    request: pytest.FixtureRequest, prepared: Artifact, tmp_path_factory: pytest.TempPathFactory
) -> Artifact:
    directory = tmp_path_factory.mktemp("instructions")
    return prepare_instructions(request.param, prepared.path / "tokenizer", directory)

"""One small compression whose artifacts the engine's tests start from: made once, on one process."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.nemo_import import import_with_nemo
from support.ranks import Ranks
from support.tiny import write_corpus, write_teacher
from support.tiny_run import TinyRun, make_artifacts


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
def nemo_checkpoint(ranks: Ranks, tiny_run: TinyRun) -> Path:
    """What NeMo's `llm.import_ckpt` makes of the same HF teacher."""
    output = tiny_run.directory / "nemo_checkpoint"
    ranks("single").run(import_with_nemo, tiny_run.hf, output)
    return output

"""Fixtures every test can ask for."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from support.door import Door
from support.ranks import Ranks
from support.tiny import TinyChain, compress_once


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

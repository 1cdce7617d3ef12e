"""Fixtures every test can ask for."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from support.ranks import Ranks


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Real gloo ranks: `ranks("tp2").run(function, *args)` returns one result a rank; see support/ranks.py."""
    ranks = Ranks()
    yield ranks
    ranks.close()

"""The real SLURM of these tests, and what happens where there is none."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from support.slurm import SingleNodeSlurm, single_node_slurm, why_no_slurm


@pytest.fixture(scope="session")
def slurm_cluster() -> Iterator[SingleNodeSlurm]:
    """One SLURM for the whole run; tests that ask for it carry the marker `slurm`."""
    reason = why_no_slurm()
    if reason is not None:
        pytest.fail(f"no SLURM can be started: {reason}")  # under CI; elsewhere the test was deselected
    with single_node_slurm() as cluster:
        yield cluster


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Outside CI, skip the tests marked `slurm` where no SLURM can be started; under CI=true let them fail."""
    reason = why_no_slurm()
    if reason is None or os.environ.get("CI", "").lower() in ("true", "1"):
        return
    for item in items:
        if item.get_closest_marker("slurm"):
            item.add_marker(pytest.mark.skip(reason=f"no SLURM: {reason}"))

"""The real SLURM of these tests, and what happens where there is none."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from support.slurm import SingleNodeSlurm, single_node_slurm, why_no_slurm

_DESELECTED = pytest.StashKey[int]()


@pytest.fixture(scope="session")
def slurm_cluster() -> Iterator[SingleNodeSlurm]:
    """One SLURM for the whole run; tests that ask for it carry the marker `slurm`."""
    reason = why_no_slurm()
    if reason is not None:
        pytest.fail(f"no SLURM can be started: {reason}")  # under CI; elsewhere the test was deselected
    with single_node_slurm() as cluster:
        yield cluster


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Outside CI, leave the tests marked `slurm` out where no SLURM can be started; under CI=true let them fail."""
    if why_no_slurm() is None or os.environ.get("CI", "").lower() in ("true", "1"):
        return
    left_out = [item for item in items if item.get_closest_marker("slurm")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]
        config.stash[_DESELECTED] = len(left_out)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if count := config.stash.get(_DESELECTED, 0):
        terminalreporter.write_line(f"{count} tests of SLURM left out: {why_no_slurm()}.")

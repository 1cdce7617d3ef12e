"""One whole run and its report, for tests that only read."""

from __future__ import annotations

import pytest

from minitron_nemo.artifact import Artifact
from minitron_nemo.stages.report import run
from support.report_runs import report_of, write_run


@pytest.fixture(scope="session")
def report(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """The report of a whole run."""
    return run(report_of(write_run(tmp_path_factory.mktemp("run"))))

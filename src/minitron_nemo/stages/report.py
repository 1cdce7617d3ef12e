"""report: from a run directory to one HTML file and one JSON file of what the run came to.

Reads the manifests, histories, scores and plan that are there, says what is not, and computes nothing anew.
One process does it; under several ranks the first, while the others wait.
"""

from __future__ import annotations

from minitron_nemo.artifact import Artifact, open_artifact, writing
from minitron_nemo.config.stages import ReportConfig
from minitron_nemo.parallel import by_rank_zero
from minitron_nemo.report import read_run
from minitron_nemo.report.page import write_report


def inputs(cfg: ReportConfig) -> list[Artifact]:
    """What is there to report. Raises: as `run`."""
    return list(read_run(cfg.run_dir, cfg.rows, cfg.expected_order).artifacts.values())


@by_rank_zero
def run(cfg: ReportConfig) -> Artifact:
    """Write the report of `cfg.run_dir` to `cfg.output`.

    Raises: NothingThere: `run_dir` is not there or holds no finished artifact.
    """
    found = read_run(cfg.run_dir, cfg.rows, cfg.expected_order)
    with writing(cfg.output, stage="report", config=cfg, inputs=list(found.artifacts.values())) as draft:
        values = write_report(found, draft.path)
        draft.metrics["held_out_loss"] = {row["name"]: row["held_out_loss"] for row in values["rows"]}
        draft.metrics["expected_order_holds"] = values["order"]["holds"]
        draft.metrics["missing"] = len(values["missing"])
    return open_artifact(cfg.output, key="output")

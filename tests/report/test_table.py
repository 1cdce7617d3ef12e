"""The same numbers in Python, in the JSON file and on the terminal."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from minitron_nemo.report import summary, summary_table
from minitron_nemo.report.table import count
from minitron_nemo.stages.report import run
from support.report_runs import report_of, write_run


def test_the_summary_is_the_same_in_python_json_and_terminal(tmp_path: Path) -> None:
    config = report_of(write_run(tmp_path))
    before: dict[str, Any] = summary(tmp_path, config.rows, config.expected_order)
    artifact = run(config)

    after = summary(tmp_path, config.rows, config.expected_order)
    assert json.loads((artifact.path / "summary.json").read_text()) == before == after
    shown = io.StringIO()
    Console(width=160, file=shown).print(summary_table(tmp_path, config.rows, config.expected_order))
    for row in before["rows"]:
        assert row["label"] in shown.getvalue() and f"{row['held_out_loss']:.3f}" in shown.getvalue()
    assert "gap to the corrected teacher" in shown.getvalue() and "The expected order holds" in shown.getvalue()


WHAT_THE_TABLE_BRINGS = """
import sys
from minitron_nemo.report import summary_table
assert summary_table(sys.argv[1]).row_count == 7
print(sorted({"nemo", "lightning", "megatron", "matplotlib", "jinja2"} & sys.modules.keys()))
import minitron_nemo.stages.report
print(sorted({"nemo", "lightning"} & sys.modules.keys()))
"""


def test_a_table_is_printed_without_an_engine_and_a_page_drawn_without_a_trainer(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WHAT_THE_TABLE_BRINGS, str(write_run(tmp_path))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["[]", "[]"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "\u2013"),
        (0, "0"),
        (950, "950"),
        (12_345, "12.3k"),
        (999_999, "1.00M"),
        (6_530_000, "6.53M"),
        (8.03e9, "8.03B"),
    ],
)
def test_counts_read_with_three_digits(value: int | None, text: str) -> None:
    assert count(value) == text

"""What a run of stages came to: one HTML file, one JSON file, one table for the terminal."""

from minitron_nemo.report.page import render, write_report
from minitron_nemo.report.rows import summary, summary_table
from minitron_nemo.report.run import Run, read_run

__all__ = ["Run", "read_run", "render", "summary", "summary_table", "write_report"]

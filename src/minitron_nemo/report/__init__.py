"""What a run of stages came to: one HTML file, one JSON file, one table for the terminal.

Numbers and table need no torch; `report.page`, which draws, is imported by who writes the page.
"""

from minitron_nemo.report.rows import summary
from minitron_nemo.report.run import Run, read_run
from minitron_nemo.report.table import summary_table

__all__ = ["Run", "read_run", "summary", "summary_table"]

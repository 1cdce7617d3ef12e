"""transformers 4.57 and the newest one, side by side on the same folders."""

from __future__ import annotations

from pathlib import Path

from support.both_lines import both_lines


def test_every_family_passes_from_and_to_both_lines_of_transformers(tmp_path: Path) -> None:
    table = both_lines(tmp_path)
    worst = {(model, way): cell for model, cells in table.items() for way, cell in cells.items() if cell > 1e-5}
    assert not worst
    assert all(len(cells) == 4 for cells in table.values())

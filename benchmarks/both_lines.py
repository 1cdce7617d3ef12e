"""Does every family pass from and to both lines of transformers: 4.57, which NeMo asks for, and the newest?

Small random models of every family, tied and untied. Either line saves one, which is imported and runs through
Megatron; the imported one is exported and runs in either line. Cells are the largest difference of a logit as a
fraction of the largest logit, in float32. Exits 1 where one is above 1e-5.

`python benchmarks/both_lines.py` keeps the table in benchmarks/results/both_lines.json and prints it as
docs/checkpoints.md has it.
"""

from __future__ import annotations

import json
import sys
import tempfile
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from minitron_nemo import platform
from minitron_nemo.quiet import hush
from support.both_lines import both_lines
from support.transformers5 import transformers4, transformers5

LIMIT = 1e-5
WAYS = ("import 4.57", "import 5.x", "export 4.57", "export 5.x")
_VERSION = "import json, transformers; print(json.dumps(transformers.__version__))"


def main() -> int:
    hush()
    platform.activate()
    with tempfile.TemporaryDirectory() as folder:
        table = both_lines(Path(folder))
    versions = [transformers4(_VERSION), transformers5(_VERSION)]
    print(f"| family | {' | '.join(WAYS)} |\n|---|{'---|' * len(WAYS)}")
    for model, cells in table.items():
        print(f"| {model} | {' | '.join(f'{cells[way]:.0e}' for way in WAYS)} |")
    result = {
        "command": "python benchmarks/both_lines.py",
        "date": date.today().isoformat(),
        "transformers": versions,
        "limit": LIMIT,
        "rows": table,
    }
    path = Path(__file__).parent / "results" / "both_lines.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    return 0 if max(cell for cells in table.values() for cell in cells.values()) <= LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())

"""What teacher and students write after the same prompts, side by side."""

from __future__ import annotations

import json
from typing import Any

from minitron_nemo.checks import reading
from minitron_nemo.report.run import Run

SAMPLES = "samples.json"


def samples_of(run: Run, first: list[str]) -> list[dict[str, Any]]:
    """Of each prompt and mode the continuations of those evaluated: `prompt`, `mode`, and `texts` of (label, text,
    whether it is to be seen at once).

    Args:
        first: names of the models to be seen at once, in this order before the others.
    """
    labels = {model.name: model.label for model in run.models}
    names = [name for name in first if name in run.evaluations]
    names += [name for name in labels if name in run.evaluations and name not in names]
    found: dict[tuple[str, str], list[tuple[str, str, bool]]] = {}
    for name in names:
        file = run.evaluations[name].path / SAMPLES
        if file.is_file():
            with reading(file, "Evaluate again, or copy it again."):
                for each in json.loads(file.read_text(encoding="utf-8")):
                    texts = found.setdefault((each["prompt"], each["mode"]), [])
                    texts.append((labels[name], each["text"], name in first))
    return [{"prompt": prompt, "mode": mode, "texts": texts} for (prompt, mode), texts in found.items()]

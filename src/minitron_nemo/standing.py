"""Does what already stands serve? One rule for every door: an artifact is current, or differs and is said to."""

from __future__ import annotations

from typing import Any

from minitron_nemo.artifact import Artifact, is_artifact, open_artifact
from minitron_nemo.checks import require
from minitron_nemo.config.identity import differences


def serves(config: Any, *, overwrite: bool = False) -> bool:
    """Whether the artifact at a stage config's `output` is finished and what this config and its inputs would make.

    Args:
        overwrite: one that differs does not serve; else that is a mistake.
    Raises: Mistake: it differs, with the first difference in words.
    """
    if not is_artifact(config.output):
        return False
    reason = _difference(open_artifact(config.output), config)
    require(
        reason is None or overwrite,
        f"{config.output} is complete but {reason}. Remove it, choose another run_dir, or set compress.overwrite=true.",
    )
    return reason is None


def _difference(artifact: Artifact, config: Any) -> str | None:
    """What about a finished artifact no longer fits, in words; None where all does."""
    for key, then, now in differences(artifact.manifest["config"], config):
        return f"was made with {key}={then}, not {now}"
    for given in artifact.manifest["inputs"]:
        if is_artifact(given["path"]) and open_artifact(given["path"]).digest != given["digest"]:
            return f"was made from an earlier {given['path']}"
    return None

"""Where the Hydra tree is, and which recipes it holds."""

from __future__ import annotations

from pathlib import Path

WIRING = "wiring"
"""The file that every door composes a recipe over."""


def conf_dir() -> Path:
    """The Hydra tree: inside the installed package, or at the root of a source checkout."""
    package = Path(__file__).parent
    return package / "conf" if (package / "conf").is_dir() else package.parents[1] / "conf"


def recipes() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(path.stem for path in (conf_dir() / "recipe").glob("*.yaml"))

"""Where the Hydra tree is, which recipes it holds, and the groups of a composed one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

WIRING = "wiring"
"""The file that every door composes a recipe over."""


def conf_dir() -> Path:
    """The Hydra tree: inside the installed package, or at the root of a source checkout."""
    package = Path(__file__).parent
    return package / "conf" if (package / "conf").is_dir() else package.parents[1] / "conf"


def recipes() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(path.stem for path in (conf_dir() / "recipe").glob("*.yaml"))


def group_of(config: Any, name: str, kind: type) -> Any:
    """A group at the top of a composed recipe (`slurm`) as its dataclass; its defaults where the recipe has none.

    Raises: Mistake, OmegaConf's errors: a value of the wrong type or range.
    """
    from omegaconf import OmegaConf  # this module is at hand before anything is composed

    return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(kind), config.get(name) or {}))

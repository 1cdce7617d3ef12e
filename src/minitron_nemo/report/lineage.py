"""Which artifact of a run was made from which, as their manifests tell.

A manifest records its inputs by path and digest. The run may have been moved since, so a path that is gone still means
the artifact of that folder name; an input that is no artifact of the run has no name here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from minitron_nemo.artifact import MANIFEST, Artifact


@dataclass(frozen=True)
class Lineage:
    """The artifacts of a run."""

    root: Path
    """The run directory."""
    artifacts: dict[str, Artifact]
    """By name: the path below `root`, or the whole path of one that stands elsewhere."""

    @cached_property
    def _places(self) -> dict[Path, str]:
        return {artifact.path.resolve(): name for name, artifact in self.artifacts.items()}

    def name_of(self, recorded: str | Path) -> str | None:
        """Name of the artifact that a manifest or a config calls by this path; None: it is none of the run's."""
        written = Path(recorded)
        for candidate in (written, self.root / written):
            if candidate.exists() and candidate.resolve() in self._places:
                return self._places[candidate.resolve()]
        return written.name if not written.exists() and written.name in self.artifacts else None

    def made_by(self, stage: str) -> list[str]:
        return [name for name, artifact in self.artifacts.items() if artifact.stage == stage]

    def inputs(self, name: str) -> list[str]:
        """What an artifact was made from, in the order of its manifest: of a distillation the teacher comes first."""
        named = (self.name_of(entry["path"]) for entry in self.artifacts[name].manifest.get("inputs", []))
        return [each for each in named if each is not None]

    def stale_inputs(self, name: str) -> list[str]:
        """Those inputs that have been made anew since."""
        recorded = self.artifacts[name].manifest.get("inputs", [])
        named = [(self.name_of(entry["path"]), entry["digest"]) for entry in recorded]
        return [each for each, digest in named if each is not None and self.artifacts[each].digest != digest]

    def nearest(self, name: str, among: Sequence[str]) -> str | None:
        """Of `among`, the artifact that `name` is or was made from in the fewest steps; of two equally near, the later
        input, which of a distillation is the student."""
        reached, seen = [name], {name}
        while reached:
            found = [each for each in reached if each in among]
            if found:
                return found[-1]
            reached = list(dict.fromkeys(one for each in reached for one in self.inputs(each) if one not in seen))
            seen |= set(reached)
        return None

    def sources_first(self, names: Sequence[str]) -> list[str]:
        """`names` so that each stands after those it was made from, otherwise in the order given."""
        placed: list[str] = []
        seen: set[str] = set()

        def place(name: str) -> None:
            if name in seen:
                return
            seen.add(name)
            for source in self.inputs(name):
                place(source)
            placed.append(name)

        for name in names:
            place(name)
        return [name for name in placed if name in names]

    def newest(self, names: Sequence[str]) -> str | None:
        """The one whose manifest was written last."""
        written = {name: (self.artifacts[name].path / MANIFEST).stat().st_mtime for name in names}
        return max(written, key=lambda name: (written[name], name), default=None)

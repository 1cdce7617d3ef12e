"""What this package stands on: the versions installed here, beside those that it was tried with.

    python -m minitron_nemo.versions               a line each; exit code 1 where one that matters is outside its bounds
    python -m minitron_nemo.versions --missing     what is asked for and not installed, a requirement a line, for pip

The bounds are those of pyproject.toml, read from the metadata of the installed package. The builds of docker/ end where
this does. Nothing heavy is imported, and nothing communicates.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator, Sequence
from importlib import metadata

from packaging.requirements import Requirement

from minitron_nemo.checks import Mistake, require

LAST_IMAGE = "nvcr.io/nvidia/nemo:26.02"
"""NVIDIA's last image with `nemo.collections.llm`; those from 26.04 on train with Megatron-Bridge alone."""
_DECIDE = ("torch", "megatron-core", "nemo-toolkit", "nvidia-modelopt", "transformers", "transformer-engine")
"""Whose versions decide whether anything runs. Bounds of the others are NeMo's own, which images exceed."""
_LLM = "nemo.collections.llm"


def requirements() -> Iterator[Requirement]:
    """What the package asks for on this machine, and transformer-engine, which it can do without.

    Nothing where it runs from a checkout that is not installed.
    """
    lines = metadata.requires("minitron-nemo") if installed("minitron-nemo") else None
    for line in lines or ():
        needed = Requirement(line)
        extra = "gpu" if needed.name == "transformer-engine" else ""
        if needed.marker is None or needed.marker.evaluate({"extra": extra}):
            yield needed


def installed(name: str) -> str | None:
    """Version of a distribution; None where it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def missing() -> list[str]:
    """Requirements of which nothing is installed; transformer-engine is not one of them."""
    names = (each.name for each in requirements() if each.name != "transformer-engine")
    return [_as_asked(name) for name in names if installed(name) is None]


def outside() -> list[str]:
    """A sentence for each installed version that decides and lies outside of what was tried."""
    found = ((each, installed(each.name)) for each in requirements() if each.name in _DECIDE)
    return [
        f"{each.name} {version} is outside {each.specifier}, the versions that minitron_nemo is made for."
        for each, version in found
        if version is not None and not _inside(each, version)
    ]


def require_llm() -> None:
    """Raises: Mistake: NeMo's collection of language models is not installed; with where it is."""
    try:
        found = importlib.util.find_spec(_LLM) is not None
    except ModuleNotFoundError:  # not even NeMo
        found = False
    if not found:
        version = installed("nemo-toolkit")
        raise Mistake(
            f"{_LLM}, which builds and trains the models, is not installed "
            f"({'nor is nemo-toolkit' if version is None else f'nemo-toolkit {version} is'}). "
            f"Take {LAST_IMAGE}, the last image that has it, or pip install '{_as_asked('nemo-toolkit')}'."
        )


def main(argv: Sequence[str]) -> int:
    if list(argv) == ["--missing"]:
        for each in missing():
            print(each)
        return 0
    for needed in requirements():
        version = installed(needed.name)
        note = "" if version is None or _inside(needed, version) else "   outside"
        print(f"{needed.name:<24}{version or '-':<24}{needed.specifier}{note}")
    require(installed("minitron-nemo") is not None, "minitron-nemo is not installed: pip install --no-deps .")
    wrong = outside() + [f"{each} is not installed." for each in missing()]
    try:
        require_llm()
    except Mistake as error:
        wrong.append(str(error))
    if wrong:
        print("\n".join(wrong), file=sys.stderr)
        print(f"Build on {LAST_IMAGE}, or install versions within the bounds.", file=sys.stderr)
    return 1 if wrong else 0


def _inside(needed: Requirement, version: str) -> bool:
    return needed.specifier.contains(version, prereleases=True)  # images have torch 2.10.0a0


def _as_asked(name: str) -> str:
    """A requirement as pip takes it, without its marker."""
    needed = next((each for each in requirements() if each.name == name), Requirement(name))
    extras = f"[{','.join(sorted(needed.extras))}]" if needed.extras else ""
    return f"{name}{extras}{needed.specifier}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

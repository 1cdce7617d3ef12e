"""The project's shell: what the wheel carries, what the pins promise, what make says on the wrong machine."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CONSTRAINTS = (ROOT / "constraints" / "cpu.txt").read_text()


@pytest.fixture(scope="module")
def wheel_names(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Paths inside the wheel that the working tree builds."""
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    (wheel,) = folder.glob("*.whl")
    return set(zipfile.ZipFile(wheel).namelist())


def files_below(folder: Path) -> set[str]:
    return {
        str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and "__pycache__" not in str(path)
    }


def test_the_wheel_carries_the_package_its_configs_and_the_sbatch_template(wheel_names: set[str]) -> None:
    for folder, inside in (("src/minitron_nemo", ""), ("conf", "conf/"), ("slurm", "slurm/")):
        expected = {f"minitron_nemo/{inside}{name}" for name in files_below(ROOT / folder)}
        assert expected <= wheel_names, f"{folder}: not in the wheel: {sorted(expected - wheel_names)}"


def test_the_wheel_carries_nothing_but_the_package(wheel_names: set[str]) -> None:
    assert {name.split("/")[0] for name in wheel_names} == {
        "minitron_nemo",
        f"minitron_nemo-{version()}.dist-info",
    }


def test_every_dependency_is_pinned_within_its_range() -> None:
    pins = {canonicalize_name(pin.name): pin for pin in map(Requirement, pin_lines())}
    for line in [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"]]:
        needed = Requirement(line)
        pin = pins[canonicalize_name(needed.name)]
        (pinned,) = pin.specifier
        assert pinned.operator == "==", f"{pin} is not a pin"
        assert needed.specifier.contains(pinned.version), f"{pin} lies outside {needed}"


def test_pins_hold_on_every_machine() -> None:
    for line in pin_lines():
        assert "+" not in line, f"{line}: a local version exists in one build only"
        assert "@" not in line and "/" not in line, f"{line}: a place, not a version"


@pytest.mark.parametrize("answer", ["exit 1", "exit 127"], ids=["too old", "not there"])
def test_make_names_the_python_it_needs(tmp_path: Path, answer: str) -> None:
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo Python 3.9.2 && exit 0\n{answer}\n')
    python.chmod(0o755)
    done = make("test", f"PYTHON={python}", f"VENV={tmp_path / 'venv'}")
    assert done.returncode != 0
    assert f"{python} is Python 3.9.2, but Python 3.10, 3.11 or 3.12 is needed." in done.stderr
    assert "make PYTHON=python3.11 test" in done.stderr
    assert not (tmp_path / "venv").exists()


@pytest.mark.parametrize("target", ["quickstart", "test", "lint", "bench", "docs"])
def test_every_target_sets_itself_up(tmp_path: Path, target: str) -> None:
    planned = make("--dry-run", target, f"VENV={tmp_path / 'venv'}").stdout
    assert "-m venv" in planned and "-e '.[dev]'" in planned


def test_every_link_in_the_documents_leads_somewhere() -> None:
    broken = []
    for document in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]:
        prose = re.sub(r"```.*?```", "", document.read_text(), flags=re.DOTALL)
        for target in re.findall(r"\]\(([^)\s]+)\)", prose):
            place, _, heading = target.partition("#")
            if re.match(r"[a-z]+:", place):
                continue  # another site: not ours to check on a machine without a network
            file = document.parent / place if place else document
            if not file.exists() or (heading and heading not in headings(file)):
                broken.append(f"{document.relative_to(ROOT)}: {target}")
    assert not broken


def headings(document: Path) -> set[str]:
    """The anchors of a Markdown file: lower case, no punctuation, dashes for blanks."""
    titles = re.findall(r"^#+ +(.+?) *$", document.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def pin_lines() -> list[str]:
    return [line for line in CONSTRAINTS.splitlines() if line and not line.startswith("#")]


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["make", "-C", str(ROOT), *arguments], capture_output=True, text=True)


def version() -> str:
    text = (ROOT / "src" / "minitron_nemo" / "__init__.py").read_text()
    match = re.search(r'__version__ = "(.+)"', text)
    assert match is not None
    return match[1]

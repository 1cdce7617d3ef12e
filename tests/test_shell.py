"""The project's shell: what the wheel carries, what the pins promise, what make says on the wrong machine."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from importlib import metadata
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
INSTALLED, LEFT_OUT = ("cpu.txt", "cpu-tests.txt"), "cpu-unused.txt"
"""What `make` installs of constraints/ for a CPU, and what it leaves out."""


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


def test_what_is_installed_asks_for_nothing_but_pins_and_what_is_left_out() -> None:
    """No resolver has a word in it: the pins are whole on this interpreter, each within the range that asks for it."""
    pinned = pins(*INSTALLED, LEFT_OUT)
    asked = {("minitron-nemo", line) for line in (*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"])}
    reached: set[str] = set()
    while asked:
        by, line = asked.pop()
        needed = Requirement(line)
        name = canonicalize_name(needed.name)
        assert name in pinned, f"{by} asks for {line}, of which constraints/ has no pin"
        assert needed.specifier.contains(pinned[name]), f"{name}=={pinned[name]}: {by} asks for {line}"
        for extra in {"", *needed.extras} if name not in pins(LEFT_OUT) else ():
            if f"{name}[{extra}]" not in reached:
                reached.add(f"{name}[{extra}]")
                asked |= {(name, each) for each in metadata.requires(name) or () if applies(each, extra)}
    needless = pins(*INSTALLED).keys() - {each.partition("[")[0] for each in reached} - {"setuptools"}
    assert not needless, "installed, and nothing asks for it"


def applies(line: str, extra: str) -> bool:
    """Whether a line is asked for on this machine; CUDA's libraries come with the torch that was built for them."""
    needed = Requirement(line)
    cuda = re.match(r"nvidia-(?!ml-py|modelopt)|cuda-toolkit", needed.name)
    return not cuda and (needed.marker is None or needed.marker.evaluate({"extra": extra}))


@pytest.mark.skipif("CI" not in os.environ, reason="an environment that make did not make may have more")
def test_what_is_left_out_is_not_there() -> None:
    """The rest of the suite is the proof that nothing imports it."""
    there = {canonicalize_name(each.metadata["Name"]) for each in metadata.distributions()}
    with_cuda = {"cuda-bindings", "cuda-pathfinder"}  # which a torch that was built for it brings
    assert not there & (pins(LEFT_OUT).keys() - with_cuda)


@pytest.mark.parametrize("version", ["3.10", "3.11", "3.12"])
def test_every_interpreter_has_one_pin_of_a_package(version: str) -> None:
    names = [canonicalize_name(each.name) for each in pin_lines(*INSTALLED, LEFT_OUT) if holds(each, version)]
    assert sorted(names) == sorted(set(names))
    for line in (*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"]):
        needed = Requirement(line)
        pinned = pins(*INSTALLED, version=version)[canonicalize_name(needed.name)]
        assert needed.specifier.contains(pinned), f"Python {version}: {needed.name}=={pinned} lies outside {needed}"


def test_pins_hold_on_every_machine() -> None:
    for each in pin_lines(*INSTALLED, LEFT_OUT):
        (pinned,) = each.specifier
        assert pinned.operator == "==" and each.url is None, f"{each} is not a pin"
        assert "+" not in pinned.version, f"{each}: a local version exists in one build only"


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
    assert "-m venv" in planned and "-e ." in planned
    assert target == "quickstart" or "constraints/cpu-tests.txt" in planned or "-e '.[dev]'" in planned


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


def pin_lines(*files: str) -> list[Requirement]:
    lines = [line for file in files for line in (ROOT / "constraints" / file).read_text().splitlines()]
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def holds(pin: Requirement, version: str) -> bool:
    return pin.marker is None or pin.marker.evaluate({"python_version": version})


def pins(*files: str, version: str = f"{sys.version_info[0]}.{sys.version_info[1]}") -> dict[str, str]:
    """Version of each package that is pinned for an interpreter."""
    found = {}
    for each in pin_lines(*files):
        if holds(each, version):
            (pinned,) = each.specifier
            found[canonicalize_name(each.name)] = pinned.version
    return found


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["make", "-C", str(ROOT), *arguments], capture_output=True, text=True)


def version() -> str:
    text = (ROOT / "src" / "minitron_nemo" / "__init__.py").read_text()
    match = re.search(r'__version__ = "(.+)"', text)
    assert match is not None
    return match[1]

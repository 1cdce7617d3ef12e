"""What docker/ builds, as far as a machine without Docker can tell: what is copied, and what ends a build."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from minitron_nemo.versions import LAST_IMAGE
from support.door import ROOT

DOCKER = ROOT / "docker"
ON_THE_IMAGE = ("Dockerfile", "minitron.def")
CHECK = "python -m minitron_nemo.versions"


def copied(file: Path) -> set[str]:
    """Paths of the checkout that a Dockerfile or an Apptainer definition copies."""
    if file.suffix == ".def":
        section = re.search(r"^%files\n((?: +.+\n)+)", file.read_text(), flags=re.MULTILINE)
        assert section is not None
        return {line.split()[0] for line in section[1].splitlines()}
    lines = re.findall(r"^COPY (.+) \S+$", file.read_text(), flags=re.MULTILINE)
    return {path for line in lines for path in line.split()}


BUILDS = sorted(path for path in DOCKER.iterdir() if path.name.startswith("Dockerfile") or path.suffix == ".def")


@pytest.mark.parametrize("file", BUILDS, ids=lambda file: file.name)
def test_what_a_build_copies_is_there_and_all_that_installing_needs(file: Path) -> None:
    paths = copied(file)
    assert {"pyproject.toml", "README.md", "LICENSE", "src", "conf", "slurm"} <= paths
    for path in paths:
        assert (ROOT / path).exists(), f"{file.name} copies {path}"


def test_nothing_but_that_is_sent_to_docker() -> None:
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert rules[0] == "*", "no .venv, no .git, no runs"
    let_in = {rule[1:] for rule in rules if rule.startswith("!")}
    assert let_in == set().union(*map(copied, BUILDS))


@pytest.mark.parametrize("name", ON_THE_IMAGE)
def test_a_build_starts_from_the_last_image_with_nemo_and_checks_it(name: str) -> None:
    text = (DOCKER / name).read_text()
    assert re.search(rf"^(ARG NEMO_IMAGE=|From: ){re.escape(LAST_IMAGE)}$", text, flags=re.MULTILINE)
    assert "docker/install.sh" in text and CHECK in (DOCKER / "install.sh").read_text()


def test_a_build_from_package_indices_checks_what_it_got() -> None:
    assert CHECK in (DOCKER / "Dockerfile.pip").read_text()


# ---- the check -------------------------------------------------------------------------------------------------------


def check(*in_front: Path) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(map(str, (*in_front, ROOT / "src", os.environ.get("PYTHONPATH", ""))))
    command = [sys.executable, *CHECK.split()[1:]]
    return subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=False)


def other_version(folder: Path, name: str, version: str) -> Path:
    """A folder that makes a distribution be of another version for whoever has it in front."""
    where = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    where.mkdir(parents=True)
    (where / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    return folder


def test_this_environment_passes_and_every_version_is_printed() -> None:
    done = check()
    assert done.returncode == 0, done.stderr
    assert re.search(r"^megatron-core +0\.1\d\.\d+ +<0\.17,>=0\.15$", done.stdout, flags=re.MULTILINE)


@pytest.mark.parametrize(
    ("name", "version", "message"),
    [
        ("megatron-core", "0.17.0", "megatron-core 0.17.0 is outside <0.17,>=0.15"),
        ("megatron-core", "0.14.0", "megatron-core 0.14.0 is outside <0.17,>=0.15"),
        ("nemo-toolkit", "2.5.0", "nemo-toolkit 2.5.0 is outside <2.8,>=2.7"),
        ("transformer-engine", "2.20.2", "transformer-engine 2.20.2 is outside <2.13,>=2.2"),
    ],
)
def test_a_version_outside_of_what_was_tried_ends_the_build(
    tmp_path: Path, name: str, version: str, message: str
) -> None:
    done = check(other_version(tmp_path, name, version))
    assert done.returncode == 1
    assert message in done.stderr and f"Build on {LAST_IMAGE}" in done.stderr


@pytest.mark.parametrize(
    ("name", "version"),
    [("torch", "2.10.0a0+b4e4ee8"), ("megatron-core", "0.16.0rc0+abc1234"), ("transformer-engine", "2.12.0+1234abc")],
)
def test_versions_as_nvidias_images_write_them_pass(tmp_path: Path, name: str, version: str) -> None:
    assert check(other_version(tmp_path, name, version)).returncode == 0


STUB = """#!/bin/sh
echo "$@" >>"$LOG"
case "$*" in
    *--missing) echo "lm-eval>=0.4.9,<0.5" ;;
    "-m minitron_nemo.versions") exit "$VERSIONS" ;;
esac
"""


@pytest.mark.parametrize("versions", [0, 1])
def test_an_image_keeps_what_it_has_and_a_failed_check_ends_the_build(tmp_path: Path, versions: int) -> None:
    (tmp_path / "python").write_text(STUB)
    (tmp_path / "python").chmod(0o755)
    log = tmp_path / "log"
    variables = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "LOG": str(log), "VERSIONS": str(versions)}
    done = subprocess.run(["sh", DOCKER / "install.sh"], env=os.environ | variables, check=False)
    assert done.returncode == versions
    installed = [line for line in log.read_text().splitlines() if "pip install" in line]
    assert "--no-deps ." in installed[0]
    assert re.search(r" -c \S+image\.txt -r \S+missing\.txt$", installed[1])
    assert ("minitron_nemo.nemo.implementation" in log.read_text()) == (versions == 0)


def without_llm(folder: Path) -> Path:
    """NeMo as images from 26.04 on have it: without the collection of language models."""
    (folder / "nemo" / "collections").mkdir(parents=True)
    for package in (folder / "nemo", folder / "nemo" / "collections"):
        (package / "__init__.py").touch()
    return other_version(folder, "nemo-toolkit", "3.0.0")


def test_an_image_without_language_models_is_refused_with_the_tag_that_has_them(tmp_path: Path) -> None:
    done = check(without_llm(tmp_path))
    assert done.returncode == 1
    assert "nemo-toolkit 3.0.0 is outside <2.8,>=2.7" in done.stderr
    assert "nemo.collections.llm, which builds and trains the models, is not installed" in done.stderr


def test_a_command_there_says_in_one_line_what_is_missing_and_where_it_is(tmp_path: Path) -> None:
    path = os.pathsep.join(map(str, (without_llm(tmp_path), ROOT / "src", os.environ.get("PYTHONPATH", ""))))
    done = subprocess.run(
        [sys.executable, "-m", "minitron_nemo.cli", "import-hf", "recipe=quickstart", f"run_dir={tmp_path / 'run'}"],
        env=os.environ | {"PYTHONPATH": path},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines() == [
        "minitron import-hf: nemo.collections.llm, which builds and trains the models, is not installed (nemo-toolkit "
        f"3.0.0 is). Take {LAST_IMAGE}, the last image that has it, or "
        "pip install 'nemo-toolkit[common-only,lightning]<2.8,>=2.7'."
    ]

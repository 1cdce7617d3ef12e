"""What `make lint` says about a house that goes too far, and that it shows any version of it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

HOUSE = Path(__file__).with_name("house.py")
FLOORS = """
[[tool.importlinter.contracts]]
type = "layers"
layers = ["upper", "(left) | right", "lower"]
"""
FILES = {
    "__init__.py": "",
    "upper/__init__.py": "from minitron_nemo.left import long",
    "left/__init__.py": "",
    "left/long.py": "from minitron_nemo import lower\ndef endless():\n" + "    pass\n" * 60,
    "left/talks.py": "import torch\n\n\ndef wait() -> None:\n    torch.distributed.barrier()\n",
    "right/__init__.py": "import minitron_nemo.left.talks",
    "lower.py": "\n" * 500 + "import minitron_nemo.upper\n",
    "platform/__init__.py": "import torch.distributed",
}


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> str:
    checkout = tmp_path_factory.mktemp("house")
    (checkout / "pyproject.toml").write_text(FLOORS)
    for name, text in FILES.items():
        file = checkout / "src" / "minitron_nemo" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    for name in ("test_one.py", "upper/test_one.py", "upper/test_two.py"):
        file = checkout / "tests" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    done = subprocess.run([sys.executable, HOUSE, checkout], capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    return done.stdout


def test_a_circle_of_rooms_and_of_files_is_shown(said: str) -> None:
    assert "circles of rooms: 1\n    left, lower, upper\n" in said
    assert "circles of files: 1\n    left.long, lower, upper\n" in said


def test_an_arrow_to_a_floor_above_or_to_an_independent_sibling_runs_back(said: str) -> None:
    assert "arrows that run back: 2 of 4\n    lower -> upper\n    right -> left.talks\n" in said


def test_what_is_beyond_a_limit_is_named_with_it(said: str) -> None:
    assert said.endswith(
        "left.long.endless has 61 lines; the limit of a function is 60.\n"
        "left.talks names torch.distributed; only parallel, platform, runtime may.\n"
        "lower has 501 lines; the limit of a module is 500.\n"
        "tests/test_one.py and tests/upper/test_one.py have one name; pytest wants two.\n"
    )


def test_rooms_are_shown_with_their_files_and_lines(said: str) -> None:
    assert [line.split() for line in said.splitlines()[1:3]] == [["left/", "3", "67"], ["platform/", "1", "1"]]
    assert "lines of a module: median 1, p90 501, max 501 (lower)\nlongest function: 61 (left.long.endless)\n" in said

"""The commands of the README and of the real model's page, run as a reader types them: one after the other in one
terminal, in a checkout of one's own, whose recipes take fewer and smaller steps.

Blocks marked ```bash are run to the last line. What needs a cluster, a container or files of the reader's stands in
blocks marked ```console, with a `$` before each command; those of `minitron` still have to name keys that exist.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from minitron_nemo.cli import DOORS, LOOKS
from minitron_nemo.conf_tree import recipes
from minitron_nemo.recipe import compose
from support.door import ROOT, environment
from support.patience import run_patiently

README = ROOT / "README.md"
NOT_RUN = {
    "make test": "it is what runs this test",
    "make docs": "it runs this test",
    "make lint": "continuous integration runs it beside the tests",
}
_STEPS = {"steps": 4, "optim": {"warmup_steps": 1}}
IN_SMALL = {
    "quickstart": {
        "trainer": {"micro_batch_size": 2, "global_batch_size": 4},
        "correct_teacher": {"training": _STEPS},
        "estimate_importance": {"importance": {"num_samples": 16}},
        "prune_calibrated": {"surgery": {"sequential": {"num_samples": 16}}},
        "distill": {"training": _STEPS | {"validation_every": 2, "validation_batches": 1}},
        "evaluate": {"num_samples": 16, "new_tokens": 4},
    },
    "real": {
        "trainer": {"micro_batch_size": 2, "global_batch_size": 2},
        "estimate_importance": {"importance": {"num_samples": 4}},
        "prune_calibrated": {"surgery": {"sequential": {"num_samples": 4}}},
        "distill": {"training": _STEPS | {"steps": 2}},
        "evaluate": {"num_samples": 4},
    },
}
"""What is changed in a recipe: the commands are to be seen working, and what they find stands in the pages."""
OF_OUR_MAKE = ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "VENV", "PYTHON", "OMP_NUM_THREADS", "VIRTUAL_ENV")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What a clone of this working tree would hold, with the environment that runs this test as its .venv, and recipes
    `IN_SMALL`.

    `make` finds the environment newer than what it is made from, and installs nothing.
    """
    copy = tmp_path / "minitron-nemo"
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy / name)
    for name, changes in IN_SMALL.items():
        recipe = copy / "conf" / "recipe" / f"{name}.yaml"
        header, *_ = recipe.read_text().splitlines()
        recipe.write_text(f"{header}\n{OmegaConf.to_yaml(OmegaConf.merge(OmegaConf.load(recipe), changes))}")
    (copy / ".venv").mkdir()
    for part in ("bin", "lib", "pyvenv.cfg"):  # all that makes a Python there the environment's, also for pip
        if (Path(sys.prefix) / part).exists():
            (copy / ".venv" / part).symlink_to(Path(sys.prefix) / part)
    (copy / ".venv" / ".installed").touch()
    return copy


@pytest.mark.slow
def test_the_commands_run_as_written(checkout: Path) -> None:
    commands = [command for command in run_blocks(README.read_text()) if command not in NOT_RUN]
    assert commands, f"{README.name} has no ```bash block"
    code, screen = type_in(checkout, commands)
    assert code == 0, screen[screen.rfind("\n$ ") :]
    if "make quickstart" in commands:
        assert (checkout / "runs" / "quickstart" / "export" / "config.json").is_file()
        assert (checkout / "runs" / "quickstart" / "report" / "report.html").is_file()


SMOLLM2_TOKENS = {
    "a 12": ["a", "Ġ", "1", "2"],  # digits one by one, and the space before them alone
    "\n\n3": ["ĊĊ", "3"],
    "  42": ["ĠĠ", "4", "2"],
    "<|im_start|>user\nhi<|im_end|>": ["<|im_start|>", "user", "Ċ", "hi", "<|im_end|>"],
}


@pytest.mark.slow
def test_the_published_model_is_compressed_as_its_page_says(checkout: Path) -> None:
    from transformers import AutoTokenizer

    code, screen = type_in(checkout, run_blocks((ROOT / "docs" / "real_model.md").read_text()))
    assert code == 0, screen[screen.rfind("\n$ ") :]
    run = checkout / "runs" / "real"
    manifest = json.loads((run / "teacher" / "manifest.json").read_text())
    assert manifest["facts"]["source"]["tensor_types"] == {"Q8_0": 1, "F32": 61, "Q4_1": 210}
    tokenizer = AutoTokenizer.from_pretrained(run / "export")
    assert {text: tokenizer.tokenize(text) for text in SMOLLM2_TOKENS} == SMOLLM2_TOKENS
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    assert tokenizer("hi")["input_ids"] == tokenizer.encode("hi", add_special_tokens=False)  # the file: no BOS


def test_a_command_that_fails_ends_the_session_and_stands_last(tmp_path: Path) -> None:
    code, screen = type_in(tmp_path, ["word=kept", "cd /", 'echo "$word" in $PWD', "false | cat", "echo not reached"])
    assert code != 0
    assert '$ echo "$word" in $PWD\nkept in /\n' in screen
    assert screen[screen.rfind("\n$ ") :] == "\n$ false | cat\n"


def test_commands_that_are_only_shown_name_keys_that_exist() -> None:
    known = set(recipes())
    for command in shown_commands(README.read_text()):
        program, *words = shlex.split(command)
        if program == "torchrun":
            (script,) = (word for word in words if word.startswith("launch/"))
            words = [Path(script).stem.replace("_", "-"), *words[words.index(script) + 1 :]]
        elif program != "minitron" or words[0] in LOOKS:
            continue
        door, *overrides = words
        assert door in DOORS, command
        # a reader's own recipe is not here: the quickstart's keys are every recipe's
        own = [word for word in overrides if word.startswith("recipe=") and word[7:] not in known]
        compose(["recipe=quickstart" if word in own else word for word in overrides])


def test_no_command_stands_outside_the_blocks_that_are_run_or_shown() -> None:
    command = re.compile(r"^\$? *(minitron|make|torchrun|python|pip|docker|sbatch|srun) ", flags=re.MULTILINE)
    for language, body in fenced_blocks(README.read_text()):
        assert language in ("bash", "console") or not command.search(body), f"```{language} holds a command:\n{body}"


def test_blocks_are_read_as_a_terminal_reads_them() -> None:
    first = "```bash\n# set up\nmake quickstart\n\nminitron prune \\\n    recipe=quickstart\n```\n"
    second = (
        "1. Then:\n   ```console\n   $ minitron submit recipe=mine\n   job 1: prune\n   ```\n```yaml\nmake: true\n```\n"
    )
    text = first + second
    assert run_blocks(text) == ["make quickstart", "minitron prune \\\n    recipe=quickstart"]
    assert shown_commands(text) == ["minitron submit recipe=mine"]
    assert [language for language, _ in fenced_blocks(text)] == ["bash", "console", "yaml"]


def run_blocks(markdown: str) -> list[str]:
    """The commands of the ```bash blocks, in order; lines joined by a backslash are one command, as written."""
    body = "\n".join(body for language, body in fenced_blocks(markdown) if language == "bash")
    lines = re.split(r"(?<!\\)\n", body)
    return [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]


def shown_commands(markdown: str) -> list[str]:
    """The commands of the ```console blocks: what follows a `$`; the rest is what they print."""
    body = "\n".join(body for language, body in fenced_blocks(markdown) if language == "console")
    lines = re.sub(r"\\\n *", "", body).splitlines()
    return [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]


def fenced_blocks(markdown: str) -> list[tuple[str, str]]:
    """(language, text) of every fenced block, its indentation taken off."""
    found = re.findall(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```$", markdown, flags=re.MULTILINE | re.DOTALL)
    return [(language, re.sub(rf"^{indent}", "", body, flags=re.MULTILINE)) for indent, language, body in found]


def type_in(directory: Path, commands: list[str]) -> tuple[int, str]:
    """Run the commands in one bash session, each shown after a `$`; it ends at the first that fails.

    Returns: exit code, everything the session printed.
    """
    script = ["set -e -o pipefail"]
    for command in commands:
        script += [f"printf '\\n$ %s\\n' {shlex.quote(command)}", command]
    variables = {name: value for name, value in environment().items() if name not in OF_OUR_MAKE}
    done = run_patiently(
        ["bash", "-c", "\n".join(script)],
        cwd=directory,
        # the checkout's own sources, wherever the environment's installation points; torchrun on a free port
        env=variables | {"PYTHONPATH": str(directory / "src"), "PET_STANDALONE": "1"},
        stdin=subprocess.DEVNULL,
        stderr=subprocess.STDOUT,
        errors="replace",
    )
    return done.returncode, done.stdout

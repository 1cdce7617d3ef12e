"""An artifact is complete or not there at all."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from minitron_nemo.artifact import Artifact, is_artifact, open_artifact, saying_when_full, writing
from minitron_nemo.checks import CannotWrite
from minitron_nemo.config.identity import how
from minitron_nemo.mistakes import explain
from support.artifacts import contents, full_disk
from support.door import environment
from support.tiny_run import TinyRun, make_artifacts


def write(output: Path, text: str = "a", *, inputs: Any = (), **config: Any) -> Artifact:
    with writing(output, stage="prune", config=config, inputs=inputs) as draft:
        (draft.path / "folder").mkdir()
        (draft.path / "folder" / "weights").write_text(text)
        draft.metrics["parameters"] = len(text)
        draft.facts["vocab_size"] = 512
    return open_artifact(output)


def write_half(output: Path, error: BaseException) -> None:
    with writing(output, stage="prune", config={}) as draft:
        (draft.path / "weights").write_text("half")
        raise error


def test_an_artifact_says_what_made_it_from_what_and_what_it_measured(tmp_path: Path) -> None:
    teacher = write(tmp_path / "teacher")
    student = write(tmp_path / "student", "abc", inputs=[teacher], seed=7)
    assert student.stage == "prune" and student.metrics == {"parameters": 3} and student.facts == {"vocab_size": 512}
    assert student.manifest["config"] == {"seed": 7}
    assert student.manifest["inputs"] == [{"path": str(teacher.path), "stage": "prune", "digest": teacher.digest}]
    assert student.manifest["files"] == {"folder/weights": {"bytes": 3, "sha256": hashlib.sha256(b"abc").hexdigest()}}
    assert {"torch", "megatron-core", "nemo-toolkit"} <= student.manifest["versions"].keys()
    assert student.manifest["numerics"]["float32_products"] == "float32"


def test_nothing_stands_at_the_output_while_it_is_written(tmp_path: Path) -> None:
    output = tmp_path / "student"
    with writing(output, stage="prune", config={}) as draft:
        (draft.path / "weights").write_text("half")
        assert not output.exists() and not is_artifact(draft.path)
    assert is_artifact(output) and os.listdir(tmp_path) == ["student"]


def test_a_directory_whose_writing_was_cut_off_is_not_mistaken_for_an_artifact(tmp_path: Path) -> None:
    killed = "import os, sys; from minitron_nemo.artifact import writing\n" + (
        f"with writing({str(tmp_path / 'student')!r}, stage='prune', config={{}}) as draft:\n"
        "    (draft.path / 'weights').write_text('half'); os._exit(9)"
    )
    subprocess.run([sys.executable, "-c", killed], check=False, env=environment())
    assert os.listdir(tmp_path) == ["student.partial"]
    for place in ("student", "student.partial"):
        with pytest.raises(FileNotFoundError, match=place):
            open_artifact(tmp_path / place)
    assert open_artifact(write(tmp_path / "student").path).stage == "prune"  # the next run takes its place
    assert os.listdir(tmp_path) == ["student"]


KILLED_AT_EACH_MOMENT = """
import os, shutil, sys
from pathlib import Path
from minitron_nemo import artifact

def killed_before(act, moments, moment):
    def acts(*args, **kwargs):
        if next(moments) == moment:
            os._exit(9)
        return act(*args, **kwargs)
    return acts

for output in map(Path, sys.argv[1:]):
    moment = int(output.parent.name)
    if os.fork() == 0:
        with artifact.writing(output, stage="prune", config={}) as draft:
            (draft.path / "weights").write_text("newer")
            moments = iter(range(1, 100))
            Path.rename = killed_before(Path.rename, moments, moment)
            artifact.shutil.rmtree = killed_before(shutil.rmtree, moments, moment)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.wait()[1]) == 9, output
"""


def test_a_kill_at_any_moment_of_the_change_leaves_the_older_or_the_newer_artifact(tmp_path: Path) -> None:
    # renames and removals at the end: the manifest's, of what an earlier kill left, aside, in its place, of the older
    expected = {"replaced": ["older"] * 3 + ["newer"] * 2, "new": [None, "newer", "newer"]}
    outputs = [tmp_path / kind / str(moment + 1) / "it" for kind in expected for moment in range(len(expected[kind]))]
    for output in outputs:
        output.parent.mkdir(parents=True)
        if "replaced" in output.parts:
            with writing(output, stage="prune", config={}) as draft:
                (draft.path / "weights").write_text("older")
    done = subprocess.run([sys.executable, "-c", KILLED_AT_EACH_MOMENT, *map(str, outputs)], env=environment())
    assert done.returncode == 0
    for output, text in zip(outputs, expected["replaced"] + expected["new"], strict=True):
        if text is None:
            with pytest.raises(FileNotFoundError):
                open_artifact(output)
        else:
            assert (open_artifact(output, verify=True).path / "weights").read_text() == text, output
        assert write(output, "newest").manifest["files"].keys() == {"folder/weights"}
        assert os.listdir(output.parent) == ["it"]


def test_what_a_person_put_aside_is_theirs(tmp_path: Path) -> None:
    write(tmp_path / "student", "mine").path.rename(tmp_path / "student.old")
    for text in ("new", "newer"):
        write(tmp_path / "student", text)
    assert (tmp_path / "student.old" / "folder" / "weights").read_text() == "mine"


def test_a_text_that_is_no_path_is_no_artifact() -> None:
    assert not is_artifact("x" * 5000)


def test_an_artifact_that_cannot_be_made_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CannotWrite, match="run_dir") as raised:
        write(tmp_path / "file" / "student")
    assert explain(raised.value, "prune", []).startswith(f"{tmp_path / 'file' / 'student'} cannot be made there (")


@pytest.mark.parametrize("error", [ValueError("does not fit"), KeyboardInterrupt(), OSError("unplugged")])
def test_an_error_while_writing_leaves_the_older_artifact_as_it_was(tmp_path: Path, error: BaseException) -> None:
    older = write(tmp_path / "student")
    before = contents(tmp_path)
    with pytest.raises(type(error)):
        write_half(tmp_path / "student", error)
    assert contents(tmp_path) == before and open_artifact(older.path).digest == older.digest


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with full_disk(tmp_path, kibibytes=64) as directory:
        yield directory


def test_a_full_disk_is_named_and_leaves_the_older_artifact_as_it_was(small_disk: Path) -> None:
    older = write(small_disk / "student")
    before = contents(small_disk)
    with pytest.raises(OSError, match=r"No space left while writing .*student; what stood there before is intact"):
        write(small_disk / "student", "a" * 100_000)
    assert contents(small_disk) == before and open_artifact(older.path).digest == older.digest


@pytest.mark.parametrize("writer", ["python", "numpy", "safetensors", "torch"])
def test_a_full_disk_is_recognised_whoever_writes(small_disk: Path, writer: str) -> None:
    import numpy as np
    import torch
    from safetensors.torch import save_file

    file = small_disk / "file"
    write_much = {
        "python": lambda: file.write_bytes(bytes(200_000)),
        "numpy": lambda: np.save(file, np.zeros(200_000)),
        "safetensors": lambda: save_file({"x": torch.zeros(200_000)}, file),
        "torch": lambda: torch.save(torch.zeros(200_000), file),
    }[writer]
    with pytest.raises(OSError, match="No space left while writing"), saying_when_full(small_disk / "student"):
        write_much()


def test_an_error_that_is_not_about_the_disk_stays_what_it_is() -> None:
    with pytest.raises(ValueError, match="another matter"), saying_when_full(Path("student")):
        raise ValueError("another matter")


def test_a_place_where_nothing_can_be_made_is_named_with_its_mend(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"file/student cannot be made there .* Set run_dir or this step's output"):
        write(tmp_path / "file" / "student")


def test_the_digest_changes_with_config_inputs_and_content(tmp_path: Path) -> None:
    teacher, other = write(tmp_path / "teacher"), write(tmp_path / "other", "another")

    def digest(text: str = "a", teacher: Artifact = teacher, **config: Any) -> str:
        return write(tmp_path / "student", text, inputs=[teacher], **config).digest

    first = digest()
    assert digest() == first
    assert len({first, digest(seed=1), digest(teacher=other), digest("ab"), digest("b")}) == 5  # also of equal size


def test_the_digest_knows_no_places(tmp_path: Path) -> None:
    def student(run: Path, corpus: Path) -> Artifact:
        teacher = write(run / "teacher")
        data = [{"path": str(run / "data"), "weight": 1}]
        return write(run / "student", inputs=[teacher], model=f"{run}//teacher", data=data, corpus=str(corpus))

    one, another = (student(tmp_path / run, tmp_path / "corpus") for run in ("one", "another_run"))
    assert one.digest == another.digest
    assert one.manifest["config"] != another.manifest["config"]
    # what is neither an input nor beside the output is known by its path alone
    assert student(tmp_path / "one", tmp_path / "other").digest != one.digest


@dataclasses.dataclass
class Stage:
    size: int = 1
    micro_batch_size: int = how(1)
    output: str = how("")


def test_the_digest_knows_nothing_of_how_a_step_ran(tmp_path: Path) -> None:
    def digest(config: Stage, seconds: str) -> str:
        with writing(tmp_path / "student", stage="prune", config=config) as draft:
            (draft.path / "weights").mkdir()
            (draft.path / "weights" / "__0_0.distcp").write_text("tensors")
            for name in ("weights/.metadata", "history.jsonl"):
                (draft.path / name).write_text(seconds)
            draft.metrics["tokens_per_second"] = float(seconds)
        return open_artifact(tmp_path / "student", verify=True).digest

    assert digest(Stage(), "1.0") == digest(Stage(micro_batch_size=4, output="student"), "2.5")
    assert digest(Stage(), "1.0") != digest(Stage(size=2), "1.0")


def test_the_same_run_in_another_directory_makes_the_same_things(ranks: Any, tiny_run: TinyRun, tmp_path: Path) -> None:
    for given in ("hf", "corpus"):
        shutil.copytree(tiny_run.directory / given, tmp_path / given)
    again = TinyRun(tmp_path, tmp_path / "hf")
    ranks("single").run(make_artifacts, again, tmp_path / "corpus")
    for step in ("teacher", "data", "importance", "student"):
        found, expected = (open_artifact(run.directory / step) for run in (again, tiny_run))
        assert found.digest == expected.digest, step
        assert found.path != expected.path


def test_sizes_and_small_files_are_checked_at_every_opening_and_large_ones_when_asked(tmp_path: Path) -> None:
    with writing(tmp_path / "student", stage="prune", config={}) as draft:
        (draft.path / "folder").mkdir()
        for name, size in {"folder/small": 2**20, "folder/large": 2**20 + 1}.items():
            (draft.path / name).write_bytes(bytes(size))
    artifact = open_artifact(tmp_path / "student", verify=True)
    for name, opens in {"folder/small": False, "folder/large": True}.items():
        file, is_not = artifact.path / name, f"model={artifact.path} is not as prune made it: {name}"
        whole = file.read_bytes()
        file.write_bytes(whole[:-1] + b"x")
        with pytest.raises(ValueError, match=f"{is_not} has other contents. Make it again, or copy it again."):
            open_artifact(artifact.path, key="model", verify=opens)
        if opens:
            assert open_artifact(artifact.path, key="model").digest == artifact.digest
        file.write_bytes(whole[:-1])
        with pytest.raises(ValueError, match=f"{is_not} has {len(whole) - 1} bytes, not {len(whole)}"):
            open_artifact(artifact.path, key="model")
        file.unlink()
        with pytest.raises(ValueError, match=f"{is_not} is gone"):
            open_artifact(artifact.path, key="model")
        file.write_bytes(whole)
    assert open_artifact(artifact.path, verify=True) == artifact


def test_a_manifest_of_an_earlier_version_which_holds_no_digest_of_itself_opens(tmp_path: Path) -> None:
    artifact = write(tmp_path / "student")
    file = artifact.path / "manifest.json"
    file.write_text(json.dumps({key: value for key, value in json.loads(file.read_text()).items() if key != "sha256"}))
    assert open_artifact(artifact.path) == artifact


def test_an_artifact_of_another_stage_is_refused_with_the_key_that_named_it(tmp_path: Path) -> None:
    write(tmp_path / "student")
    assert open_artifact(tmp_path / "student", made_by=["distill", "prune"]).stage == "prune"
    with pytest.raises(ValueError) as refusal:
        open_artifact(tmp_path / "student", made_by=["estimate-importance"], key="prune.importance")
    assert str(refusal.value) == (
        f"prune.importance={tmp_path / 'student'} was made by stage prune, but one made by estimate-importance is "
        "needed here. Set prune.importance to such an artifact."
    )


def test_the_manifest_is_plain_json_a_person_can_read(tmp_path: Path) -> None:
    text = (write(tmp_path / "student", seed=7).path / "manifest.json").read_text()
    assert '"seed": 7' in text and list(json.loads(text)) == sorted(json.loads(text))


def write_together(output: str) -> tuple[bool, str]:
    """On every rank: each writes its own file into the one artifact."""
    import torch.distributed as dist

    with writing(output, stage="distill", config={}) as draft:
        (draft.path / f"rank-{dist.get_rank()}").write_text("shard")
    return is_artifact(output), open_artifact(output).digest


def test_ranks_write_one_artifact_together(ranks: Any, tmp_path: Path) -> None:
    (whole, digest), (whole_too, digest_too) = ranks("dp2").run(write_together, str(tmp_path / "model"))
    assert whole and whole_too and digest == digest_too
    assert sorted(open_artifact(tmp_path / "model").manifest["files"]) == ["rank-0", "rank-1"]

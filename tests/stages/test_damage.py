"""Every file of every artifact of a whole chain, cut short and with a changed bit: answered with its name and the mend.

What a chain leaves beside its artifacts, the checkpoints of a run that is not over, is in
tests/runtime/test_checkpoint_metadata.py.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from minitron_nemo.artifact import is_artifact, open_artifact, writing
from support.door import Door
from support.tiny import TinyChain

ARTIFACTS = (
    *("data", "teacher", "corrected_teacher", "importance", "student_pruned", "distilled"),
    *("evaluation_pruned", "export", "report"),
)


@contextmanager
def spoiled(file: Path, how: str) -> Iterator[None]:
    whole = file.read_bytes()
    middle = len(whole) // 2
    changed = bytes([whole[middle] ^ 1]) if whole else b"x"
    file.write_bytes(whole[:middle] if how == "cut" else whole[:middle] + changed + whole[middle + 1 :])
    yield
    file.write_bytes(whole)


def test_the_list_of_artifacts_has_one_of_every_stage(tiny_chain: TinyChain) -> None:
    made = {open_artifact(path).stage for path in tiny_chain.run_dir.iterdir() if is_artifact(path)}
    assert {open_artifact(tiny_chain.run_dir / name).stage for name in ARTIFACTS} == made - {"pretrain"}


@pytest.mark.parametrize("name", ARTIFACTS)
def test_a_damaged_file_is_named_with_the_mend_whatever_it_is(tiny_chain: TinyChain, tmp_path: Path, name: str) -> None:
    artifact = shutil.copytree(tiny_chain.run_dir / name, tmp_path / name)
    files = [file for file in sorted(artifact.rglob("*")) if file.is_file()]
    assert "manifest.json" in {file.name for file in files}
    for file in files:
        for how in ("cut", "flipped"):
            if how == "cut" and not file.stat().st_size:
                continue
            with (
                spoiled(file, how),
                pytest.raises(ValueError, match=r"Make it again, or copy it again\.$") as said,
            ):
                open_artifact(artifact, key="model", verify=how == "flipped")
            assert str(artifact) in str(said.value) and str(file.relative_to(artifact)) in str(said.value)
    open_artifact(artifact, verify=True)


def test_damage_ends_a_command_as_one_message(door: Door, tiny_chain: TinyChain, tmp_path: Path) -> None:
    model = shutil.copytree(tiny_chain.run_dir / "distilled", tmp_path / "model")
    command = ["evaluate", *tiny_chain.overrides, f"evaluate.model={model}", f"evaluate.output={tmp_path / 'output'}"]
    for file in (model / "weights" / ".metadata", model / "manifest.json"):
        with spoiled(file, "cut"):
            said = door(*command).mistake
        assert f"evaluate.model={model}" in said and file.name in said
        assert said.endswith("Make it again, or copy it again.\n")
    assert not (tmp_path / "output").exists()


def test_large_inputs_are_read_whole_when_asked_and_before_an_export(
    door: Door, tiny_chain: TinyChain, tmp_path: Path
) -> None:
    """The tiny teacher with one large file, whose one changed bit only its sha256 tells."""
    model = tmp_path / "model"
    with writing(model, stage="import-hf", config={}) as draft:
        shutil.copytree(tiny_chain.run_dir / "teacher", draft.path, dirs_exist_ok=True)
        draft.facts.update(open_artifact(tiny_chain.run_dir / "teacher").facts)
        (draft.path / "manifest.json").unlink()
        (draft.path / "large").write_bytes(bytes(2**20 + 1))
    command = [*tiny_chain.overrides, f"evaluate.model={model}", f"evaluate.output={tmp_path / 'output'}"]
    with spoiled(model / "large", "flipped"):
        said = door("evaluate", *command, "verify_inputs=true").mistake
        assert f"evaluate.model={model} is not as import-hf made it: large has other contents." in said
        export = [f"export_hf.model={model}", f"export_hf.output={tmp_path / 'export'}"]
        assert "large has other contents." in door("export-hf", *tiny_chain.overrides, *export).mistake
        assert door("evaluate", *command).code == 0


def test_a_damaged_output_is_said_and_made_again_when_asked(door: Door, tiny_chain: TinyChain, tmp_path: Path) -> None:
    command = ["evaluate", *tiny_chain.overrides, f"evaluate.output={tmp_path / 'output'}"]
    assert door(*command).code == 0
    (tmp_path / "output" / "manifest.json").write_bytes(b"{")
    said = door(*command).mistake
    assert f"{tmp_path / 'output'} is complete but damaged: " in said and said.endswith("or set overwrite=true.\n")
    assert door(*command, "overwrite=true").code == 0
    assert open_artifact(tmp_path / "output", verify=True).stage == "evaluate"

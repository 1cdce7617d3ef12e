"""A model of a kind that is not read here is named, with the way from it to one that is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from minitron_nemo.engine import open_model
from minitron_nemo.stages import import_hf, prune_hf

BY_BRIDGE = "AutoBridge.from_hf_pretrained(<the Hugging Face model of this architecture>).export_ckpt("
KINDS: dict[str, tuple[tuple[str, ...], str, str]] = {
    "bridge": (
        ("latest_train_state.pt", "iter_0000000/run_config.yaml", "iter_0000000/.metadata"),
        "is a Megatron-Bridge checkpoint",
        BY_BRIDGE,
    ),
    "bridge, one iteration": (("run_config.yaml", ".metadata"), "is a Megatron-Bridge checkpoint", BY_BRIDGE),
    "megatron": (
        ("latest_checkpointed_iteration.txt", "iter_0000010/.metadata", "iter_0000010/common.pt"),
        "is a Megatron-LM distributed checkpoint",
        BY_BRIDGE,
    ),
    "megatron, a file a rank": (
        ("latest_checkpointed_iteration.txt", "iter_0000010/mp_rank_00/model_optim_rng.pt"),
        "is a Megatron-LM checkpoint of one file a rank",
        "--ckpt-convert-format torch_dist --ckpt-convert-save DIR",
    ),
    "nemo 1, unpacked": (("model_config.yaml", "model_weights/metadata.json"), "is a NeMo 1", "_nemo_to_hf.py"),
    "model.nemo": ((), "is a NeMo 1", "_nemo_to_hf.py"),
}


def write(place: Path, files: tuple[str, ...]) -> Path:
    if not files:
        place.write_bytes(b"x")
    for file in files:
        (place / file).parent.mkdir(parents=True, exist_ok=True)
        (place / file).write_bytes(b"x")
    return place


def refusals(place: Path) -> dict[str, str]:
    """What is said where an artifact is wanted, and where a Hugging Face folder is."""
    said = {}
    for key, attempt in {
        "prune.model": lambda: open_model(place, key="prune.model"),
        "import_hf.model": lambda: import_hf.run(import_hf.ImportHfConfig(model=str(place), output=f"{place}-out")),
        "prune_hf.model": lambda: prune_hf.run(
            prune_hf.PruneHfConfig(model=str(place), plan="nowhere", output=f"{place}-out")
        ),
    }.items():
        with pytest.raises(ValueError) as caught:
            attempt()
        said[key] = str(caught.value)
        assert said[key].startswith(f"{key}={place} ")
    return said


@pytest.mark.parametrize("name", KINDS)
def test_a_model_of_another_kind_is_named_with_the_way_from_it(tmp_path: Path, name: str) -> None:
    files, what, way = KINDS[name]
    said = refusals(write(tmp_path / name, files))
    for key, words in said.items():
        assert what in words and way in words, key
    assert "goes in by minitron import-hf" in said["prune.model"]
    assert "Set import_hf.model to such a folder" in said["import_hf.model"]


def test_a_hugging_face_folder_is_to_be_imported_first(tmp_path: Path) -> None:
    place = write(tmp_path / "hf", ("config.json", "model.safetensors"))
    with pytest.raises(ValueError) as caught:
        open_model(place, key="distill.teacher")
    assert str(caught.value) == (
        f"distill.teacher={place} is a Hugging Face folder, not a model artifact. Import it: minitron import-hf "
        f"import_hf.model={place}, and distill.teacher is its output."
    )


def test_a_gguf_file_is_imported_by_its_own_name(tmp_path: Path) -> None:
    folder = write(tmp_path / "folder", ("model.gguf",))
    for place in (folder, folder / "model.gguf"):
        with pytest.raises(ValueError, match=f"is a GGUF file, not a model .*import_hf.model={folder}/model.gguf, and"):
            open_model(place, key="prune.model")
    with pytest.raises(ValueError, match=r"is a GGUF file, not a Hugging Face folder\. minitron import-hf reads it"):
        import_hf.run(import_hf.ImportHfConfig(model=str(folder), output=str(tmp_path / "out")))


def test_an_artifact_and_a_nemo_checkpoint_are_no_hugging_face_folders(tmp_path: Path) -> None:
    artifact = write(tmp_path / "artifact", ("shape.json",))
    (artifact / "manifest.json").write_text(json.dumps({"stage": "distill"}))
    nemo = write(tmp_path / "nemo", ("context/model.yaml",))
    for place, what in ((artifact, "is an artifact of stage distill"), (nemo, "is a NeMo 2 checkpoint")):
        with pytest.raises(ValueError, match=what) as caught:
            import_hf.run(import_hf.ImportHfConfig(model=str(place), output=str(tmp_path / "out")))
        assert "Stages read it as it is" in str(caught.value)


def test_where_nothing_known_stands_the_older_words_remain(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is not a finished artifact"):
        open_model(write(tmp_path / "some", ("notes.txt",)), key="prune.model")
    with pytest.raises(FileNotFoundError, match="is no directory with a config"):
        import_hf.run(import_hf.ImportHfConfig(model=str(tmp_path / "nowhere"), output=str(tmp_path / "out")))

"""What goes with a model beside its weights: it enters an artifact once, small, and leaves with the export."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer, GenerationConfig

from support.door import Door
from support.tiny import TinyChain

MIB = 2**20
BESIDE = {
    "generation_config.json": json.dumps({"eos_token_id": [0, 7], "temperature": 0.6, "do_sample": True}),
    "chat_template.jinja": "{% for message in messages %}{{ message.content }}{% endfor %}",
    "chat_template.json": json.dumps({"chat_template": "legacy"}),
    "additional_chat_templates/rag.jinja": "{{ messages[0].content }}",
    "LICENSE.txt": "terms",
}
FOREIGN = [
    *("pytorch_model.bin", "optimizer.pt", "model.onnx", "model-q8.gguf", "tf_model.h5", "flax_model.msgpack"),
    *("original/consolidated.00.pth", "original/tokenizer.model", "trainer_state.json", "modeling_other.py"),
]
READ = {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"}


def files_of(directory: Path) -> dict[str, int]:
    return {
        file.relative_to(directory).as_posix(): file.stat().st_size for file in directory.rglob("*") if file.is_file()
    }


@pytest.fixture(scope="module")
def source(tiny_chain: TinyChain, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's folder as it comes from a hub, with everything else that may stand in one."""
    source = tmp_path_factory.mktemp("hub") / "model"
    shutil.copytree(tiny_chain.teacher, source)
    for name, text in BESIDE.items():
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text(text)
    for name in FOREIGN:
        (source / name).parent.mkdir(exist_ok=True)
        with (source / name).open("wb") as file:
            file.truncate(100 * MIB)  # takes no room on disk
    return source


@pytest.fixture(scope="module")
def run(source: Path, door: Door, tiny_chain: TinyChain, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("beside")
    common = [*tiny_chain.overrides, f"run_dir={run}", f"import_hf.model={source}", f"export_hf.model={run}/teacher"]
    for stage in ("import-hf", "export-hf"):
        done = door(stage, *common, "export_hf.prompt=null")
        assert done.code == 0, done.err
    return run


def test_an_imported_model_takes_its_weights_and_at_most_64_mib_more(run: Path, source: Path) -> None:
    assert sum(files_of(run / "teacher").values()) <= (source / "model.safetensors").stat().st_size + 64 * MIB


def test_an_artifact_keeps_of_the_folder_what_goes_with_a_model_and_nemo_what_it_reads(run: Path) -> None:
    assert set(files_of(run / "teacher" / "tokenizer")) == READ | set(BESIDE)
    assert set(files_of(run / "teacher" / "context" / "tokenizer")) == READ | {"chat_template.jinja"}


def test_what_stands_beside_the_weights_leaves_with_the_export(run: Path, source: Path) -> None:
    for name in (*READ, *BESIDE):
        assert (run / "export" / name).read_bytes() == (source / name).read_bytes(), name
    assert GenerationConfig.from_pretrained(run / "export").eos_token_id == [0, 7]
    assert json.loads((run / "export" / "config.json").read_text())["eos_token_id"] == [0, 7]
    assert set(AutoTokenizer.from_pretrained(run / "export").chat_template) == {"default", "rag"}


def test_a_folder_of_transformers_5_and_several_ends_of_text_that_only_config_json_names_pass_through_nemo(
    door: Door, tiny_chain: TinyChain, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    shutil.copytree(tiny_chain.teacher, source, ignore=shutil.ignore_patterns("generation_config.json"))
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"eos_token_id": [0, 9]}))
    tokenizer = json.loads((source / "tokenizer_config.json").read_text())
    tokenizer |= {"tokenizer_class": "TokenizersBackend", "extra_special_tokens": ["<|endoftext|>"]}
    (source / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    common = [*tiny_chain.overrides, f"run_dir={tmp_path}", f"import_hf.model={source}"]
    for stage in ("import-hf", "export-hf"):
        done = door(stage, *common, f"export_hf.model={tmp_path}/teacher", "export_hf.prompt=null")
        assert done.code == 0, done.err
    assert json.loads((tmp_path / "export" / "config.json").read_text())["eos_token_id"] == [0, 9]
    assert GenerationConfig.from_pretrained(tmp_path / "export").eos_token_id == [0, 9]


def test_a_generation_config_of_another_vocabulary_is_refused(
    door: Door, tiny_chain: TinyChain, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    shutil.copytree(tiny_chain.teacher, source)
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 32000]}))
    done = door("import-hf", *tiny_chain.overrides, f"run_dir={tmp_path}", f"import_hf.model={source}")
    assert done.code != 0
    assert "generation_config.json has eos_token_id=[0, 32000], but the vocabulary ends at 511" in done.err
    assert not (tmp_path / "teacher").exists()

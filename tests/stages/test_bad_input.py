"""What each stage says to inputs that cannot work: the value, the limit, the mend; and nothing is written."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from minitron_nemo.text.tokenizer import train_tokenizer
from support.artifacts import contents, full_disk, listing
from support.door import Door
from support.tiny import TinyChain, write_teacher

BAD_INPUT = {
    # tokenizers and vocabularies
    "a tokenizer larger than the model's embedding": (
        ["import-hf", "import_hf.model={spoiled}/other_tokenizer"],
        "knows 600 tokens, but the model's embedding has 512 rows. Use the tokenizer the model was trained with",
    ),
    "data prepared with another tokenizer, to evaluate": (
        ["evaluate", "data.prepared={spoiled}/other_data"],
        "(vocabulary 512) is not the tokenizer that {spoiled}/other_data was prepared with (vocabulary 300). Prepare",
    ),
    "data prepared with another tokenizer, to distil": (
        ["distill", "data.prepared={spoiled}/other_data"],
        "is not the tokenizer that {spoiled}/other_data was prepared with",
    ),
    # dims
    "heads that do not fill their groups": (
        ["prune", "prune.target.num_attention_heads=5"],
        "num_attention_heads=5 is not a multiple of num_query_groups=2: each group needs equally many heads. "
        "With 5 heads the groups can be 1, 5; with 2 groups the nearest heads are 4, 6.",
    ),
    "a dim that does not split over tensor parallelism": (
        ["prune", "prune.target.ffn_hidden_size=49", "trainer.tensor_model_parallel_size=2"],
        "ffn_hidden_size=49 cannot be split over trainer.tensor_model_parallel_size=2. Nearest that can: 48, 50. ",
    ),
    "a target larger than its source": (
        ["prune", "prune.target.hidden_size=33"],
        "target.hidden_size=33 is larger than the source's hidden_size=32; pruning only makes models smaller. "
        "Set target.hidden_size to at most 32.",
    ),
    "a target of nothing": (
        ["prune", "prune.target.hidden_size=0"],
        "prune.target.hidden_size=0 must be at least 1.",
    ),
    "a dim nobody knows": (
        ["prune", "+prune.target.hidden=24"],
        "target.hidden is not a prunable dim; did you mean hidden_size?",
    ),
    "fewer layers without saying which": (
        ["prune", "+prune.target.num_layers=2"],
        "target.num_layers=2 of 4 drops layers, but nothing says which.",
    ),
    # text
    "a corpus that is not there": (
        ["prepare-data", "prepare_data.corpus={spoiled}/nowhere"],
        "corpus={spoiled}/nowhere does not exist. Give a text, JSONL or Parquet file",
    ),
    "an empty corpus": (
        ["prepare-data", "prepare_data.corpus={spoiled}/empty"],
        "corpus={spoiled}/empty is a folder without files",
    ),
    "a corpus of white space": (
        ["prepare-data", "prepare_data.corpus={spoiled}/blank"],
        "corpus={spoiled}/blank is empty: no file or record in it holds more than white space.",
    ),
    "a corpus that is no text": (
        ["prepare-data", "prepare_data.corpus={spoiled}/binary"],
        "{spoiled}/binary/file is not UTF-8 text (byte 0xff at 0). Convert it (iconv -t UTF-8)",
    ),
    "sequences longer than the model's context": (
        ["evaluate", "trainer.seq_length=65"],
        "trainer.seq_length=65 is longer than the model's context of 64 tokens. Set trainer.seq_length to at most 64.",
    ),
    "more samples than there are": (
        ["evaluate", "evaluate.num_samples=100000"],
        "num_samples=100000 must be between 1 and ",
    ),
    # checkpoints and artifacts
    "no checkpoint to import": (
        ["import-hf", "import_hf.model={spoiled}/nowhere"],
        "import_hf.model={spoiled}/nowhere is no directory with a config.json. Set import_hf.model to a Hugging Face",
    ),
    "a checkpoint without its weights": (
        ["import-hf", "import_hf.model={spoiled}/no_weights"],
        "{spoiled}/no_weights has neither model.safetensors nor model.safetensors.index.json.",
    ),
    "a model that is not there": (
        ["prune", "prune.model={spoiled}/nowhere"],
        "prune.model={spoiled}/nowhere does not exist. Run the stage that makes it, or correct prune.model.",
    ),
    "a model that was not finished": (
        ["prune", "prune.model={spoiled}/unfinished"],
        "prune.model={spoiled}/unfinished is not a finished artifact: it has no manifest.json. Run the stage that",
    ),
    "another kind of artifact for a model": (
        ["distill", "distill.student={run}/importance"],
        "distill.student={run}/importance was made by stage estimate-importance, but one made by import-hf or",
    ),
    "another kind of artifact for data": (
        ["estimate-importance", "data.prepared={run}/teacher"],
        "data.prepared={run}/teacher was made by stage import-hf, but one made by prepare-data is needed here.",
    ),
    "importance of a model of another shape": (
        ["prune", "prune.model={run}/distilled"],
        "The importance is of another model: hidden_size=32 there, 24 in the model to prune",
    ),
    "a NeMo checkpoint without weights": (
        ["export-hf", "export_hf.model={spoiled}/foreign"],
        "{spoiled}/foreign/weights/.metadata is gone. Make the checkpoint again, or copy it again.",
    ),
    "a run directory that is not there": (["report", "report.run_dir={spoiled}/nowhere"], "{spoiled}/nowhere is not a"),
    # layouts and batches
    "a world too small for the layout": (
        ["evaluate", "trainer.tensor_model_parallel_size=2"],
        "1 processes cannot hold tensor_model_parallel_size=2 x pipeline_model_parallel_size=1 x "
        "context_parallel_size=1 = 2. Start a multiple of 2: torchrun --nproc-per-node 2",
    ),
    "more validation than held-out text": (
        ["distill", "distill.training.validation_every=1", "distill.training.validation_batches=9999"],
        "validation_batches=9999 of global_batch_size=4 are more than the held-out text has",
    ),
    "a batch that does not split": (
        ["distill", "trainer.global_batch_size=3"],
        "trainer.global_batch_size=3 cannot be split over trainer.micro_batch_size x data-parallel ranks=2.",
    ),
}


@dataclass(frozen=True)
class Spoiled:
    """A good chain and, beside it, what a person might take for its parts."""

    chain: TinyChain
    directory: Path

    def fill(self, text: str) -> str:
        return text.format(spoiled=self.directory, run=self.chain.run_dir)


@pytest.fixture(scope="module")
def spoiled(door: Door, tiny_chain: TinyChain, tmp_path_factory: pytest.TempPathFactory) -> Spoiled:
    directory = tmp_path_factory.mktemp("spoiled")
    (directory / "empty").mkdir()
    for name, content in (("blank", b" \n\t\n"), ("binary", b"\xff\xfe\x00\x01")):
        (directory / name).mkdir()
        (directory / name / "file").write_bytes(content)

    texts = [file.read_text() for file in sorted(tiny_chain.corpus.iterdir())]
    train_tokenizer(texts, vocab_size=300, output=directory / "tokenizer")
    prepared = door(
        "prepare-data",
        *tiny_chain.overrides,
        f"prepare_data.tokenizer={directory / 'tokenizer'}",
        f"prepare_data.output={directory / 'other_data'}",
    )
    assert prepared.code == 0, prepared.err

    write_teacher(directory / "other_tokenizer", tiny_chain.corpus)
    train_tokenizer(texts, vocab_size=600, output=directory / "other_tokenizer")
    write_teacher(directory / "no_weights", tiny_chain.corpus)
    (directory / "no_weights" / "model.safetensors").unlink()

    (directory / "unfinished").mkdir()
    (directory / "unfinished" / "shape.json").write_bytes((tiny_chain.run_dir / "teacher" / "shape.json").read_bytes())
    (directory / "foreign" / "context").mkdir(parents=True)
    return Spoiled(tiny_chain, directory)


@pytest.mark.parametrize("case", BAD_INPUT)
def test_an_input_that_cannot_work_is_refused_with_its_mend(
    door: Door, spoiled: Spoiled, tmp_path: Path, case: str
) -> None:
    (stage, *overrides), expected = BAD_INPUT[case]
    output = f"{stage.replace('-', '_')}.output={tmp_path / 'output'}"
    before = listing(spoiled.directory), listing(spoiled.chain.directory), listing(door.working_directory)
    refused = door(stage, *spoiled.chain.overrides, *map(spoiled.fill, overrides), output)
    assert spoiled.fill(expected) in refused.mistake
    after = listing(spoiled.directory), listing(spoiled.chain.directory), listing(door.working_directory)
    assert after == before
    assert listing(tmp_path) == {}


def test_a_full_disk_leaves_the_older_model_as_it_was(door: Door, tiny_chain: TinyChain, tmp_path: Path) -> None:
    blocks = [-(-size // 4096) for size, _ in listing(tiny_chain.run_dir / "student_pruned").values()]
    with full_disk(tmp_path, kibibytes=4 * int(1.6 * sum(blocks))) as disk:
        prune = ["prune", *tiny_chain.overrides, f"prune.output={disk / 'student'}"]
        assert door(*prune).code == 0
        before = contents(disk)
        refused = door(*prune, "prune.target.ffn_hidden_size=40", "overwrite=true")
        assert f"No space left while writing {disk / 'student'}; what stood there before is intact." in refused.mistake
        assert contents(disk) == before


@pytest.mark.parametrize("stage", ["prepare-data", "import-hf", "export-hf", "distill"])
def test_a_full_disk_is_named_by_every_writer(door: Door, tiny_chain: TinyChain, tmp_path: Path, stage: str) -> None:
    with full_disk(tmp_path, kibibytes=64) as disk:
        refused = door(stage, *tiny_chain.overrides, f"{stage.replace('-', '_')}.output={disk / 'output'}")
        assert f"No space left while writing {disk / 'output'}" in refused.mistake
        assert not (disk / "output").exists() and not (disk / "output.partial").exists()


def test_a_mistake_leaves_the_process_fit_for_the_next_command(door: Door, tiny_chain: TinyChain) -> None:
    assert door("compress", *tiny_chain.overrides, "distill.training.steps=0").code == 2
    assert door("compress", *tiny_chain.overrides).code == 0

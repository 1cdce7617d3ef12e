"""From a corpus to batches: nothing lost, nothing leaked, the same every time."""

from __future__ import annotations

import dataclasses
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.distributed as dist
from megatron.core.datasets.indexed_dataset import IndexedDataset
from nemo.lightning.data import add_megatron_sampler

from minitron_nemo.artifact import Artifact, open_artifact
from minitron_nemo.config.data import DataConfig
from minitron_nemo.config.stages import PrepareDataConfig
from minitron_nemo.stages.prepare_data import run
from minitron_nemo.text.corpus import STDLIB_LICENCE, Source
from minitron_nemo.text.data import batches, build_data_module, open_blend, split_prefixes
from minitron_nemo.text.tokenizer import load_tokenizer, tokenizer_digest, train_tokenizer

STDLIB_FOLDER = Path(sysconfig.get_paths()["stdlib"])
SEQ_LENGTH = 32


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> PrepareDataConfig:
    """Real text of three kinds: a package's modules, the same again as JSONL records, and a sentence that looks odd."""
    root = tmp_path_factory.mktemp("corpus")
    for file in (STDLIB_FOLDER / "email").glob("*.py"):
        (root / file.name).write_bytes(file.read_bytes())
    records = [{"text": file.read_text()} for file in sorted((STDLIB_FOLDER / "email").glob("*.py"))]
    records += [{"text": f"Record {number} ends with <|endoftext|> before its end."} for number in range(40)]
    (root / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return PrepareDataConfig(
        output=str(root.with_name("data")), corpus=str(root), vocab_size=384, validation_fraction=0.2
    )


@pytest.fixture(scope="module")
def prepared(config) -> Artifact:
    return run(config)


@pytest.fixture(scope="module")
def blended(config, prepared, tmp_path_factory) -> Artifact:
    """Two sources with weights 3 and 1, the second much the smaller."""
    corpus = [{"path": config.corpus, "weight": 3}, {"path": str(STDLIB_FOLDER / "json"), "weight": 1, "glob": "*.py"}]
    return run(
        dataclasses.replace(
            config,
            output=str(tmp_path_factory.mktemp("blend") / "data"),
            corpus=corpus,
            tokenizer=str(prepared.path / "tokenizer"),
        )
    )


@pytest.fixture
def process_group() -> Iterator[None]:
    """The group of one process that every training stage has; Megatron-core's blends ask for it."""
    if dist.is_initialized():  # another module's tests built a model in this process
        yield
        return
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def documents(artifact: Artifact, split: str) -> list[list[int]]:
    return [ids.tolist() for prefix in split_prefixes(artifact, split) for ids in IndexedDataset(prefix)]


def decoded(artifact: Artifact, split: str) -> list[str]:
    tokenizer = load_tokenizer(artifact.path / "tokenizer").tokenizer
    return [tokenizer.decode(ids[:-1], skip_special_tokens=False) for ids in documents(artifact, split)]


def module_for(artifact: Artifact, index_dir: Path, *, max_steps: int = 20, validation_batches: int = 2, **kwargs):
    """NeMo's data module, set up by a real trainer as NeMo does it."""
    tokenizer = load_tokenizer(artifact.path / "tokenizer")
    module = build_data_module(
        DataConfig(prepared=str(artifact.path)), tokenizer, SEQ_LENGTH, 2, 8, index_dir=index_dir, **kwargs
    )
    module.trainer = pl.Trainer(
        accelerator="cpu", max_steps=max_steps, limit_val_batches=validation_batches, limit_test_batches=0, logger=False
    )
    module.setup()
    return module


def test_every_document_is_in_one_split_with_its_text_intact(config, prepared):
    train, validation = decoded(prepared, "train"), decoded(prepared, "validation")
    assert sorted(train + validation) == sorted(each.text for each in Source(config.corpus).documents())
    assert len(train) == prepared.facts["train_documents"]
    assert len(validation) == prepared.facts["validation_documents"] > 0


def test_no_text_is_in_both_splits_though_some_come_twice(prepared):
    train, validation = decoded(prepared, "train"), decoded(prepared, "validation")
    assert not set(train) & set(validation)
    everything = train + validation
    assert len(set(everything)) == prepared.facts["different_texts"] < len(everything)


def test_the_end_of_text_closes_each_document_and_appears_nowhere_else(prepared):
    for split in ("train", "validation"):
        for ids in documents(prepared, split):
            assert ids[-1] == 0
            assert 0 not in ids[:-1]  # also where the text spells <|endoftext|>


def test_facts_count_the_tokens_that_are_there(prepared):
    for split in ("train", "validation"):
        assert prepared.facts[f"{split}_tokens"] == sum(map(len, documents(prepared, split)))
    assert prepared.facts["vocab_size"] == 384
    assert prepared.facts["tokenizer_digest"] == tokenizer_digest(prepared.path / "tokenizer")
    assert (prepared.path / "train.bin").stat().st_size == 2 * prepared.facts["train_tokens"]  # uint16


def test_two_runs_write_the_same_bytes_and_another_seed_another_order(config, prepared, tmp_path):
    again = run(dataclasses.replace(config, output=str(tmp_path / "again")))
    files = [name for name in prepared.manifest["files"] if name != "manifest.json"]
    assert {"train.bin", "train.idx", "validation.bin", "validation.idx", "tokenizer/tokenizer.json"} <= set(files)
    for name in files:
        assert (again.path / name).read_bytes() == (prepared.path / name).read_bytes(), name
    other = run(dataclasses.replace(config, output=str(tmp_path / "other"), seed=7))
    assert decoded(other, "train") != decoded(prepared, "train")
    assert sorted(decoded(other, "train")) == sorted(decoded(prepared, "train"))


def test_the_tokenizer_has_seen_the_training_split_only(config, prepared, tmp_path):
    held_out = set(decoded(prepared, "validation"))
    texts = [each.text for each in Source(config.corpus).documents() if each.text not in held_out]
    train_tokenizer(texts, vocab_size=384, output=tmp_path)
    assert tokenizer_digest(tmp_path) == prepared.facts["tokenizer_digest"]


def test_a_given_tokenizer_is_used_and_kept(prepared, blended):
    assert blended.facts["tokenizer_digest"] == prepared.facts["tokenizer_digest"]
    assert (blended.path / "tokenizer" / "tokenizer.json").is_file()


def test_the_embedded_corpus_states_its_licence(tmp_path, prepared, monkeypatch):
    few = [(name, file) for name, file in Source("stdlib").files() if name.startswith(("json/", "email/"))]
    monkeypatch.setattr("minitron_nemo.text.corpus._stdlib_files", lambda: few)  # the whole takes half a minute
    artifact = run(PrepareDataConfig(output=str(tmp_path / "data"), tokenizer=str(prepared.path / "tokenizer")))
    assert (artifact.facts["corpus"], artifact.facts["licence"]) == ("stdlib", STDLIB_LICENCE)


def test_nemo_gets_samples_where_every_label_counts(prepared, tmp_path):
    module = module_for(prepared, tmp_path)
    loader = add_megatron_sampler(module.train_dataloader(), micro_batch_size=2, global_batch_size=8)
    ends = 0
    for batch in loader:
        assert set(batch) == {"tokens", "labels", "loss_mask", "position_ids"}
        assert batch["tokens"].shape == batch["labels"].shape == (2, SEQ_LENGTH)
        assert torch.equal(batch["tokens"][:, 1:], batch["labels"][:, :-1])
        assert bool((batch["loss_mask"] == 1).all())  # the end of text too, though it is also the padding token
        ends += int((batch["labels"] == 0).sum())
    assert ends > 0
    assert len(loader) >= 20 * 8 // 2  # at least what the run takes, and never less than one pass over the text


def test_validation_is_the_same_whatever_the_length_of_the_run(prepared, tmp_path):
    short = module_for(prepared, tmp_path / "short", max_steps=3)._validation_ds
    long = module_for(prepared, tmp_path / "long", max_steps=3000)._validation_ds
    windows = (prepared.facts["validation_tokens"] - 1) // SEQ_LENGTH
    assert len(short) == len(long) == windows
    assert all(torch.equal(short[i]["tokens"], long[i]["tokens"]) for i in range(windows))
    assert sorted(short.document_index.tolist()) == list(range(prepared.facts["validation_documents"]))  # each once


def test_the_sample_index_stays_out_of_the_artifact(prepared, tmp_path):
    before = sorted(prepared.path.rglob("*"))
    module_for(prepared, tmp_path)
    assert sorted(prepared.path.rglob("*")) == before
    assert list(tmp_path.rglob("*shuffle_index.npy"))


def test_training_draws_from_each_source_by_its_weight(blended, tmp_path, process_group):
    module = module_for(blended, tmp_path, max_steps=100)
    counts = np.bincount(module._train_ds.dataset_index)
    assert counts.tolist() == [600, 200]  # of 800 samples, weights 3 and 1


def test_prepared_data_of_several_artifacts_can_be_blended(prepared, blended, tmp_path, process_group):
    entries = [{"path": str(prepared.path), "weight": 1}, {"path": str(blended.path), "weight": 4}]
    tokenizer = load_tokenizer(prepared.path / "tokenizer")
    module = build_data_module(DataConfig(prepared=entries), tokenizer, SEQ_LENGTH, 2, 8, index_dir=tmp_path)
    module.build(100, 10, 0, 0)
    assert np.bincount(module._train_ds.dataset_index).tolist() == [160, 480, 160]  # 1 : 4 x 3/4 : 4 x 1/4


def test_evaluation_walks_over_the_split_once_on_any_number_of_ranks(prepared):
    prefix = split_prefixes(prepared, "validation")[0]
    stream = torch.tensor([token for ids in documents(prepared, "validation") for token in ids])
    windows = (len(stream) - 1) // SEQ_LENGTH
    for dp_size, micro_batch_size in [(1, 1), (1, 4), (2, 3), (3, 2)]:
        seen: dict[int, torch.Tensor] = {}
        per_rank = [
            list(batches(prefix, SEQ_LENGTH, micro_batch_size, dp_rank=rank, dp_size=dp_size))
            for rank in range(dp_size)
        ]
        assert len({len(each) for each in per_rank}) == 1
        counted = 0
        for rank, own in enumerate(per_rank):
            for step, batch in enumerate(own):
                assert batch["tokens"].shape == (micro_batch_size, SEQ_LENGTH)
                for row in range(micro_batch_size):
                    if bool(batch["loss_mask"][row].all()):
                        window = (step * dp_size + rank) * micro_batch_size + row
                        seen[window] = torch.cat([batch["tokens"][row], batch["labels"][row, -1:]])
                    counted += int(batch["loss_mask"][row].sum())
        assert sorted(seen) == list(range(windows))
        for window, tokens in seen.items():
            assert torch.equal(tokens, stream[window * SEQ_LENGTH : (window + 1) * SEQ_LENGTH + 1])
        assert counted == windows * SEQ_LENGTH


def test_calibration_samples_are_drawn_by_their_seed_and_differ_from_one_another(prepared):
    prefixes = split_prefixes(prepared, "train")

    def draw(seed: int, micro_batch_size: int = 4, dp_size: int = 1) -> list[list[int]]:
        ranks = [
            [row for batch in batches(prefixes, SEQ_LENGTH, micro_batch_size, 24, seed=seed, dp_rank=r, dp_size=dp_size)
             for row in batch["tokens"].tolist()]
            for r in range(dp_size)
        ]  # fmt: skip
        return sorted(row for rank in ranks for row in rank)

    assert draw(1) == draw(1) == draw(1, micro_batch_size=2) == draw(1, micro_batch_size=2, dp_size=3)
    assert draw(1) != draw(2)
    assert len({tuple(row) for row in draw(1)}) == 24


def test_batches_have_the_types_a_model_takes(prepared):
    batch = next(batches(split_prefixes(prepared, "train"), SEQ_LENGTH, 3))
    assert {key: value.dtype for key, value in batch.items()} == {
        "tokens": torch.int64, "labels": torch.int64, "loss_mask": torch.float32, "position_ids": torch.int64,
    }  # fmt: skip
    assert batch["position_ids"][2].tolist() == list(range(SEQ_LENGTH))


def test_asking_for_more_samples_than_there_are_names_the_number(prepared):
    prefixes = split_prefixes(prepared, "validation")
    with pytest.raises(ValueError, match=r"num_samples=999999 must be between 1 and \d+, the windows of seq_length=32"):
        batches(prefixes, SEQ_LENGTH, 1, 999_999)
    with pytest.raises(
        ValueError, match="num_samples=10 cannot be split over micro_batch_size=4 x 2 data-parallel ranks"
    ):
        batches(prefixes, SEQ_LENGTH, 4, 10, seed=0, dp_size=2)
    with pytest.raises(FileNotFoundError, match=r"nowhere.bin and .*nowhere.idx are not both there"):
        batches("nowhere", SEQ_LENGTH, 1)


def test_more_validation_than_held_out_text_names_the_most_there_is(prepared, tmp_path):
    with pytest.raises(ValueError, match=r"validation_batches=9999 of global_batch_size=8 are more.*at most \d+"):
        module_for(prepared, tmp_path, validation_batches=9999)


def test_a_sequence_longer_than_the_text_names_the_tokens_there_are(prepared, tmp_path):
    tokenizer = load_tokenizer(prepared.path / "tokenizer")
    tokens = prepared.facts["validation_tokens"]
    with pytest.raises(ValueError, match=f"seq_length={tokens} does not fit into the validation text.*{tokens} tokens"):
        build_data_module(DataConfig(prepared=prepared.path), tokenizer, tokens, 1, 1, index_dir=tmp_path)


def test_another_tokenizer_than_the_datas_is_refused(prepared, tmp_path):
    train_tokenizer(decoded(prepared, "train"), vocab_size=300, output=tmp_path / "other")
    other = load_tokenizer(tmp_path / "other")
    with pytest.raises(ValueError, match=r"vocabulary 300\) is not the tokenizer.*vocabulary 384"):
        build_data_module(DataConfig(prepared=prepared.path), other, SEQ_LENGTH, 1, 1, index_dir=tmp_path)


def test_data_that_was_not_prepared_says_so(tmp_path):
    with pytest.raises(ValueError, match=r"data.prepared is not set. Run prepare-data"):
        open_blend(DataConfig())
    with pytest.raises(FileNotFoundError, match=r"data.prepared=.* does not exist"):
        open_blend(DataConfig(prepared=str(tmp_path / "none")))
    with pytest.raises(ValueError, match=r"must be {path: ..., weight: ...} when several are blended"):
        open_blend(DataConfig(prepared=["a", "b"]))


@pytest.mark.parametrize(
    ("texts", "fraction", "message"),
    [
        ([], 0.1, "is a folder without files"),
        (["", "  \n"], 0.1, "is empty: no file or record in it holds more than white space"),
        (["a", "b"], 1e-9, "validation_fraction=1e-09 holds out none of 2 documents. Raise validation_fraction"),
        (["good", b"\xff"], 0.1, "is not UTF-8 text"),
        (["equal words"] * 9, 0.5, "validation takes all of its documents .9.. Add documents or lower validation_f"),
    ],
)
def test_a_corpus_that_cannot_be_used_leaves_nothing_behind(tmp_path, texts, fraction, message):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number, text in enumerate(texts):
        (corpus / f"document{number + 1}.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message):
        run(PrepareDataConfig(output=str(tmp_path / "data"), corpus=str(corpus), validation_fraction=fraction))
    assert sorted(tmp_path.iterdir()) == [corpus]


def test_a_failed_run_leaves_the_older_artifact_as_it_was(config, prepared, tmp_path):
    digest = prepared.digest
    with pytest.raises(ValueError, match="vocab_size=60000 is more than this corpus can fill"):
        run(dataclasses.replace(config, vocab_size=60_000))
    assert open_artifact(prepared.path).digest == digest
    assert not prepared.path.with_name("data.partial").exists()


def test_a_wrong_config_says_so_at_once():
    with pytest.raises(ValueError, match="vocab_size=100 must be at least 257"):
        PrepareDataConfig(vocab_size=100)
    with pytest.raises(ValueError, match=r"validation_fraction=0.9 must be above 0 and at most 0.5"):
        PrepareDataConfig(validation_fraction=0.9)
    with pytest.raises(ValueError, match="seed=-1 must be at least 0"):
        PrepareDataConfig(seed=-1)


def tokens_of_this_rank(data: str, index_dir: str) -> list[list[int]]:
    """Runs on every rank: the first global batch's samples this rank trains on."""
    from megatron.core import parallel_state

    rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    module = module_for(open_artifact(data), Path(index_dir))
    loader = add_megatron_sampler(
        module.train_dataloader(), micro_batch_size=2, global_batch_size=8, rank=rank, world_size=size
    )
    batches_of_a_step = [batch for batch, _ in zip(loader, range(4 // size), strict=False)]
    return [row for batch in batches_of_a_step for row in batch["tokens"].tolist()]


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["dp2", "tp2"])
def test_data_parallel_ranks_share_a_step_and_other_ranks_see_the_same(ranks, layout, prepared, tmp_path):
    loader = add_megatron_sampler(
        module_for(prepared, tmp_path / "one").train_dataloader(), micro_batch_size=2, global_batch_size=8
    )
    step = [row for batch, _ in zip(loader, range(4), strict=False) for row in batch["tokens"].tolist()]
    first, second = ranks(layout).run(tokens_of_this_rank, str(prepared.path), str(tmp_path / "two"))
    if layout == "dp2":
        assert sorted(first + second) == sorted(step)
    else:
        assert first == second == step


# ---- prompts and answers ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["jsonl", "parquet"])
def instructions(request, prepared, tmp_path_factory) -> Artifact:
    """Forty prompts of different lengths with answers."""
    root = tmp_path_factory.mktemp("instructions")
    records = [
        {"question": f"Q{'?' * (number % 5)} {number}\nA: ", "answer": f"{number} times {'yes ' * (1 + number % 7)}"}
        for number in range(80)
    ]
    if request.param == "jsonl":
        (root / "chat.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), root / "chat.parquet")
    return run(
        PrepareDataConfig(
            output=str(root.with_name(root.name + "-data")),
            corpus=str(root),
            text_key="answer",
            prompt_key="question",
            tokenizer=str(prepared.path / "tokenizer"),
            validation_fraction=0.4,
        )
    )


def answers(artifact: Artifact, batch: dict[str, torch.Tensor]) -> str:
    """What a batch's loss mask lets through."""
    tokenizer = load_tokenizer(artifact.path / "tokenizer").tokenizer
    assert all((batch[key] >= 0).all() for key in ("tokens", "labels"))
    assert set(batch["loss_mask"].unique().tolist()) == {0.0, 1.0}
    return tokenizer.decode(batch["labels"][batch["loss_mask"] == 1], skip_special_tokens=True)


def test_prompts_are_read_and_only_answers_are_learned(instructions, tmp_path, process_group):
    module = module_for(instructions, tmp_path / "index", max_steps=1, validation_batches=0)
    sample = module._train_ds[0]
    tokenizer = load_tokenizer(instructions.path / "tokenizer").tokenizer
    assert "A: " in tokenizer.decode(sample["tokens"])
    learned = answers(instructions, sample)
    assert "times" in learned and "yes" in learned
    assert "Q" not in learned and "A:" not in learned
    prefix = split_prefixes(instructions, "validation", SEQ_LENGTH)
    for batch in batches(prefix, SEQ_LENGTH, 1):
        assert "A:" not in answers(instructions, batch)


def test_prompt_and_answer_read_one_after_the_other_are_the_document(instructions):
    tokenizer = load_tokenizer(instructions.path / "tokenizer").tokenizer
    texts = []
    for split in ("train", "validation"):
        for ids in documents(instructions, split):
            prompt = [-1 - token for token in ids if token < 0]
            assert ids[: len(prompt)] == [-1 - token for token in prompt]
            texts.append(tokenizer.decode([*prompt, *ids[len(prompt) : -1]]))
    assert len(texts) == 80
    assert sorted(texts)[0] == "Q 0\nA: 0 times yes "


def test_a_missing_prompt_key_is_named(tmp_path):
    (tmp_path / "chat.jsonl").write_text(json.dumps({"promt": "a", "text": "b"}) + "\n")
    with pytest.raises(ValueError, match="has no key prompt_key=prompt; did you mean promt"):
        run(PrepareDataConfig(output=str(tmp_path / "out"), corpus=str(tmp_path / "chat.jsonl"), prompt_key="prompt"))

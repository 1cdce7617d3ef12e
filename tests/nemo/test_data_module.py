"""What NeMo trains on: full of text, mixed by weight, the same samples on every rank that shares them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.distributed as dist
from nemo.collections.common.tokenizers import AutoTokenizer
from nemo.lightning.data import add_megatron_sampler

from minitron_nemo.artifact import Artifact, open_artifact
from minitron_nemo.config.data import DataConfig
from minitron_nemo.nemo.data_module import build_data_module, require_supervised
from minitron_nemo.text.tokenizer import load_tokenizer, train_tokenizer
from support.prepared import answers, decoded

SEQ_LENGTH = 32


@pytest.fixture
def process_group() -> Iterator[None]:
    """The group of one process that every training stage has; Megatron-core's blends ask for it."""
    if dist.is_initialized():  # another module's tests built a model in this process
        yield
        return
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


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


def test_prompts_are_read_and_only_answers_are_learned(instructions, tmp_path, process_group):
    module = module_for(instructions, tmp_path / "index", max_steps=1, validation_batches=0)
    sample = module._train_ds[0]
    tokenizer = load_tokenizer(instructions.path / "tokenizer")
    assert "A: " in tokenizer.decode(sample["tokens"])
    learned = answers(instructions, sample)
    assert "times" in learned and "yes" in learned
    assert "Q" not in learned and "A:" not in learned


def test_our_tokenizer_and_nemos_give_the_same_ids(prepared):
    path = prepared.path / "tokenizer"
    ours, nemos = load_tokenizer(path), AutoTokenizer(str(path))
    for text in decoded(prepared, "validation")[:20]:
        assert ours.encode(text, add_special_tokens=False) == nemos.text_to_ids(text)
    assert (ours.eos_token_id, ours.pad_token_id, len(ours)) == (nemos.eos_id, nemos.pad_id, nemos.vocab_size)


@pytest.mark.parametrize(
    ("learned", "said"), [(0, None), (1, "2.50% of the tokens are to be learned (2 of 80)"), (4, "")]
)
def test_a_run_that_learns_nearly_nothing_says_so_and_one_that_learns_nothing_is_refused(
    learned: int, said: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    samples = [{"loss_mask": (torch.arange(40) < learned).float()}] * 2
    if said is None:
        with pytest.raises(ValueError, match="None of the 80 tokens of the first 2 samples is to be learned"):
            require_supervised(samples)
        return
    require_supervised(samples)
    found = capsys.readouterr().err
    assert said in found and bool(found) is bool(said)

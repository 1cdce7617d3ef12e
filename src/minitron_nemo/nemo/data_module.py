"""What NeMo trains and validates on: its data module over the prepared token files.

    tokens, labels, position_ids   [b, s]   int64
    loss_mask                      [b, s]   float32

Training draws samples [s], shuffled, from weighted blends. Communication: rank 0 builds Megatron-core's sample index
while the others wait, as long as it takes; Megatron's own barriers follow, when all find it in the cache.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from nemo.collections.common.tokenizers import AutoTokenizer
from nemo.collections.llm.gpt.data.pre_training import PreTrainingDataModule
from torch import Tensor
from torch.utils.data import Dataset

from minitron_nemo.artifact import Artifact
from minitron_nemo.checks import require, require_divisible
from minitron_nemo.config.data import DataConfig
from minitron_nemo.parallel import is_rank_zero, rank_zero_works, undistributed
from minitron_nemo.text.blend import (
    held_out_sources,
    open_blend,
    require_documents_end_once,
    require_length,
    require_tokenizer_of,
    weighted_sources,
)
from minitron_nemo.text.corpus import TRAIN, VALIDATION
from minitron_nemo.text.documents import DOCUMENT_STARTS, pad_documents, unmark

if TYPE_CHECKING:
    from minitron_nemo.text.tokenizer import Tokenizer

_NO_PADDING = -(1 << 31)  # no token has this id, nor the mark of one


class PackedDataset(GPTDataset):
    """GPTDataset whose samples are full of text: no token is padding, so every label counts.

    Megatron-core masks the loss of labels equal to the tokenizer's padding token. Many tokenizers pad with their
    end-of-text token, and a model trained so would never learn where a document ends.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._pad_token_id = _NO_PADDING

    def __getitem__(self, index: int | None) -> dict[str, Tensor]:
        """tokens, labels, loss_mask, position_ids, each [s]; document_starts where documents do not see each other."""
        sample = super().__getitem__(index)
        sample["labels"], supervised = unmark(sample["labels"])
        sample["loss_mask"] = sample["loss_mask"] * supervised
        sample["tokens"], _ = unmark(sample["tokens"])
        if self.config.pad_documents_to > 1:
            sample = pad_documents(sample, self.config.pad_documents_to)
        return sample | ({DOCUMENT_STARTS: sample["position_ids"] == 0} if self.config.reset_position_ids else {})


class PackedDataModule(PreTrainingDataModule):
    """NeMo's data module with two choices of its own.

    Validation reads one pass over the held-out text in a fixed order, so every run validates on the same samples, and
    on none twice; NeMo draws as many passes as the run's length asks for and shuffles them together. And no attention
    masks: they are all causal, so the model makes one, once; NeMo adds [s, s] to every sample without
    transformer-engine.
    """

    pad_documents_to = 1
    """As in `DataConfig`."""
    train_dataset: Callable[[int], Dataset] | None = None
    """Given the number of samples of the run, what it trains on; None: Megatron-core's shuffled windows."""
    sources: Sequence[str] = ()
    """Names of the held-out text's, as Megatron-core numbers them where there are several."""

    def build(
        self,
        trainer_max_steps: int,
        trainer_val_check_interval: int | float | None,
        trainer_limit_val_batches: int | float,
        trainer_limit_test_batches: int | float,
    ) -> None:
        """Build the datasets for a run of `trainer_max_steps` steps.

        Raises: ValueError: a validation asks for more samples than the held-out text has, or nothing is to be learned.
        """
        samples = trainer_max_steps * self.data_sampler.global_batch_size
        assert samples > 0, f"max_steps={trainer_max_steps} must be known when the data are built"
        datasets = BlendedMegatronDatasetBuilder(
            self.dataset_cls,
            [samples if self.train_dataset is None else 1, None, None],
            is_built_on_rank=lambda: True,
            config=self.gpt_dataset_config,
        )
        rank_zero_works(partial(_build_index, datasets))
        self._train_ds, self._validation_ds, self._test_ds = datasets.build()
        if self.train_dataset is not None:
            self._train_ds = self.train_dataset(samples)
        require_supervised(self._train_ds)
        if isinstance(trainer_limit_val_batches, int):
            size, found = self.data_sampler.global_batch_size, len(self._validation_ds)
            require(
                trainer_limit_val_batches * size <= found,
                f"validation_batches={trainer_limit_val_batches} of global_batch_size={size} are more than the "
                f"held-out text has: {found} samples of seq_length={self.seq_length}. "
                f"Set validation_batches to at most {found // size}, or prepare more text.",
            )

    @property
    def gpt_dataset_config(self) -> GPTDatasetConfig:
        config = super().gpt_dataset_config
        config.create_attention_mask = False
        config.pad_documents_to = self.pad_documents_to
        return config


def _build_index(datasets: BlendedMegatronDatasetBuilder) -> None:
    """Leave in the cache what `build` makes, which takes minutes with much text. Megatron-core waits for no other rank
    where nothing is distributed."""
    with undistributed():
        datasets.build()


_LOOKED_AT = 64  # samples; enough to see text that is nearly all prompts, read in well under a second
_NEARLY_NOTHING = 0.05


def require_supervised(dataset: Dataset) -> None:
    """ValueError, on every rank, where no token of the first samples is to be learned; a small share is said."""
    size: int = len(dataset)  # type: ignore[arg-type]
    looked_at = min(_LOOKED_AT, size)
    masks = [dataset[index]["loss_mask"] for index in range(looked_at)]
    learned, tokens = sum(int((mask != 0).sum()) for mask in masks), sum(mask.numel() for mask in masks)
    require(
        learned > 0,
        f"None of the {tokens:,} tokens of the first {looked_at} samples is to be learned: they are prompts, or what "
        "data.reset_at_documents leaves out. Raise trainer.seq_length above the prompts' length, or prepare text with "
        "answers.",
    )
    if learned / tokens < _NEARLY_NOTHING and is_rank_zero():
        print(
            f"Of the first {looked_at} samples {learned / tokens:.2%} of the tokens are to be learned ({learned:,} of "
            f"{tokens:,}); the others are prompts and padding, and cost as much.",
            file=sys.stderr,
            flush=True,
        )


def build_data_module(
    config: DataConfig,
    tokenizer: Tokenizer,
    seq_length: int,
    micro_batch_size: int,
    global_batch_size: int,
    *,
    index_dir: Path | str,
    train_dataset: Callable[[int], Dataset] | None = None,
    pin_memory: bool | None = None,
) -> PackedDataModule:
    """NeMo's data module over the prepared files.

    Batches hold tokens, labels, position_ids [b, s] int64 and loss_mask [b, s] float32; no attention mask.

    Args:
        tokenizer: the model's; must be the one the data was made with.
        index_dir: where Megatron-core keeps its sample index, seen by every rank; the run's own directory, since
            artifacts are never written into. Each version of the data has its own folder in it.
        train_dataset: as `PackedDataModule.train_dataset`.
        pin_memory: None: where there is an accelerator.
    Raises: ValueError: the tokenizer differs from the data's, a split is shorter than one sample, or documents cannot
        be told apart in such a batch.
    """
    if config.reset_at_documents:
        require(
            micro_batch_size == 1,
            f"trainer.micro_batch_size={micro_batch_size} must be 1 with data.reset_at_documents=true: documents of a "
            "sample are attended to one by one. For larger micro-batches raise trainer.seq_length.",
        )
        require_divisible("trainer.seq_length", seq_length, "data.pad_documents_to", config.pad_documents_to)
    blend = open_blend(config)
    require_tokenizer_of(blend[0][0], tokenizer)
    for artifact, _ in blend:
        if config.reset_at_documents:
            require_documents_end_once(artifact)
        require_length(artifact, TRAIN, seq_length)
        require_length(artifact, VALIDATION, seq_length)
    sources = held_out_sources(blend, seq_length)
    validation = list(sources.values())
    module = PackedDataModule(
        paths={TRAIN: _weighted(blend), VALIDATION: validation, "test": validation},
        seq_length=seq_length,
        tokenizer=AutoTokenizer(tokenizer.name_or_path, use_fast=True),
        micro_batch_size=micro_batch_size,
        global_batch_size=global_batch_size,
        num_workers=config.num_workers,
        persistent_workers=config.num_workers > 0,
        pin_memory=torch.cuda.is_available() if pin_memory is None else pin_memory,
        seed=config.seed,
        split=None,
        index_mapping_dir=str(Path(index_dir) / "-".join(artifact.digest[:12] for artifact, _ in blend)),
        dataset_cls=PackedDataset,
        reset_position_ids=config.reset_at_documents,
        eod_mask_loss=config.reset_at_documents,
        output_log=False,
    )
    module.pad_documents_to, module.train_dataset = config.pad_documents_to, train_dataset
    module.sources = list(sources)
    return module


def _weighted(blend: list[tuple[Artifact, float]]) -> list[str]:
    """Megatron-core's flat [weight, prefix, weight, prefix, ...]; without weights a lone prefix."""
    flat = []
    for artifact, source, weight in weighted_sources(blend):
        flat += [repr(weight), os.path.abspath(artifact.path / source[TRAIN])]
    return flat if len(flat) > 2 else flat[1:]

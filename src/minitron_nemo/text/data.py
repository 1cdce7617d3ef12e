"""Token files and what trains, validates and calibrates on them.

    <split>.bin   every document's tokens, end to end, each closed by the end-of-text token    uint16 or int32
                  (int32 where there are prompts, whose tokens are marked as not to be learned, see documents.py)
    <split>.idx   where documents begin (Megatron-core's indexed dataset)

Training and validation are separate pairs of files, so no sample can reach across. Training reads them through NeMo's
`PreTrainingDataModule` (samples [s], shuffled, weighted blends); calibration and evaluation through `batches`, which is
the same on every layout:

    tokens, labels, position_ids   [b, s]   int64
    loss_mask                      [b, s]   float32

Communication: only inside Megatron-core, which builds its sample index on rank 0 and has the others wait.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder
from nemo.collections.llm.gpt.data.pre_training import PreTrainingDataModule
from torch import Tensor
from torch.utils.data import Dataset

from minitron_nemo.artifact import Artifact, open_artifact
from minitron_nemo.checks import require, require_divisible
from minitron_nemo.config.data import DataConfig, Prepared
from minitron_nemo.text.corpus import Document
from minitron_nemo.text.documents import DOCUMENT_STARTS, mark, pad_documents, unmark
from minitron_nemo.text.tokenizer import tokenizer_digest, vocabulary_size

if TYPE_CHECKING:
    from nemo.collections.common.tokenizers import AutoTokenizer

TRAIN, VALIDATION = "train", "validation"
_BATCH_CHARACTERS = 2_000_000  # texts handed to the tokenizer at once: enough for its threads, small in memory
_NO_PADDING = -(1 << 31)  # no token has this id, nor the mark of one


def open_blend(config: Prepared) -> list[tuple[Artifact, float]]:
    """The prepared artifacts, each with its weight.

    Raises: as `open_artifact`; ValueError: missing, unweighted or mixed.
    """
    entries = config.prepared
    require(bool(entries), "data.prepared is not set. Run prepare-data and set data.prepared to its output.")
    if isinstance(entries, (str, Path, Mapping)):
        entries = [entries]
    blend = []
    for entry in entries:
        given = entry if isinstance(entry, Mapping) else {"path": entry}
        require(
            set(given) <= {"path", "weight"} and "path" in given and ("weight" in given or len(entries) == 1),
            f"data.prepared: {entry!r} must be {{path: ..., weight: ...}} when several are blended.",
        )
        weight = float(given.get("weight", 1.0))
        require(weight > 0, f"data.prepared: weight={weight} of {given['path']} must be positive.")
        blend.append((open_artifact(given["path"], made_by=["prepare-data"], key="data.prepared"), weight))
    digests = {str(artifact.path): artifact.facts["tokenizer_digest"] for artifact, _ in blend}
    require(
        len(set(digests.values())) == 1,
        f"data.prepared blends data of different tokenizers: {', '.join(digests)}. "
        "Prepare them again with one tokenizer.",
    )
    return blend


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

    def build(
        self,
        trainer_max_steps: int,
        trainer_val_check_interval: int | float | None,
        trainer_limit_val_batches: int | float,
        trainer_limit_test_batches: int | float,
    ) -> None:
        """Build the datasets for a run of `trainer_max_steps` steps.

        Raises: ValueError: a validation asks for more samples than the held-out text has.
        """
        samples = trainer_max_steps * self.data_sampler.global_batch_size
        assert samples > 0, f"max_steps={trainer_max_steps} must be known when the data are built"
        self._train_ds, self._validation_ds, self._test_ds = BlendedMegatronDatasetBuilder(
            self.dataset_cls,
            [samples if self.train_dataset is None else 1, None, None],
            is_built_on_rank=lambda: True,
            config=self.gpt_dataset_config,
        ).build()
        if self.train_dataset is not None:
            self._train_ds = self.train_dataset(samples)
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


def build_data_module(
    config: DataConfig,
    tokenizer: AutoTokenizer,
    seq_length: int,
    micro_batch_size: int,
    global_batch_size: int,
    *,
    index_dir: Path | str,
    train_dataset: Callable[[int], Dataset] | None = None,
    pin_memory: bool | None = None,
) -> PreTrainingDataModule:
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
        require_length(artifact, TRAIN, seq_length)
        require_length(artifact, VALIDATION, seq_length)
    validation = [prefix for artifact, _ in blend for prefix in split_prefixes(artifact, VALIDATION, seq_length)]
    module = PackedDataModule(
        paths={TRAIN: _weighted(blend), VALIDATION: validation, "test": validation},
        seq_length=seq_length,
        tokenizer=tokenizer,
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
    module.pad_documents_to = config.pad_documents_to
    module.train_dataset = train_dataset
    return module


def weighted_sources(blend: list[tuple[Artifact, float]]) -> list[tuple[Artifact, dict[str, Any], float]]:
    """Every source of the artifacts with its share of training, relative.

    Sources of one artifact without weights share its weight by their number of tokens.
    """
    shares = []
    for artifact, weight in blend:
        sources = artifact.facts["sources"]
        parts = [source["weight"] if source["weight"] is not None else source["train_tokens"] for source in sources]
        shares += [(artifact, each, weight * part / sum(parts)) for each, part in zip(sources, parts, strict=True)]
    return shares


def split_prefixes(artifact: Artifact, split: str, seq_length: int = 0) -> list[str]:
    """Paths of a split's .bin/.idx pairs, without their endings: one per source with a sample of seq_length there."""
    return [
        os.path.abspath(artifact.path / source[split])
        for source in artifact.facts["sources"]
        if source[f"{split}_tokens"] > seq_length
    ]


def require_tokenizer_of(artifact: Artifact, tokenizer: AutoTokenizer) -> None:
    """The tokenizer must be the one this prepared data was made with."""
    path = tokenizer.tokenizer.name_or_path
    require(
        tokenizer_digest(path) == artifact.facts["tokenizer_digest"],
        f"tokenizer={path} (vocabulary {vocabulary_size(tokenizer)}) is not the tokenizer that {artifact.path} was "
        f"prepared with (vocabulary {artifact.facts['vocab_size']}). "
        f"Prepare the data again with tokenizer={path}, or use the model made for {artifact.path}/tokenizer.",
    )


def require_length(artifact: Artifact, split: str, seq_length: int) -> None:
    """A source of the split must hold at least one sample, and the label of its last token."""
    tokens = max(source[f"{split}_tokens"] for source in artifact.facts["sources"])
    require(
        tokens > seq_length,
        f"seq_length={seq_length} does not fit into the {split} text of {artifact.path}: {tokens} tokens. "
        f"Set seq_length below {tokens}, or prepare more text"
        + (" or a larger validation_fraction." if split == VALIDATION else "."),
    )


@dataclass
class TokenFiles:
    """One .bin/.idx pair being written: documents in, in order; at the end they are shuffled.

    Tokens wait in `<prefix>.ordered.*` on disk, not in memory.
    """

    prefix: Path
    vocab_size: int
    documents: int = 0
    tokens: int = 0
    marked: bool = False
    """Some tokens are not to be learned; see `documents.mark`."""
    _ordered: IndexedDatasetBuilder = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._ordered = self._builder(self._waiting(".bin"))

    def add(self, ids: np.ndarray) -> None:
        self._ordered.add_document(ids, [len(ids)])
        self.documents += 1
        self.tokens += len(ids)

    def finish(self, *, seed: int) -> None:
        """Write `<prefix>.bin/.idx` with the documents in an order drawn from `seed`."""
        self._ordered.finalize(str(self._waiting(".idx")))
        if self.documents > 0:
            ordered = IndexedDataset(str(self._waiting("")))
            shuffled = self._builder(self.prefix.with_name(self.prefix.name + ".bin"))
            for index in np.random.default_rng(seed).permutation(self.documents):
                document = ordered[int(index)]
                shuffled.add_document(document, [len(document)])
            shuffled.finalize(str(self.prefix.with_name(self.prefix.name + ".idx")))
            del ordered
        for ending in (".bin", ".idx"):
            self._waiting(ending).unlink()

    def _waiting(self, ending: str) -> Path:
        return self.prefix.with_name(f"{self.prefix.name}.ordered{ending}")

    def _builder(self, path: Path) -> IndexedDatasetBuilder:
        dtype = np.int32 if self.marked else DType.optimal_dtype(self.vocab_size)
        return IndexedDatasetBuilder(str(path), dtype=dtype)


def encode_documents(documents: Iterable[Document], tokenizer: AutoTokenizer) -> Iterator[np.ndarray]:
    """Each document's ids, closed by the end-of-text token; its prompt's stand first, marked.

    What looks like a special token in a text stays text.
    """

    def encode(texts: list[str]) -> list[list[int]]:
        encoded = tokenizer.tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, split_special_tokens=True, verbose=False
        )
        return encoded["input_ids"]

    for batch in _by_size(documents):
        prompts, texts = (encode([getattr(each, part) for each in batch]) for part in ("prompt", "text"))
        for prompt, text in zip(prompts, texts, strict=True):
            ids = np.asarray([*text, tokenizer.tokenizer.eos_token_id])
            yield np.concatenate([mark(np.asarray(prompt)), ids]) if prompt else ids


def batches(
    prefix: str | Path | Sequence[str],
    seq_length: int,
    micro_batch_size: int,
    num_samples: int | None = None,
    *,
    seed: int | None = None,
    dp_rank: int = 0,
    dp_size: int = 1,
) -> Iterator[dict[str, Tensor]]:
    """Fixed samples of a split, this data-parallel rank's share of them, in micro-batches.

    A sample is one of the split's consecutive windows of seq_length tokens (they share no label; a shorter rest at the
    end is left out). Without a seed: the first num_samples of them, in order, for evaluation. With one: num_samples
    different ones drawn at random, for calibration. The set of samples depends on no layout; every rank gets equally
    many full micro-batches, the last ones filled up by samples whose loss_mask is 0 (evaluation only).

    Args:
        prefix: path of a .bin/.idx pair without its ending, or several, read one after the other.
        num_samples: over all data-parallel ranks; None: all windows there are.
    Returns: dicts of tokens, labels, position_ids [b, s] int64 and loss_mask [b, s] float32, on the CPU.
    Raises: ValueError: more samples than windows, or calibration samples that do not split evenly.
    """
    prefixes = [str(prefix)] if isinstance(prefix, (str, Path)) else [str(each) for each in prefix]
    streams = [TokenStream(each) for each in prefixes]
    ends = np.cumsum([stream.windows(seq_length) for stream in streams])
    available = int(ends[-1])
    wanted = available if num_samples is None else num_samples
    require(
        1 <= wanted <= available,
        f"num_samples={wanted} must be between 1 and {available}, the windows of seq_length={seq_length} in "
        f"{', '.join(prefixes)}. Lower num_samples or seq_length, or prepare more text.",
    )
    per_step = micro_batch_size * dp_size
    require(
        seed is None or wanted % per_step == 0,
        f"num_samples={wanted} cannot be split over micro_batch_size={micro_batch_size} x {dp_size} data-parallel "
        f"ranks. Set num_samples to a multiple of {per_step}.",
    )
    if seed is None:
        chosen = np.arange(wanted)
    else:
        chosen = np.random.default_rng(seed).permutation(available)[:wanted]
    return _micro_batches(streams, ends, chosen, seq_length, micro_batch_size, dp_rank, dp_size)


def _micro_batches(
    streams: list[TokenStream],
    ends: np.ndarray,
    chosen: np.ndarray,
    seq_length: int,
    micro_batch_size: int,
    dp_rank: int,
    dp_size: int,
) -> Iterator[dict[str, Tensor]]:
    step = micro_batch_size * dp_size
    for first in range(dp_rank * micro_batch_size, _round_up(len(chosen), step), step):
        rows, counted = [], []
        for place in range(first, first + micro_batch_size):
            window = int(chosen[min(place, len(chosen) - 1)])
            source = int(np.searchsorted(ends, window, side="right"))
            start = window - (int(ends[source - 1]) if source else 0)
            rows.append(streams[source].read(start * seq_length, seq_length + 1))
            counted.append(float(place < len(chosen)))
        text, supervised = unmark(torch.from_numpy(np.stack(rows)))  # [b, s + 1]
        yield {
            "tokens": text[:, :-1].contiguous(),
            "labels": text[:, 1:].contiguous(),
            "loss_mask": torch.tensor(counted)[:, None] * supervised[:, 1:],
            "position_ids": torch.arange(seq_length).repeat(micro_batch_size, 1),
        }


class TokenStream:
    """A .bin/.idx pair as one long row of tokens."""

    def __init__(self, prefix: str) -> None:
        require(
            IndexedDataset.exists(prefix),
            f"{prefix}.bin and {prefix}.idx are not both there. Run prepare-data, or correct the path.",
            FileNotFoundError,
        )
        self.dataset = IndexedDataset(prefix)
        self.ends = np.cumsum(self.dataset.sequence_lengths, dtype=np.int64)

    def windows(self, seq_length: int) -> int:
        """Windows whose last token still has a label."""
        return max(0, (int(self.ends[-1]) - 1) // seq_length)

    def read(self, start: int, length: int) -> np.ndarray:
        """Tokens [start, start + length), int64, across documents, with their marks."""
        parts = []
        document = int(np.searchsorted(self.ends, start, side="right"))
        while length > 0:
            begin = int(self.ends[document - 1]) if document else 0
            take = min(length, int(self.ends[document]) - start)
            parts.append(self.dataset.get(document, offset=start - begin, length=take))
            start, length, document = start + take, length - take, document + 1
        return np.concatenate(parts, dtype=np.int64)


def _weighted(blend: list[tuple[Artifact, float]]) -> list[str]:
    """Megatron-core's flat [weight, prefix, weight, prefix, ...]; without weights a lone prefix."""
    flat = []
    for artifact, source, weight in weighted_sources(blend):
        flat += [repr(weight), os.path.abspath(artifact.path / source[TRAIN])]
    return flat if len(flat) > 2 else flat[1:]


def _by_size(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.prompt) + len(document.text)
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple

"""import-hf: a Hugging Face checkpoint in, a NeMo 2 checkpoint out; tensors stream one at a time from safetensors.

One process writes the artifact's files from the folder's, several load their parts of the model. A .gguf file becomes a
Hugging Face folder beside the output first, which goes when the import has ended.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from minitron_nemo import engine, platform
from minitron_nemo.artifact import Artifact, open_artifact, saying_when_full, writing
from minitron_nemo.checks import NothingThere, require
from minitron_nemo.config.stages import ImportHfConfig
from minitron_nemo.hf.checkpoint import load_hf
from minitron_nemo.hf.folder import Folder
from minitron_nemo.hf.gguf import is_gguf, unpack_gguf
from minitron_nemo.kinds import refuse_as_hugging_face
from minitron_nemo.parallel import Groups, is_rank_zero, rank_zero_says, rank_zero_works, world_size
from minitron_nemo.runtime.bridge import import_weights
from minitron_nemo.runtime.layout import prepare_layout
from minitron_nemo.stages.training import require_vocabulary
from minitron_nemo.text.tokenizer_files import require_ids_within, require_tokenizer_files

EMBEDDED = "embedded"
logger = logging.getLogger(__name__)


def embedded_teacher() -> Path:
    """The HF checkpoint that ships with the package."""
    return Path(__file__).parents[1] / "teacher"


def run(config: ImportHfConfig) -> Artifact:
    """Raises: FileNotFoundError, ValueError: see `hf.checkpoint.load_hf` and `hf.gguf.unpack_gguf`; before anything is
    written."""
    with _checkpoint(config) as (source, facts):
        tokenizer = source if config.tokenizer is None else Path(config.tokenizer)
        folder = Folder(source, ignore=config.ignore_tensors)
        shape = folder.shape(make_vocab_size_divisible_by=config.make_vocab_size_divisible_by)
        require_tokenizer_files(tokenizer, key="import_hf.model" if config.tokenizer is None else "import_hf.tokenizer")
        require_vocabulary(shape, tokenizer)
        require_ids_within(tokenizer, folder.vocab_size)
        dtype = _dtype(folder, config.trainer.precision)
        prepare_layout(config.trainer, shape)
        with writing(Path(config.output), stage="import-hf", config=config) as draft:
            if world_size() == 1:
                import_weights(folder, shape, draft.path, meta_core=engine.meta_core, dtype=dtype)
                engine.describe_model(shape, tokenizer, draft.path)
            else:
                core = engine.new_core(shape, config.trainer, dtype)
                load_hf(core, source, shape, Groups.from_megatron(), ignore=config.ignore_tensors)
                engine.save_model(core, shape, tokenizer, draft.path)
            draft.facts.update(facts, vocab_size=folder.vocab_size, dtype=str(dtype).removeprefix("torch."))
            draft.metrics.update(
                parameters=shape.num_parameters, non_embedding_parameters=shape.num_non_embedding_parameters, tokens=0
            )
    return open_artifact(Path(config.output))


@contextmanager
def _checkpoint(config: ImportHfConfig) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The Hugging Face folder to import, and what the manifest says of where it is from."""
    source = embedded_teacher() if config.model == EMBEDDED else Path(config.model)
    if not rank_zero_says(is_gguf(source)):
        refuse_as_hugging_face(source, "import_hf.model")
        require(
            (source / "config.json").is_file(),
            f"import_hf.model={source} is no directory with a config.json. Set import_hf.model to a Hugging Face "
            "checkpoint: config.json, *.safetensors and the tokenizer's files; or to a .gguf file.",
            NothingThere,
        )
        yield source, {}
        return
    output = Path(config.output)
    unpacked = output.with_name(output.name + ".unpacked")

    def unpack() -> dict[str, Any]:
        shutil.rmtree(unpacked, ignore_errors=True)
        with saying_when_full(output):
            return unpack_gguf(source, unpacked, with_tokenizer=config.tokenizer is None)

    try:
        yield unpacked, {"source": rank_zero_works(unpack)}
    finally:
        if is_rank_zero():  # the others have read all they need once the artifact is written
            shutil.rmtree(unpacked, ignore_errors=True)


def _dtype(folder: Folder, precision: str) -> torch.dtype:
    """What the weights are stored in: as they came, so that the artifact is the same on every machine, or as asked."""
    dtype = folder.dtype if precision == "auto" else platform.dtype_of(precision)
    wider = {tensor.dtype for tensor in folder.tensors.values() if tensor.dtype.itemsize > dtype.itemsize}
    if wider:
        logger.warning(
            "%s holds tensors in %s, which are stored in %s.",
            folder.path,
            ", ".join(sorted(str(each).removeprefix("torch.") for each in wider)),
            str(dtype).removeprefix("torch."),
        )
    return dtype

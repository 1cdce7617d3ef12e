"""import-hf: a Hugging Face checkpoint in, a NeMo 2 checkpoint out; tensors stream one at a time from safetensors.

A .gguf file becomes a Hugging Face folder beside the output first, which goes when the import has ended.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from minitron_nemo import engine, platform
from minitron_nemo.artifact import Artifact, open_artifact, saying_when_full, writing
from minitron_nemo.checks import NothingThere, require
from minitron_nemo.config.stages import ImportHfConfig
from minitron_nemo.hf.checkpoint import load_hf
from minitron_nemo.hf.config import shape_from_hf, vocab_size_from_hf
from minitron_nemo.hf.gguf import is_gguf, unpack_gguf
from minitron_nemo.parallel import Groups, is_rank_zero, rank_zero_works
from minitron_nemo.runtime.layout import prepare_layout
from minitron_nemo.stages.training import require_vocabulary
from minitron_nemo.text.tokenizer import require_tokenizer_files

EMBEDDED = "embedded"


def embedded_teacher() -> Path:
    """The HF checkpoint that ships with the package."""
    return Path(__file__).parents[1] / "teacher"


def run(config: ImportHfConfig) -> Artifact:
    """Raises: FileNotFoundError, ValueError: see `hf.checkpoint.load_hf` and `hf.gguf.unpack_gguf`; before anything is
    written."""
    with _checkpoint(config) as (source, facts):
        tokenizer = source if config.tokenizer is None else Path(config.tokenizer)
        shape = shape_from_hf(source, make_vocab_size_divisible_by=config.make_vocab_size_divisible_by)
        require_tokenizer_files(tokenizer, key="import_hf.model" if config.tokenizer is None else "import_hf.tokenizer")
        require_vocabulary(shape, tokenizer)
        prepare_layout(config.trainer, shape)
        core = engine.new_core(shape, config.trainer, platform.dtype_of(config.trainer.precision))
        load_hf(core, source, shape, Groups.from_megatron())
        output = Path(config.output)
        with writing(output, stage="import-hf", config=config) as draft:
            engine.save_model(core, shape, tokenizer, draft.path)
            draft.facts.update(facts, vocab_size=vocab_size_from_hf(source))
            draft.metrics.update(
                parameters=shape.num_parameters, non_embedding_parameters=shape.num_non_embedding_parameters, tokens=0
            )
    return open_artifact(output)


@contextmanager
def _checkpoint(config: ImportHfConfig) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The Hugging Face folder to import, and what the manifest says of where it is from."""
    source = embedded_teacher() if config.model == EMBEDDED else Path(config.model)
    if not is_gguf(source):
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

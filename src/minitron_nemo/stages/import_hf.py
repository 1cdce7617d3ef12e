"""import-hf: a Hugging Face checkpoint in, a NeMo 2 checkpoint out; tensors stream one at a time from safetensors."""

from __future__ import annotations

from pathlib import Path

from minitron_nemo import engine, platform
from minitron_nemo.artifact import Artifact, open_artifact, writing
from minitron_nemo.checks import NothingThere, require
from minitron_nemo.config.stages import ImportHfConfig
from minitron_nemo.hf.checkpoint import load_hf
from minitron_nemo.hf.config import shape_from_hf, vocab_size_from_hf
from minitron_nemo.parallel import Groups
from minitron_nemo.runtime.layout import prepare_layout
from minitron_nemo.stages.training import require_vocabulary
from minitron_nemo.text.tokenizer_files import require_ids_within, require_tokenizer_files

EMBEDDED = "embedded"


def embedded_teacher() -> Path:
    """The HF checkpoint that ships with the package."""
    return Path(__file__).parents[1] / "teacher"


def run(config: ImportHfConfig) -> Artifact:
    """Raises: FileNotFoundError, ValueError: see `hf.checkpoint.load_hf`; before anything is written."""
    source = embedded_teacher() if config.model == EMBEDDED else Path(config.model)
    require(
        (source / "config.json").is_file(),
        f"import_hf.model={source} is no directory with a config.json. Set import_hf.model to a Hugging Face "
        "checkpoint: config.json, *.safetensors and the tokenizer's files.",
        NothingThere,
    )
    shape = shape_from_hf(source, make_vocab_size_divisible_by=config.make_vocab_size_divisible_by)
    require_tokenizer_files(source, key="import_hf.model")
    require_vocabulary(shape, source)
    require_ids_within(source, vocab_size_from_hf(source))
    prepare_layout(config.trainer, shape)
    core = engine.new_core(shape, config.trainer, platform.dtype_of(config.trainer.precision))
    load_hf(core, source, shape, Groups.from_megatron())
    output = Path(config.output)
    with writing(output, stage="import-hf", config=config) as draft:
        engine.save_model(core, shape, source, draft.path)
        draft.facts["vocab_size"] = vocab_size_from_hf(source)
        draft.metrics.update(
            parameters=shape.num_parameters, non_embedding_parameters=shape.num_non_embedding_parameters, tokens=0
        )
    return open_artifact(output)

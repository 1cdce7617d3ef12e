"""A compression small enough for a test: a random Llama of 50 thousand parameters, a little text, a few steps."""

from __future__ import annotations

import sysconfig
from dataclasses import dataclass
from pathlib import Path

from minitron_nemo.text.tokenizer import train_tokenizer
from support.door import Done, Door

VOCAB_SIZE = 512
SEQ_LENGTH = 32
STEPS = 3
SEARCH_RUNGS = (2, 4)


def write_corpus(directory: Path, files: int = 60) -> Path:
    """Real text: the smallest modules of the standard library that say something."""
    directory.mkdir(parents=True, exist_ok=True)
    modules = Path(sysconfig.get_paths()["stdlib"]).glob("*.py")
    sizes = sorted((path.stat().st_size, path.name, path) for path in modules if path.stat().st_size > 2000)
    for _, name, path in sizes[:files]:
        (directory / name).write_bytes(path.read_bytes())
    return directory


def write_teacher(directory: Path, corpus: Path, *, tied: bool = False, seed: int = 0) -> Path:
    """A HF checkpoint as transformers saves it: Llama with GQA, head_dim * heads different from hidden_size."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    train_tokenizer((file.read_text() for file in sorted(corpus.iterdir())), vocab_size=VOCAB_SIZE, output=directory)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=80,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=6,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        initializer_range=0.1,
    )
    LlamaForCausalLM(config).save_pretrained(directory, safe_serialization=True)
    return directory


def quickstart_overrides(directory: Path, teacher: Path, corpus: Path) -> list[str]:
    """The quickstart recipe in miniature, writing to `directory`/run."""
    training = []
    for section in ("correct_teacher", "distill"):
        training += [
            f"{section}.training.steps={STEPS}",
            f"{section}.training.optim.warmup_steps=1",
            f"{section}.training.validation_every=0",
        ]
    return [
        "recipe=quickstart",
        f"run_dir={directory / 'run'}",
        f"import_hf.model={teacher}",
        f"prepare_data.corpus={corpus}",
        "prepare_data.validation_fraction=0.2",
        "trainer.precision=fp32",
        f"trainer.seq_length={SEQ_LENGTH}",
        "trainer.micro_batch_size=2",
        "trainer.global_batch_size=4",
        "trainer.tensorboard=false",
        "estimate_importance.importance.num_samples=8",
        "prune.target.hidden_size=24",
        "prune.target.ffn_hidden_size=48",
        "prune.target.num_attention_heads=4",
        "evaluate.num_samples=8",
        "evaluate.prompts=[def]",
        "evaluate.new_tokens=4",
        "export_hf.dtype=fp32",
        *training,
    ]


@dataclass(frozen=True)
class TinyChain:
    """A finished chain: what it was made of, what was typed and what came on the screen."""

    directory: Path
    teacher: Path
    corpus: Path
    done: Done

    @property
    def run_dir(self) -> Path:
        return self.directory / "run"

    @property
    def overrides(self) -> list[str]:
        return quickstart_overrides(self.directory, self.teacher, self.corpus)


def compress_once(door: Door, directory: Path) -> TinyChain:
    corpus = write_corpus(directory / "corpus")
    teacher = write_teacher(directory / "teacher", corpus)
    done = door("compress", *quickstart_overrides(directory, teacher, corpus))
    return TinyChain(directory, teacher, corpus, done)


def search_command(chain: TinyChain, output: Path) -> list[str]:
    """A search of the chain's teacher, in miniature: three survivors, two rungs."""
    return [
        "search",
        *chain.overrides,
        f"search.output={output}",
        "search.parameters=0.75",
        "search.tolerance=0.1",
        "search.constraints.seq_length=16",
        "search.constraints.time_to_first_token=100s",
        "+search.space.hidden_size=[16,24,32]",
        "+search.space.ffn_hidden_size={from:32,to:64,step:16}",
        "+search.space.num_attention_heads=[4,8]",
        "search.surgery.method=calibrated",
        "search.surgery.basis=channels",
        "search.surgery.compensation.layers_at_once=0",
        "search.surgery.compensation.num_samples=4",
        "search.pricing.points=1",
        "search.pricing.num_samples=4",
        "search.pricing.measured=4",
        "search.halving.survivors=3",
        f"search.halving.rungs=[{','.join(map(str, SEARCH_RUNGS))}]",
        f"search.training.steps={SEARCH_RUNGS[-1]}",
        "search.training.checkpoint_every=1",
        "search.training.optim.warmup_steps=1",
    ]

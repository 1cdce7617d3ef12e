"""Which models are timed, on what, and how often: conf's `throughput` section."""

from __future__ import annotations

from dataclasses import dataclass, field

from minitron_nemo.checks import require
from minitron_nemo.config.identity import how
from minitron_nemo.config.ranges import Ranged, ranged

ENGINES = ("transformers", "vllm")
DTYPES = ("auto", "bf16", "fp32")


@dataclass
class TimedModel:
    """One of the models that are timed side by side."""

    model: str = ""
    """Hugging Face folder, such as an export; one without *.safetensors gets random weights. `embedded` is the small
    teacher of this package, and a name of the papers' (Llama-3.1-8B) their model's shape with random weights."""
    label: str | None = None
    """What the table calls it; null: the name of its folder."""

    @property
    def title(self) -> str:
        return self.label if self.label is not None else self.model.rstrip("/").rpartition("/")[2]


@dataclass
class ThroughputConfig(Ranged):
    models: list[TimedModel] = field(default_factory=list)
    """The teacher first: the others' speeds are shown as multiples of the first one's."""
    engine: str = "transformers"
    """What runs them: transformers, or vllm where it is installed."""
    dtype: str = "auto"
    """Of weights and products: bf16, fp32, or auto: bf16 where the machine multiplies faster in it."""
    batch_size: int = ranged(8, at_least=1)
    """Sequences at once, the same for every model."""
    prompt_tokens: int = ranged(128, at_least=1)
    """Tokens of each prompt, drawn at random."""
    new_tokens: int = ranged(64, at_least=2, mend="the prompt makes the first, and decoding begins with the second")
    """Tokens that are written after each; the end of text does not end them."""
    warmup: int = ranged(1, at_least=0)
    """Runs before each turn's that do not count."""
    repeats: int = ranged(5, at_least=1)
    """Turns of each model, one after the other; medians are shown."""
    largest_batch: bool = True
    """Also time every model at the largest batch that fits: batch_size doubled until memory or a limit ends it."""
    max_batch_size: int | None = ranged(None, at_least=1)
    """Of that batch; null: on an accelerator none, on a CPU 64."""
    max_memory_gigabytes: float | None = ranged(None, above=0)
    """What weights, cache and activations may take with it; null: on an accelerator what there is, on a CPU half of
    the memory that is free, as nothing else would end it there."""
    output: str = how("runs/throughput")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.engine in ENGINES, f"engine={self.engine} is not known; use {' or '.join(ENGINES)}.")
        require(self.dtype in DTYPES, f"dtype={self.dtype} is not known; use {', '.join(DTYPES[:-1])} or {DTYPES[-1]}.")
        titles = [each.title for each in self.models]
        for number, each in enumerate(self.models):
            require(
                bool(each.model),
                f"models[{number}] names no model. Give it a folder, such as model: ${{export_hf.output}}.",
            )
            require(
                titles.count(each.title) == 1,
                f"models: {titles.count(each.title)} are called {each.title!r}. Give each a label of its own.",
            )

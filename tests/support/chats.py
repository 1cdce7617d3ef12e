"""A small tokenizer with chat tokens, and templates of the kinds there are."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

_TURN = "<|im_start|>{{ m.role }}\n{{ m.content }}{% for c in m.tool_calls %}{{ c | tojson }}{% endfor %}<|im_end|>\n"
_ASK = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
CHATML = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}" + _TURN + "{% endfor %}" + _ASK
)
"""As most are: what the assistant writes shows by growing."""
GENERATION = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\n"
    "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}\n"
    "{% else %}" + _TURN + "{% endif %}{% endfor %}" + _ASK
)
"""Says itself what the assistant writes."""
GROWING = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content }}</s>"
    "{% else %}[{{ m.content }}]{% endif %}{% endfor %}"
)
"""Has no prompt for an answer."""


def chat_tokenizer(path: Path, template: str | None = None, *, bos: bool = False, eos: str = "<|endoftext|>") -> Path:
    """A byte-level BPE saved to `path`; with `bos`, its post-processor begins a text."""
    path.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    trainer = trainers.BpeTrainer(
        vocab_size=360,
        special_tokens=["<|endoftext|>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        [f"line {number} pay  {number * 37}\n\nit's {number}" for number in range(99)], trainer
    )
    if bos:
        template_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
        )
        tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), template_processor])
    tokenizer.save(str(path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": eos}
    (path / "tokenizer_config.json").write_text(
        json.dumps(config | {"chat_template": template} if template else config)
    )
    return path

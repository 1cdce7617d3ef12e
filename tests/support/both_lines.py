"""Every family through both lines of transformers: what either saved is imported, what we export either loads.

    transformers saves a random model  ->  import  ->  Megatron's logits beside transformers'
    the imported model                 ->  export  ->  transformers' logits beside Megatron's

Cells are max |difference| / max |logit|, float32.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from minitron_nemo.hf.checkpoint import load_hf, save_hf
from minitron_nemo.hf.folder import shape_from_hf, vocab_size_from_hf
from minitron_nemo.parallel import Groups
from support.hf import DIMS, LLAMA3_SCALING, TOKENS
from support.megatron import bare_model, run_gpt
from support.transformers5 import transformers4, transformers5

LINES: dict[str, Callable[..., Any]] = {"4.57": transformers4, "5.x": transformers5}
_EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "initializer_range": 0.3}
_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "llama scaled": ("LlamaConfig", {"rope_scaling": LLAMA3_SCALING, "rope_theta": 500.0}),
    "llama biases": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("MistralConfig", {"sliding_window": None}),
    "mistral scaled": ("MistralConfig", {"sliding_window": None, "rope_scaling": LLAMA3_SCALING, "rope_theta": 500.0}),
    "nemotron": ("NemotronConfig", {"partial_rotary_factor": 0.25, "norm_eps": 1e-3}),
    "nemotron biases": ("NemotronConfig", {"attention_bias": True, "mlp_bias": True}),
    "qwen2": ("Qwen2Config", {"rope_theta": 1e6}),
    "qwen3": ("Qwen3Config", {"rope_theta": 1e6}),
    "mixtral": ("MixtralConfig", _EXPERTS | {"num_local_experts": 6}),
    "qwen3_moe": ("Qwen3MoeConfig", _EXPERTS | {"num_experts": 6, "moe_intermediate_size": 20, "norm_topk_prob": True}),
    "qwen3_moe mixed": (
        "Qwen3MoeConfig",
        _EXPERTS | {"num_experts": 6, "moe_intermediate_size": 20, "mlp_only_layers": [1]},
    ),
}
MODELS = {
    f"{name}, {'tied' if tied else 'untied'}": (kind, DIMS | own | {"tie_word_embeddings": tied})
    for name, (kind, own) in _FAMILIES.items()
    for tied in (False, True)
}

_SAVE = """
import json, sys
from pathlib import Path
import torch, transformers
from safetensors.torch import save_file
models, tokens, folder = json.loads(sys.argv[1]), torch.tensor(json.loads(sys.argv[2])), Path(sys.argv[3])
for name, (kind, config) in models.items():
    torch.manual_seed(0)
    config = getattr(transformers, kind)(**config)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
    model.eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "norm" in key or key.endswith("bias"):  # fresh ones are ones and zeros
                parameter.add_(0.1 * torch.randn(parameter.shape))
    model.save_pretrained(folder / name)
    save_file({"logits": model(tokens).logits.detach().contiguous()}, folder / f"{name}.logits")
print(json.dumps(transformers.__version__))
"""
_LOAD = """
import json, sys
from pathlib import Path
import torch, transformers
from safetensors.torch import save_file
names, tokens, folder = json.loads(sys.argv[1]), torch.tensor(json.loads(sys.argv[2])), Path(sys.argv[3])
problems = {}
for name in names:
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder / name, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    found = {key: sorted(map(str, value)) for key, value in info.items() if value}
    if found:
        problems[name] = found
    save_file({"logits": model.eval()(tokens).logits.detach().contiguous()}, folder / f"{name}.{sys.argv[4]}.logits")
print(json.dumps(problems))
"""


@torch.no_grad()
def both_lines(folder: Path, models: dict[str, Any] = MODELS) -> dict[str, dict[str, float]]:
    """Model -> {import 4.57, import 5.x, export 4.57, export 5.x: largest relative difference of a logit}."""
    table: dict[str, dict[str, float]] = {name: {} for name in models}
    tokens = json.dumps(TOKENS.tolist())
    ours: dict[str, Tensor] = {}
    for line, run in LINES.items():
        run(_SAVE, json.dumps(models), tokens, folder / line)
        for name in models:
            source = folder / line / name
            shape = shape_from_hf(source)
            core = bare_model(shape).eval()
            load_hf(core, source, shape, Groups())
            logits = run_gpt(core, TOKENS)
            assert logits is not None
            theirs = load_file(folder / line / f"{name}.logits")["logits"]
            table[name][f"import {line}"] = _difference(logits, theirs)
            if name not in ours:  # random weights of the two lines differ: one of them is exported
                ours[name] = logits
                save_hf(core, folder / "export" / name, shape, Groups(), vocab_size=vocab_size_from_hf(source))
    for line, run in LINES.items():
        problems = run(_LOAD, json.dumps(list(models)), tokens, folder / "export", line)
        assert not problems, f"transformers {line} does not find in an export what it looks for: {problems}"
        for name in models:
            theirs = load_file(folder / "export" / f"{name}.{line}.logits")["logits"]
            table[name][f"export {line}"] = _difference(ours[name], theirs)
    return table


def _difference(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())

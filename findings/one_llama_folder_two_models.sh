#!/usr/bin/env bash
# transformers 4.57.6 and 5.23.0 open the same Llama folder as different models, both without a warning, where
#
#   - the folder was saved by 5.x: rope_theta and scaling stand in rope_parameters alone, which 4.57 does not read; it takes
#     base 10000 and no scaling
#   - config.json has both forms and they disagree: 4.57 goes by rope_theta, 5.x by rope_parameters
#   - rope_scaling and rope_parameters are both there: 5.x goes by rope_scaling, so the later form is not always the stronger
#   - tie_word_embeddings is true over an lm_head.weight that differs from the embedding: 4.57 drops it, 5.x keeps it, and
#     saves the true flag again
#
# Seen on 2026-11-28, Python 3.11, torch 2.13.0 (base / scaling / is the head the file's own):
#
#     saved by 5.x                          4.57: 10000 none    5.x: 500000 llama3
#     rope_theta 10000, dict says 500000    4.57: 10000         5.x: 500000
#     both scalings, factor 8 and 2         4.57: 8             5.x: 8
#     tied flag, another head               4.57: no            5.x: yes, flag saved as True
#
# Fails where that changes.
set -euo pipefail
place="$(mktemp -d)"
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
pip() { "$place/venv/bin/pip" install --quiet --disable-pip-version-check "$@"; }
four() { "$place/venv/bin/python" "$@" 2>"$place/log" || { cat "$place/log" >&2 && exit 1; }; }
five() { PYTHONPATH="$place/later" four "$@"; }
pip torch==2.13.0 transformers==4.57.6 tokenizers==0.22.2 huggingface-hub==0.36.2 'numpy<2.3'
pip --target "$place/later" transformers==5.23.0 tokenizers==0.23.3 huggingface-hub==1.33.0

cat >"$place/make.py" <<'PY'
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

place = Path(sys.argv[1])
dims = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)
scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
scaling["original_max_position_embeddings"] = 64
later = {**scaling, "rope_theta": 500000.0}
LlamaForCausalLM(LlamaConfig(**dims, rope_parameters=dict(later))).save_pretrained(place / "saved by 5.x")
for name, keys in {
    "bases disagree": {"rope_theta": 10000.0, "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
    "scalings disagree": {"rope_theta": 500000.0, "rope_scaling": scaling, "rope_parameters": {**later, "factor": 2.0}},
    "tied flag, another head": {"rope_theta": 10000.0, "tie_word_embeddings": True},
}.items():
    LlamaForCausalLM(LlamaConfig(**dims)).save_pretrained(place / name)
    config = json.loads((place / name / "config.json").read_text())
    config = {key: value for key, value in config.items() if not key.startswith("rope")} | keys
    (place / name / "config.json").write_text(json.dumps(config))
PY
cat >"$place/look.py" <<'PY'
import json
import sys
import warnings
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, logging

logging.set_verbosity_error()
found = {}
for folder in sorted(each for each in Path(sys.argv[1]).iterdir() if each.is_dir()):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    frequencies = model.model.rotary_emb.inv_freq
    head = load_file(folder / "model.safetensors")["lm_head.weight"]
    model.save_pretrained(Path(sys.argv[2]) / folder.name)
    saved = json.loads((Path(sys.argv[2]) / folder.name / "config.json").read_text())
    found[folder.name] = {
        "frequencies": [round(float(each), 8) for each in frequencies],
        "own head": bool(torch.equal(model.lm_head.weight, head)),
        "saved flag": saved.get("tie_word_embeddings"),
    }
print(json.dumps(found))
PY
mkdir "$place/folders"
five "$place/make.py" "$place/folders" >/dev/null
four "$place/look.py" "$place/folders" "$place/out4" | tail -n 1 >"$place/4.json"
five "$place/look.py" "$place/folders" "$place/out5" | tail -n 1 >"$place/5.json"

"$place/venv/bin/python" - "$place/4.json" "$place/5.json" <<'PY'
import json
import math
import sys

four, five = (json.load(open(path)) for path in sys.argv[1:])


def frequencies(base, factor=None):
    """Of a head of 8 channels."""
    found = []
    for i in range(4):
        frequency = base ** (-i / 4)
        if factor is not None:
            turns = 64 * frequency / (2 * math.pi)
            kept = min(1.0, max(0.0, (turns - 1.0) / 3.0))
            frequency *= kept + (1 - kept) / factor
        found.append(frequency)
    return found


def is_(found, *expected):
    return all(math.isclose(a, b, rel_tol=1e-4, abs_tol=2e-8) for a, b in zip(found["frequencies"], frequencies(*expected)))


for name in four:
    print(f"{name:26} 4.57: {four[name]}\n{'':26} 5.x:  {five[name]}")
assert is_(four["saved by 5.x"], 10000.0) and is_(five["saved by 5.x"], 500000.0, 8.0)
assert is_(four["bases disagree"], 10000.0) and is_(five["bases disagree"], 500000.0)
assert is_(four["scalings disagree"], 500000.0, 8.0) and is_(five["scalings disagree"], 500000.0, 8.0)
tied = "tied flag, another head"
assert not four[tied]["own head"] and five[tied]["own head"] and five[tied]["saved flag"] is True
PY

#!/usr/bin/env bash
# transformers 4.57.6 and 5.23.0, gguf 0.19.0: AutoModelForCausalLM.from_pretrained(folder, gguf_file=...) of a llama whose
# rope is scaled gives the model without the scaling, and no warning, in both ways in which llama.cpp's converter stores it:
#
#   - llama.rope.scaling.type "linear" with llama.rope.scaling.factor 4
#   - rope_freqs.weight, the divisors by which Llama 3.1 to 3.3 are stored
#
# Logits are right for the first tokens and drift with the position. 4.57.6 also ignores tokenizer.ggml.add_bos_token false
# and takes the text of the BOS for the end of text; see the same file in docs/real_model.md.
#
# Seen on 2026-11-28, Python 3.11, torch 2.13.0: the inverse frequencies of all three files, scaled or not, are
#
#     [1.0, 0.1, 0.01, 0.001] in both lines, where linear should give [0.25, 0.025, ...] and the divisors [1.0, 0.05, 0.0025, ...]
#
# Fails where that changes.
set -euo pipefail
place="$(mktemp -d)"
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
pip() { "$place/venv/bin/pip" install --quiet --disable-pip-version-check "$@"; }
four() { "$place/venv/bin/python" "$@" 2>"$place/log" || { cat "$place/log" >&2 && exit 1; }; }
five() { PYTHONPATH="$place/later" four "$@"; }
pip torch==2.13.0 gguf==0.19.0 transformers==4.57.6 tokenizers==0.22.2 huggingface-hub==0.36.2 'numpy<2.3' accelerate
pip --target "$place/later" transformers==5.23.0 tokenizers==0.23.3 huggingface-hub==1.33.0

cat >"$place/make.py" <<'PY'
import sys
from pathlib import Path

import gguf
import numpy as np

hidden, ffn, heads, vocabulary = 32, 64, 4, 64
random = np.random.default_rng(0)
for name in ("plain", "linear", "divisors"):
    folder = Path(sys.argv[1]) / name
    folder.mkdir()
    writer = gguf.GGUFWriter(folder / "model.gguf", "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(hidden)
    writer.add_block_count(1)
    writer.add_feed_forward_length(ffn)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(hidden // heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(vocabulary)
    writer.add_file_type(0)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"t{index}" for index in range(vocabulary)])
    writer.add_token_types([1] * vocabulary)
    writer.add_token_merges(["t 1"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    if name == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(4.0)
    if name == "divisors":
        writer.add_tensor("rope_freqs.weight", np.array([1, 2, 4, 8], np.float32))
    sizes = {"token_embd.weight": (vocabulary, hidden), "output.weight": (vocabulary, hidden)}
    sizes |= {"output_norm.weight": (hidden,), "blk.0.attn_norm.weight": (hidden,), "blk.0.ffn_norm.weight": (hidden,)}
    sizes |= {f"blk.0.attn_{part}.weight": (hidden, hidden) for part in ("q", "k", "v", "output")}
    sizes |= {"blk.0.ffn_gate.weight": (ffn, hidden), "blk.0.ffn_up.weight": (ffn, hidden)}
    sizes |= {"blk.0.ffn_down.weight": (hidden, ffn)}
    for tensor, size in sizes.items():
        writer.add_tensor(tensor, random.standard_normal(size).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
PY
cat >"$place/look.py" <<'PY'
import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

found = {}
for folder in sorted(Path(sys.argv[1]).iterdir()):
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file="model.gguf", dtype=torch.float32)
    found[folder.name] = [round(float(each), 6) for each in model.model.rotary_emb.inv_freq]
print(json.dumps(found))
PY
mkdir "$place/folders"
four "$place/make.py" "$place/folders"
four "$place/look.py" "$place/folders" | tail -n 1 | tee "$place/4.json"
five "$place/look.py" "$place/folders" | tail -n 1 | tee "$place/5.json"

"$place/venv/bin/python" - "$place/4.json" "$place/5.json" <<'PY'
import json
import sys

for path in sys.argv[1:]:
    found = json.load(open(path))
    assert found["plain"] == [1.0, 0.1, 0.01, 0.001]
    assert found["linear"] == found["plain"], "linear scaling is no longer dropped: mend the finding"
    assert found["divisors"] == found["plain"], "the divisors are no longer dropped: mend the finding"
PY

#!/usr/bin/env bash
# nemo-toolkit 2.7.3 beside transformers 5.23.0 (which its own bound forbids, and images installed with --no-deps have):
# everything imports and trains, but saving any checkpoint with a Hugging Face tokenizer ends in
#
#     UnserializableValueError: Unserializable value <...AutoTokenizer object ...>
#
# nemo.lightning.io.registry tells its `io` how tokenizers are saved inside one `try ... except ImportError: pass`, which also
# imports transformers.models.llama.tokenization_llama_fast. 5.x has no such module, so the whole registration is skipped
# without a word, that of NeMo's own AutoTokenizer too. It is made good by calling io.track_io on that class.
#
# Seen on 2026-11-28, Python 3.11, torch 2.13.0, megatron-core 0.15.3:
#
#     transformers 4.57.6: {"version": "4.57.6", "tokenizer is registered": true}
#     transformers 5.23.0: {"version": "5.23.0", "tokenizer is registered": false}
#
# Fails where that changes.
set -euo pipefail
place="$(mktemp -d)"
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
pip() { "$place/venv/bin/pip" install --quiet --disable-pip-version-check "$@"; }
four() { "$place/venv/bin/python" "$@" 2>"$place/log" || { cat "$place/log" >&2 && exit 1; }; }
five() { PYTHONPATH="$place/later" four "$@"; }
pip torch==2.13.0 megatron-core==0.15.3 'nemo-toolkit[lightning,common-only]==2.7.3' nemo-run==0.11.1 \
    transformers==4.57.6 'leptonai>=0.26.6,<0.27' 'nvidia-modelopt>=0.37,<0.38' 'tensorstore<0.1.72' 'zarr<3' 'numpy<2' \
    'protobuf>=5.29.5,<6' 'packaging>=24.2,<25' 'datasets<4.1' 'pyarrow<21' tiktoken sacrebleu
pip --no-deps --target "$place/later" transformers==5.23.0 tokenizers==0.23.3 huggingface-hub==1.33.0

cat >"$place/look.py" <<'PY'
import json

import nemo.lightning.io.registry
import transformers
from nemo.collections.common.tokenizers import AutoTokenizer

registered = hasattr(AutoTokenizer, "__io_artifacts__")
print(json.dumps({"version": transformers.__version__, "tokenizer is registered": registered}))
PY
four "$place/look.py" | tail -n 1 | tee "$place/4.json"
five "$place/look.py" | tail -n 1 | tee "$place/5.json"
grep -q 'registered": true' "$place/4.json"
grep -q 'registered": false' "$place/5.json"

#!/usr/bin/env bash
# transformers 5.23.0: AutoTokenizer gives a tokenizer.json another pre-tokenizer than the file says, without a word, where
# config.json beside it has model_type qwen2, although tokenizer_config.json names PreTrainedTokenizerFast; and where
# tokenizer_config.json names GPT2Tokenizer or Qwen2Tokenizer, whatever the model. save_pretrained then writes the changed
# file. 4.57.6 reads tokenizer.json as it is in all of these.
#
# Tried with a byte-level tokenizer that splits digits one by one before GPT-2's pattern, as SmolLM2's does.
#
# Seen on 2026-11-28, Python 3.11 (pieces of "a  42"):
#
#     class PreTrainedTokenizerFast, no config.json     4.57: a Ġ Ġ 4 2     5.23: a Ġ Ġ 4 2      [as the file says]
#     the same beside model_type qwen2                  4.57: the same      5.23: pre-tokenizer is Qwen2's
#     class GPT2Tokenizer                               4.57: the same      5.23: a Ġ Ġ 42, digits no longer split
#
# Fails where that changes.
set -euo pipefail
place="$(mktemp -d)"
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
pip() { "$place/venv/bin/pip" install --quiet --disable-pip-version-check "$@"; }
four() { "$place/venv/bin/python" "$@" 2>"$place/log" || { cat "$place/log" >&2 && exit 1; }; }
five() { PYTHONPATH="$place/later" four "$@"; }
pip transformers==4.57.6 tokenizers==0.22.2 huggingface-hub==0.36.2
pip --target "$place/later" transformers==5.23.0 tokenizers==0.23.3 huggingface-hub==1.33.0

cat >"$place/make.py" <<'PY'
import json
import sys
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
vocabulary = {token: index for index, token in enumerate(["<|end|>", *alphabet, "12", "42"])}
tokenizer = Tokenizer(models.BPE(vocabulary, [("1", "2"), ("4", "2")]))
tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
    [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
)
tokenizer.decoder = decoders.ByteLevel()
for name, kind, model in (
    ("plain", "PreTrainedTokenizerFast", None),
    ("beside qwen2", "PreTrainedTokenizerFast", "qwen2"),
    ("GPT2Tokenizer", "GPT2Tokenizer", None),
    ("Qwen2Tokenizer", "Qwen2Tokenizer", None),
):
    folder = Path(sys.argv[1]) / name
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": kind, "eos_token": "<|end|>", "unk_token": "<|end|>", "add_prefix_space": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    if model:
        (folder / "config.json").write_text(json.dumps({"model_type": model}))
PY
cat >"$place/look.py" <<'PY'
import json
import sys
from pathlib import Path

from transformers import AutoTokenizer

found = {}
for folder in sorted(Path(sys.argv[1]).iterdir()):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.save_pretrained(Path(sys.argv[2]) / folder.name)
    before, after = (
        json.loads((each / "tokenizer.json").read_text())["pre_tokenizer"]
        for each in (folder, Path(sys.argv[2]) / folder.name)
    )
    ids = tokenizer("a  42 12", add_special_tokens=False)["input_ids"]
    found[folder.name] = {"pieces": tokenizer.convert_ids_to_tokens(ids), "pre-tokenizer kept": before == after}
print(json.dumps(found))
PY
mkdir "$place/folders"
four "$place/make.py" "$place/folders" >/dev/null
four "$place/look.py" "$place/folders" "$place/out4" | tail -n 1 >"$place/4.json"
five "$place/look.py" "$place/folders" "$place/out5" | tail -n 1 >"$place/5.json"

"$place/venv/bin/python" - "$place/4.json" "$place/5.json" <<'PY'
import json
import sys

four, five = (json.load(open(path)) for path in sys.argv[1:])
for name in four:
    print(f"{name:16} 4.57: {four[name]}\n{'':16} 5.23: {five[name]}")
as_the_file_says = four["plain"]["pieces"]
assert as_the_file_says.count("42") == 0, "digits are no longer split as the file says"
assert all(each["pieces"] == as_the_file_says and each["pre-tokenizer kept"] for each in four.values())
assert five["plain"]["pieces"] == as_the_file_says
for name in ("beside qwen2", "GPT2Tokenizer", "Qwen2Tokenizer"):
    assert not five[name]["pre-tokenizer kept"], name
assert five["GPT2Tokenizer"]["pieces"] != as_the_file_says
PY

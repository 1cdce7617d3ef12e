#!/usr/bin/env bash
# lm_eval 0.4.13: {"task": <name>, "num_fewshot": 2} means two things. In the list of a group it is the registered task of
# that name with two examples. Given by itself (`TaskManager.load`, and so the `tasks` of `simple_evaluate`, whose
# docstring takes dicts), nothing is looked up: it is the whole config of a new task, which has no data set, no prompt and
# the output type generate_until. So a registered task cannot be had with one field changed but through a group around it,
# or by changing the loaded task.
#
# Seen on 2026-11-29, Python 3.11:
#
#     by its name      2 choices, num_fewshot 0
#     in a group       2 choices, num_fewshot 2
#     by itself        TypeError
#
# Fails where that changes.
set -euo pipefail
place="$(mktemp -d)"
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet --disable-pip-version-check lm_eval==0.4.13 datasets==4.8.5 torch==2.13.0 transformers==4.57.6

cat >"$place/tasks.py" <<'PY'
import json
import logging
import sys
import warnings
from pathlib import Path

warnings.filterwarnings("ignore")
from lm_eval.tasks import TaskManager

logging.disable(logging.ERROR)
here = Path(sys.argv[1])
questions = [{"q": f"{n} + 1 =", "options": [" 1", " 2"], "answer": n % 2} for n in range(4)]
(here / "sums.jsonl").write_text("\n".join(map(json.dumps, questions)))
(here / "sums.yaml").write_text(f"""
task: sums
dataset_path: json
dataset_kwargs: {{data_files: {{test: {here}/sums.jsonl}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{q}}}}"
doc_to_choice: "{{{{options}}}}"
doc_to_target: "{{{{answer}}}}"
num_fewshot: 0
""")
manager = TaskManager(include_path=str(here), include_defaults=False)
changed = {"task": "sums", "num_fewshot": 2}
for words, spec in {
    "by its name": "sums",
    "in a group": {"group": "all", "task": [dict(changed)]},
    "by itself": dict(changed),
}.items():
    try:
        task = manager.load([spec])["tasks"]["sums"]
        said = f"{len(task.doc_to_choice(questions[0]))} choices, num_fewshot {task.config.num_fewshot}"
    except Exception as error:
        said = type(error).__name__
    print(f"{words:17}{said}", flush=True)
PY
export HF_HOME="$place/cache" HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1
"$place/venv/bin/python" "$place/tasks.py" "$place" 2>"$place/log" | tee "$place/said" || { cat "$place/log" >&2 && exit 1; }
grep -qx "by its name      2 choices, num_fewshot 0" "$place/said"
grep -qx "in a group       2 choices, num_fewshot 2" "$place/said"
grep -qx "by itself        TypeError" "$place/said"

#!/usr/bin/env bash
# megatron-core 0.15.3: `vocab_parallel_cross_entropy` of a label outside the vocabulary (-100, with which torch's
# cross_entropy and transformers mark what is not to be learned; or one beyond the last row) is a plain finite number, the
# log of the sum of exp(logit - largest logit), with a gradient that pushes every logit down. It warns of nothing, so a
# loss over such labels without a loss mask looks healthy and is another loss. torch leaves out -100 and refuses the rest.
#
# Seen on 2026-11-29, Python 3.11, torch 2.13.0, one gloo rank on a CPU, logits 0 to 3:
#
#     label  -100: torch 0.000, gradient sums to 0.000; megatron 0.440, gradient sums to 1.000
#     label     7: torch IndexError; megatron 0.440, gradient sums to 1.000
#
# Fails where that changes.
set -euo pipefail
place="$(mktemp -d)"
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 megatron-core==0.15.3 'numpy<2'

cat >"$place/labels.py" <<'PY'
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
parallel_state.initialize_model_parallel()


def by_torch(logits, label):
    return torch.nn.functional.cross_entropy(logits, label, reduction="sum")


def by_megatron(logits, label):
    return vocab_parallel_cross_entropy(logits.unsqueeze(1).clone(), label.unsqueeze(1)).sum()


def said(loss, label):
    logits = torch.arange(4.0).unsqueeze(0).requires_grad_()
    try:
        value = loss(logits, torch.tensor([label]))
    except (IndexError, RuntimeError) as error:
        return type(error).__name__
    value.backward()
    return f"{float(value):.3f}, gradient sums to {float(logits.grad.sum()):.3f}"


for label in (-100, 7):
    print(f"label {label:5d}: torch {said(by_torch, label)}; megatron {said(by_megatron, label)}", flush=True)
PY
"$place/venv/bin/python" "$place/labels.py" 2>"$place/log" | tee "$place/said" || { cat "$place/log" >&2 && exit 1; }
grep -q -- '-100: torch 0.000, gradient sums to 0.000; megatron 0.440, gradient sums to 1.000' "$place/said"
grep -q ' 7: torch IndexError; megatron 0.440, gradient sums to 1.000' "$place/said"

#!/usr/bin/env bash
# lightning 2.4.0: a run whose checkpoint was written at the end of a step that validates, as a callback's
# `on_train_batch_end` does, and that was killed before that validation, makes up for it when it resumes. But of the
# validation set it reads one batch, whatever limit_val_batches says, and reports, logs and hands to callbacks (early
# stopping, the best checkpoint) the loss of that one as the step's validation: the loop still counts the batches of the
# validation before the checkpoint as read. lightning 2.6.6 does not make up for it, and the step has no validation.
#
# Seen on 2026-11-29, Python 3.11, torch 2.13.0, a set of 6 batches, a checkpoint after step 4 of 6:
#
#     2.4.0 undisturbed: batches read at step 2: 6, step 4: 6, step 6: 6; val_loss at step 4: 2.5
#     2.4.0 resumed:     batches read at step 4: 1, step 6: 6; val_loss at step 4: 0.0
#     2.6.6 undisturbed: batches read at step 2: 6, step 4: 6, step 6: 6; val_loss at step 4: 2.5
#     2.6.6 resumed:     batches read at step 6: 6; val_loss at step 4: None
#
# Fails where that changes.
set -euo pipefail
place="$(mktemp -d)"
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"

cat >"$place/fit.py" <<'PY'
import logging
import sys
import warnings
from collections import Counter

warnings.filterwarnings("ignore")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader


class Model(pl.LightningModule):
    """Its validation loss is the mean of the numbers in the validation set."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Linear(1, 1)
        self.read = Counter()
        self.at_step_4 = None

    def training_step(self, batch):
        return self.weight(batch).square().sum()

    def validation_step(self, batch):
        self.read[self.global_step] += 1
        self.log("val_loss", batch.mean())

    def on_validation_end(self):
        if self.global_step == 4:
            self.at_step_4 = float(self.trainer.callback_metrics["val_loss"])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1e-3)

    def train_dataloader(self):
        return DataLoader(torch.arange(100.0).view(-1, 1))

    def val_dataloader(self):
        return DataLoader(torch.arange(6.0).view(-1, 1))


class SaveAfterStep4(pl.Callback):
    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 4:
            trainer.save_checkpoint(checkpoint)


def run(name, resume=None):
    model = Model()
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    options = dict.fromkeys(quiet, False) | {"accelerator": "cpu", "max_steps": 6, "num_sanity_val_steps": 0}
    validation = {"val_check_interval": 2, "check_val_every_n_epoch": None, "limit_val_batches": 6}
    pl.Trainer(**options, **validation, callbacks=[SaveAfterStep4()]).fit(model, ckpt_path=resume)
    read = ", ".join(f"step {step}: {batches}" for step, batches in model.read.items())
    print(f"{pl.__version__} {name:13}batches read at {read}; val_loss at step 4: {model.at_step_4}", flush=True)


checkpoint = sys.argv[1]
run("undisturbed:")
run("resumed:", checkpoint)
PY
for version in 2.4.0 2.6.6; do
    "$place/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 "lightning==$version" 'numpy<2' \
        'setuptools<81'
    OMP_NUM_THREADS=1 "$place/venv/bin/python" "$place/fit.py" "$place/checkpoint-$version" 2>"$place/log" |
        tee "$place/said-$version" || { cat "$place/log" >&2 && exit 1; }
    grep -q "undisturbed: batches read at step 2: 6, step 4: 6, step 6: 6; val_loss at step 4: 2.5" "$place/said-$version"
done
grep -q "resumed: *batches read at step 4: 1, step 6: 6; val_loss at step 4: 0.0" "$place/said-2.4.0"
grep -q "resumed: *batches read at step 6: 6; val_loss at step 4: None" "$place/said-2.6.6"

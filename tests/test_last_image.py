"""The versions of NVIDIA's last image with `nemo.collections.llm`, beside this environment's torch."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from minitron_nemo.artifact import open_artifact
from support.door import ROOT
from support.last_image import on_the_last_image
from support.tiny import quickstart_overrides, write_corpus, write_teacher


def test_they_lie_within_what_the_package_asks_for() -> None:
    lines = on_the_last_image("-m", "minitron_nemo.versions").stdout.splitlines()
    found = dict(line.split()[:2] for line in lines)
    pins = re.findall(r"^(.+)==(.+)$", (ROOT / "constraints" / "nemo-26.02.txt").read_text(), flags=re.MULTILINE)
    assert len(pins) == 3 and dict(pins).items() <= found.items()


@pytest.mark.slow
def test_a_model_is_compressed_and_exported_with_them(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus")
    teacher = write_teacher(tmp_path / "teacher", corpus)
    on_the_last_image("-m", "minitron_nemo.cli", "compress", *quickstart_overrides(tmp_path, teacher, corpus))
    export = open_artifact(tmp_path / "run" / "export", made_by=("export-hf",))
    assert export.metrics["max_relative_logit_difference"] < 1e-4
    assert export.facts["sample"]


CLAIMS = [
    "tests/runtime/test_layouts.py::test_training_takes_the_same_steps_on_every_layout[distill-tp2]",
    "tests/runtime/test_layouts.py::test_training_takes_the_same_steps_on_every_layout[distill-pp2]",
    "tests/runtime/test_layouts.py::test_pruning_on_two_ranks_gives_the_same_student_to_the_bit[tp2]",
    "tests/runtime/test_layouts.py::test_a_saved_model_leaves_nothing_of_its_layout_to_the_next",
    "tests/runtime/test_generation.py::test_greedy_text_is_that_of_a_model_that_reads_all_again[pp2-False]",
    "tests/runtime/test_experts_on_layouts.py::test_a_mixture_trains_with_its_experts_spread_over_ranks",
    "tests/nemo/test_training.py::test_a_run_told_to_stop_saves_ends_and_continues_to_the_same_losses[dp2]",
    "tests/nemo/test_correction.py::test_the_teacher_goes_the_way_of_one_corrected_by_itself",
    "tests/nemo/test_core_016.py",
]
"""Of the suite, what touches most of Megatron-core: layouts, optimizer, checkpoints, caches, experts."""


@pytest.mark.slow
def test_what_is_claimed_of_layouts_checkpoints_and_experts_holds_with_them(tmp_path: Path) -> None:
    done = on_the_last_image("-m", "pytest", "-q", "-p", "no:cacheprovider", f"--basetemp={tmp_path / 'its'}", *CLAIMS)
    counts = re.search(r"(\d+) passed in", done.stdout)
    assert counts is not None and int(counts[1]) > len(CLAIMS), done.stdout

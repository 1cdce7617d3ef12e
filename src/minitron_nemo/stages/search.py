"""search: importance and a size in; every shape of that size priced, the best distilled a little; the winner out.

    priced      every shape of the space that meets the constraints, from a table of single cuts   (search/pricing.py)
    measured    the best of them cut out of the teacher, without training                          (search/measuring.py)
    distilled   the best of those, few tokens for many and more for few                            (search/halving.py)

<output>.search/                     so that a search that was killed goes on; nothing reads it afterwards
    measured.json                    see search/ledger.py
    locks/                           who works on what, see search/share.py
    candidates/losses.json           of each at each rung, and all that decides them; see search/ledger.py
    candidates/<name>/pruned         a prune artifact
    candidates/<name>/distilled      a distill artifact, and while it is none `distilled.training` (stages/training.py)

The method of arXiv:2407.14679, sections 2.3 and 4.3, which distils every candidate alike, made cheaper.
"""

from __future__ import annotations

import gc
import json
import math
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel as MCoreGPTModel
from rich.console import Console

from minitron_nemo import engine, platform
from minitron_nemo.artifact import Artifact, is_artifact, open_artifact, writing
from minitron_nemo.checks import Mistake, Paused, require
from minitron_nemo.config.identity import as_dict, decisive, differences
from minitron_nemo.config.search import SearchConfig
from minitron_nemo.config.stages import DistillConfig, PruneConfig
from minitron_nemo.config.trainer import Calibrating
from minitron_nemo.parallel import is_rank_zero, rank_zero_works
from minitron_nemo.pruning.targets import parse_count
from minitron_nemo.runtime.layout import prepare_layout
from minitron_nemo.runtime.training_run import HISTORY
from minitron_nemo.search.constraints import constraints_of, feasible, limit, timed_constraints_of
from minitron_nemo.search.halving import rungs_of, steps_in_all, survivors
from minitron_nemo.search.latency import Times, require_timable, times_here, why_untimed
from minitron_nemo.search.ledger import Entry, Ledger
from minitron_nemo.search.measuring import Measuring
from minitron_nemo.search.pricing import default_space, name_of, on_front, points_of, prices
from minitron_nemo.search.results import Candidate, markdown_of, rows_of, table_of, winners_recipe
from minitron_nemo.search.share import Share
from minitron_nemo.search.space import Space
from minitron_nemo.stages import distill, prune
from minitron_nemo.stages.training import directory_of_run
from minitron_nemo.text.blend import held_out_sources, open_blend, require_tokenizer_of
from minitron_nemo.text.tokenizer import load_tokenizer
from minitron_nemo.text.windows import batches


def run(config: SearchConfig) -> Artifact:
    """Raises: ValueError, FileNotFoundError: a space, constraint, importance or budget that does not fit, before any
    model is loaded. Interrupted: told to stop; the same command goes on."""
    search = _Search(config)
    say(search.cost())
    candidates = search.measure(search.price())
    finalists = candidates[: config.halving.survivors]
    search.time(finalists)
    search.distil(finalists)
    candidates = sorted(candidates, key=lambda each: each.order)
    found = search.result(candidates)

    def write(_: str) -> None:
        with writing(config.output, stage="search", config=config, inputs=search.inputs) as draft:
            draft.facts["winner"] = candidates[0].dims
            draft.metrics.update(
                tokens=found["tokens_spent"],
                parameters=candidates[0].shape.num_parameters,
                loss=candidates[0].curve[-1][1],
            )
            rank_zero_works(lambda: _write(draft.path, found, search.recipe_of(candidates[0])))

    search.share.out(["result"], made=lambda: ["result"] if _stands(config, found) else [], make=write)
    if is_rank_zero():
        Console(stderr=True, width=120).print(table_of(found["candidates"]))
    say(
        f"Winner: {candidates[0].name}. Distil it in full: minitron compress --config-dir {config.output} recipe=winner"
    )
    return open_artifact(config.output)


def say(text: str) -> None:
    if is_rank_zero():
        print(text, file=sys.stderr, flush=True)


def _write(folder: Path, found: Mapping[str, Any], recipe: str) -> None:
    (folder / "search.json").write_text(_text_of(found))
    (folder / "table.md").write_text(markdown_of(found["candidates"]))
    (folder / "recipe").mkdir()
    (folder / "recipe" / "winner.yaml").write_text(recipe)


def _text_of(found: Mapping[str, Any]) -> str:
    return json.dumps(found, indent=1) + "\n"


def _stands(config: SearchConfig, found: Mapping[str, Any]) -> bool:
    """Whether this very result is written, by whichever process."""
    try:
        made = open_artifact(config.output, made_by=["search"])
    except Mistake:  # nothing, or what `overwrite` replaces
        return False
    same = not any(differences(made.manifest["config"], config))
    return same and (made.path / "search.json").read_text() == _text_of(found)


class _Search:
    """One search; what can be checked before a model is loaded, is checked when it is made."""

    def __init__(self, config: SearchConfig) -> None:
        self.config = config
        require(
            config.has_target,
            "search has no target: nothing says how small the student shall be. Set search.parameters=0.6 (a share of "
            "the model's) or 4.5B, or one of search.constraints.",
        )
        self.source = engine.open_model(config.model, key="search.model")
        scores = open_artifact(config.importance, made_by=["estimate-importance"], key="search.importance")
        self.blend = open_blend(config.data)
        require_tokenizer_of(self.blend[0][0], load_tokenizer(self.source.tokenizer))
        self.inputs = [*self.source.artifacts, scores, *(artifact for artifact, _ in self.blend)]
        self.rungs = rungs_of(config.training.steps, config.halving.rungs)
        space = Space.of(self.source.shape, config.space or default_space(self.source.shape))
        self.feasible = feasible(space, constraints_of(self._constraints(), self.source.shape))
        require(
            "num_layers" not in space.dims or config.depth.metric is not None,
            "search.space.num_layers needs to know which layers go. Set search.depth.metric, and estimate it "
            "(estimate_importance.depth.metrics).",
        )
        require_timable(config.constraints, self.source.shape, config.trainer)
        self.directory = Path(config.output).with_name(Path(config.output).name + ".search")
        self.share = Share(self.directory)
        self.teacher_loss = math.nan

    def _constraints(self) -> Any:
        config, whole = self.config, float(self.source.shape.num_parameters)
        if config.parameters is None:
            return config.constraints
        wanted = limit(config.parameters, "search.parameters", whole)
        band = [str(wanted * (1 - config.tolerance)), str(wanted * (1 + config.tolerance))]
        return replace(config.constraints, parameters=band)

    # ---- what it costs ---------------------------------------------------------------------------------------------

    def cost(self) -> str:
        """Raises: Mistake: more than search.halving.max_tokens."""
        config, halving = self.config, self.config.halving
        number = min(self.feasible.count, config.pricing.measured, halving.survivors)
        steps = steps_in_all(number, self.rungs, keep=halving.keep, never_before=halving.never_before)
        tokens = steps * config.trainer.tokens_per_step
        every = number * config.training.steps * config.trainer.tokens_per_step
        if halving.max_tokens is not None:
            most = parse_count(halving.max_tokens, "search.halving.max_tokens")
            require(
                tokens <= most,
                f"search would distil {number} candidates on {tokens:,} tokens in all, more than "
                f"search.halving.max_tokens={halving.max_tokens}. Lower search.halving.survivors={halving.survivors}, "
                f"halving.keep={halving.keep} or training.steps={config.training.steps}, or raise it.",
            )
        return (
            f"{len(self.feasible.space):,} shapes, {self.feasible.count:,} of them within the constraints. "
            f"{min(self.feasible.count, config.pricing.measured)} will be cut and measured, {number} distilled on "
            f"{tokens:,} tokens in all (each in full: {every:,}); compared after steps "
            f"{', '.join(map(str, self.rungs))}."
        )

    # ---- before any training ---------------------------------------------------------------------------------------

    def price(self) -> list[Candidate]:
        """The candidates of the lowest price that are fast enough. Communicates: all ranks."""
        source, limits = self.source.shape, self.config.constraints
        if timed := timed_constraints_of(limits, source, lambda counts: self._times.of(counts)):
            self.feasible = feasible(self.feasible.space, timed, of=self.feasible)
        found = self.feasible
        columns = found.space.columns(found.numbers)
        points = self.config.pricing.points
        sizes = {dim: points_of(source, dim, values.tolist(), points) for dim, values in columns.dims.items()}
        single = {f"{dim}={size}": {dim: size} for dim, several in sizes.items() for size in several}
        losses = {name: entry["loss"] for name, entry in self._measured({"teacher": {}, **single}).items()}
        table = {dim: {size: losses[f"{dim}={size}"] for size in several} for dim, several in sizes.items()}
        self.teacher_loss = losses["teacher"]
        total = prices(columns, source, table, self.teacher_loss)
        best = total.argsort(kind="stable")[: self.config.pricing.measured]
        candidates = []
        for place in best.tolist():
            shape = found.space.shape(int(found.numbers[place]))
            dims = {dim: getattr(shape, dim) for dim in columns.dims}
            if self._smaller(dims):  # the model itself is no student
                candidates.append(Candidate(name_of(dims), dims, shape, float(total[place])))
        require(bool(candidates), "search: the one shape within the constraints is the model's own. Lower them.")
        return candidates

    def measure(self, candidates: list[Candidate]) -> list[Candidate]:
        """Each with what its cut comes to; lowest loss first. Communicates: all ranks."""
        entries = self._measured({each.name: self._smaller(each.dims) for each in candidates}).values()
        front = on_front([each.shape.num_parameters for each in candidates], [entry["loss"] for entry in entries])
        for each, entry, is_on_front in zip(candidates, entries, front, strict=True):
            each.loss_cut, each.kl_cut, each.on_front = entry["loss"], entry["kl"], is_on_front
        for held in ("_measuring", "_scores"):  # the teacher is let go
            vars(self).pop(held, None)
        gc.collect()
        return sorted(candidates, key=lambda each: each.order)

    def _measured(self, wanted: Mapping[str, Mapping[str, int]]) -> dict[str, Entry]:
        """Name -> numbers of the cut with these dims; `teacher` is not cut. Communicates: all ranks."""

        def measure(name: str) -> None:
            if name == "teacher":
                self._measuring.teacher_loss()
            else:
                self._measuring.of(name, wanted[name])

        self.share.out([*wanted], made=self._ledger.look, make=measure)
        self._ledger.look()
        return {name: self._ledger[name] for name in wanted}

    def _smaller(self, dims: Mapping[str, int]) -> dict[str, int]:
        return {dim: size for dim, size in dims.items() if size < getattr(self.source.shape, dim)}

    @cached_property
    def _measuring(self) -> Measuring:
        config, trainer = self.config, self.config.trainer
        prepare_layout(trainer, self.source.shape, seq_length=trainer.seq_length, seed=config.seed)
        teacher = engine.open_core(self.source, trainer, platform.dtype_of(trainer.precision))
        return Measuring(teacher, self._held_out(), self.source.vocab_size, self._cut, self._ledger)

    @cached_property
    def _ledger(self) -> Ledger:
        return Ledger(self.directory / "measured.json", self._decides_measurements())

    @cached_property
    def _scores(self) -> prune.Scores:
        return prune.Scores(self._prune_config({}, ""), self.source)

    @cached_property
    def _times(self) -> Times:
        config = self.config
        prepare_layout(config.trainer, self.source.shape, seq_length=config.trainer.seq_length, seed=config.seed)
        return times_here(self.source.shape, config.trainer, config.constraints, self.directory, self.share)

    def _decides_measurements(self) -> dict[str, Any]:
        config = self.config
        return {
            "surgery": as_dict(config.surgery),
            "depth": as_dict(config.depth),
            "seed": config.seed,
            "num_samples": config.pricing.num_samples,
            "seq_length": config.trainer.seq_length,
            "precision": config.trainer.precision,
            "inputs": [artifact.digest for artifact in self.inputs],
        }

    def _held_out(self) -> list[dict[str, Any]]:
        trainer = self.config.trainer
        return list(
            batches(
                list(held_out_sources(self.blend, trainer.seq_length).values()),
                trainer.seq_length,
                trainer.micro_batch_size,
                self.config.pricing.num_samples,
                dp_rank=parallel_state.get_data_parallel_rank(),
                dp_size=parallel_state.get_data_parallel_world_size(),
            )
        )

    def _cut(self, teacher: MCoreGPTModel, dims: Mapping[str, int]) -> MCoreGPTModel:
        job = prune.Job(self._prune_config(dims, ""), self.source, self._scores)
        job.draw_samples()
        student, _, _ = job.cut(teacher, job.plan_for(teacher))
        return student

    def _prune_config(self, dims: Mapping[str, int], output: str) -> PruneConfig:
        config = self.config
        return PruneConfig(
            model=config.model,
            importance=config.importance,
            target=dict(dims),
            depth=config.depth,
            surgery=config.surgery,
            trainer=Calibrating(**{each.name: getattr(config.trainer, each.name) for each in fields(Calibrating)}),
            output=output,
        )

    # ---- with training ---------------------------------------------------------------------------------------------

    def time(self, candidates: Sequence[Candidate]) -> None:
        """Write each one's times, where they can be measured. Communicates: all ranks."""
        if why_untimed(self.source.shape, self.config.trainer) is None:
            for each in candidates:
                each.times = {name: seconds.item() for name, seconds in self._times.of(each.shape).items()}

    def distil(self, candidates: Sequence[Candidate]) -> None:
        """Few tokens for many, more for few; writes each one's curve. Communicates: all ranks."""
        halving, running = self.config.halving, {each.name: each for each in candidates}
        ledger = Ledger(self.directory / "candidates" / "losses.json", self._decides_losses(), refuses=True)
        for step in self.rungs:
            losses = self._distil_to(step, running, ledger)
            for name, loss in losses.items():
                running[name].curve.append((step, loss))
            left = survivors(losses, keep=halving.keep, step=step, never_before=halving.never_before)
            running = {name: running[name] for name in left}

    def _distil_to(self, step: int, running: Mapping[str, Candidate], ledger: Ledger) -> dict[str, float]:
        """Held-out loss of each after so many steps. Communicates: all ranks."""

        def made() -> list[str]:
            there = ledger.look()
            return [name for name in running if f"{name}@{step}" in there]

        def train(name: str) -> None:
            say(f"    to step {step}: {name} ({[*running].index(name) + 1} of {len(running)})")
            ledger.put(f"{name}@{step}", {"loss": self._train_to(running[name], step)})

        self.share.out([*running], made=made, make=train)
        ledger.look()
        return {name: ledger[f"{name}@{step}"]["loss"] for name in running}

    def _decides_losses(self) -> dict[str, Any]:
        measured = self._decides_measurements()
        decides = {key: measured[key] for key in ("surgery", "depth", "inputs")}
        return decides | {"rungs": self.rungs, "distill": decisive(self._distill_config(Path()))}

    def _train_to(self, candidate: Candidate, step: int) -> float:
        """Held-out loss after so many steps; trains them where that is not known yet."""
        folder = self.directory / "candidates" / candidate.name
        config = self._distill_config(folder)
        if (loss := loss_at(Path(config.output), step)) is not None:
            return loss
        pruned = self._prune_config(self._smaller(candidate.dims), str(folder / "pruned"))
        if is_artifact(pruned.output):  # of these values, as `losses.json` says
            say(f"    complete: {pruned.output}")
        else:
            prune.run(pruned)
        with suppress(Paused):
            distill.run(config, pause_at=step)
        gc.collect()
        loss = loss_at(Path(config.output), step)
        assert loss is not None, f"{config.output} has not validated at step {step}"
        return loss

    def _distill_config(self, folder: Path) -> DistillConfig:
        config = self.config
        return DistillConfig(
            teacher=config.model,
            student=str(folder / "pruned"),
            distillation=config.distillation,
            seed=config.seed,
            trainer=config.trainer,
            training=replace(config.training, validation_every=math.gcd(*self.rungs)),
            data=config.data,
            output=str(folder / "distilled"),
        )

    # ---- what it came to -------------------------------------------------------------------------------------------

    def result(self, candidates: Sequence[Candidate]) -> dict[str, Any]:
        """search.json, see docs/search.md."""
        rows = rows_of(candidates, self.config.trainer.tokens_per_step, self.config.constraints)
        distilled = [each for each in candidates if each.curve]
        return {
            "target": self._target(),
            "constraints": self.feasible.met,
            "counts": {
                "space": len(self.feasible.space),
                "feasible": self.feasible.count,
                "priced": self.feasible.count,
                "measured": len(candidates),
                "distilled": len(distilled),
            },
            "teacher": {"parameters": self.source.shape.num_parameters, "held_out_loss": self.teacher_loss},
            "tokens_spent": sum(row["tokens"] for row in rows),
            "candidates": rows,
            "winner": candidates[0].name,
        }

    def _target(self) -> str:
        return "the constraints" if self.config.parameters is None else f"parameters={self.config.parameters}"

    def recipe_of(self, winner: Candidate) -> str:
        config, training = self.config, self._distill_config(Path()).training
        rows = [
            {"model": config.model, "label": "teacher", "teacher": True},
            {"model": "${distill.output}", "label": "distilled"},
            {"model": "${prune.output}", "label": "pruned only", "optional": True},
        ]
        return winners_recipe(
            f"{Path(config.output).name}_winner",
            {
                "trainer": said(config.trainer),
                "data": said(config.data),
                "seed": config.seed,
                "prune": {
                    "model": config.model,
                    "importance": config.importance,
                    "target": self._smaller(winner.dims),
                    "depth": said(config.depth),
                    "surgery": said(config.surgery),
                },
                "distill": {"distillation": said(config.distillation), "training": said(training)},
                "evaluate_teacher": {"model": config.model, "output": "${run_dir}/evaluation_teacher"},
                "report": {"rows": rows},
            },
        )


def said(config: Any) -> dict[str, Any]:
    """What a config says beside its defaults, in groups as it has them."""
    plain, defaults = as_dict(config), as_dict(type(config)())

    def differing(of: dict[str, Any], usual: dict[str, Any]) -> dict[str, Any]:
        changed = {key: value for key, value in of.items() if value != usual[key]}
        inner = {key: isinstance(value, dict) and isinstance(usual[key], dict) for key, value in changed.items()}
        return {key: differing(value, usual[key]) if inner[key] else value for key, value in changed.items()}

    return differing(plain, defaults)


def loss_at(output: Path, step: int) -> float | None:
    """Held-out loss of a training after a step, as its history says; None: it has not come there. All ranks call."""

    def look() -> float | None:
        for file in (output / HISTORY, directory_of_run(output) / HISTORY):
            if file.is_file():
                records = [json.loads(line) for line in file.read_text().splitlines() if line.endswith("}")]
                found = {each["step"]: each["validation_loss"] for each in records if "validation_loss" in each}
                return found.get(step)
        return None

    return rank_zero_works(look)

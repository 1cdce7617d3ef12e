"""Which cheap number says what shape is best at a size, and is a search's winner better than the nearest size?

The embedded teacher and the stage `search`, unattended: every shape of a grid of widths and depths within 3% of 60% of
its parameters, then of 50%, is cut, measured, and distilled by successive halving; then the same command distils all of
them in full, which says who is best. For each size, from one run:

    ranks      Spearman's correlation, over all candidates, of the loss after the full distillation with (a) how near a
               shape comes to the wanted parameters, which is the rule of the peer (Model-Optimizer 0.47), (b) the loss
               after the papers' cut, (c) after the calibrated cut, (d) after a quarter of the distillation, and with
               less of it
    winner     the halving's winner and the nearest shape, both distilled in full: at equal tokens; as the nearest may
               be the best by luck, also what the rule finds on average over all sizes of the band
    cost       tokens that the halving spent, beside all candidates in full

(d) is the same run at its first quarter, as a search sees it, not a run of its own with a schedule that ends there. A
second seed (order of the data) says how far the full ranking itself can be trusted.

`make bench-search`, a process of one thread per size, an hour and a half; `--save` keeps the answer in
benchmarks/results/. With `--run-dir` what was cut off goes on. It exits 1 where the halving's winner is not that of the
full distillations, costs more than a quarter of their tokens, or is worse than the nearest shape, or no better than
that is on average.
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

from minitron_nemo import engine
from minitron_nemo.artifact import Artifact
from minitron_nemo.report.correlation import spearman
from stages import Stages, begin, in_parts

SIZES, TOLERANCE = (0.6, 0.5), 0.03
SPACE = {
    "hidden_size": [144, 160, 176, 192, 208],
    "ffn_hidden_size": [256, 384, 512, 640],
    "num_attention_heads": [4, 8],
    "num_layers": [3, 4, 5, 6],
}
SEEDS = (1234, 4321)
PARTS = (16, 8, 4, 1)
"""Rungs: the whole run divided by these."""
ALL = 1000
Search = dict[str, Any]
"""search.json, see docs/search.md."""


class Bench(Stages):
    def __init__(self, run_dir: Path, steps: int) -> None:
        rungs = [steps // part for part in PARTS]
        shared = [
            "trainer.tensorboard=false",
            "trainer.global_batch_size=8",
            "estimate_importance.depth.greedy.metric=squared_error",
            "estimate_importance.depth.greedy.drop=3",
            "estimate_importance.depth.num_samples=64",
            f"search.tolerance={TOLERANCE}",
            *(f"+search.space.{dim}={sizes}".replace(" ", "") for dim, sizes in SPACE.items()),
            "search.depth.metric=greedy",
            "search.pricing.num_samples=64",
            "search.constraints.seq_length=256",  # the teacher's context
            f"search.pricing.measured={ALL}",
            f"search.halving.survivors={ALL}",
            f"search.halving.rungs={rungs}".replace(" ", ""),
            f"search.training.steps={steps}",
            "search.training.validation_batches=16",
            f"search.training.optim.decay_steps={steps // 4}",
            "prune.depth.metric=greedy",
        ]
        # bf16 without its kernels takes several times as long
        super().__init__(run_dir, shared, recipe="search", precision="fp32")

    def prepare(self) -> None:
        for section in ("import_hf", "prepare_data", "estimate_importance"):
            self.stage(section)

    def searched(self, size: float, seed: int, keep: float) -> Search:
        """What a search finds that lets this share of a rung's candidates go on; all of one size and seed share
        trainings."""
        name = f"search_{size}_{seed}"
        kept = self.run_dir / f"{name}_keep_{keep}.json"
        if not kept.is_file():
            asked = (f"search.parameters={size}", f"seed={seed}", f"search.halving.keep={keep}")
            found = self.stage("search", *asked, output=name)
            kept.write_text((found.path / "search.json").read_text())
            found.path.rename(self.run_dir / kept.stem)  # its trainings stand in <output>.search, for the next
        result: Search = json.loads(kept.read_text())
        return result

    def plain_cut(self, candidate: dict[str, Any]) -> float:
        """Held-out loss after the papers' cut, nats per token."""
        teacher = engine.open_model(self.run_dir / "teacher", key="teacher").shape
        smaller = {dim: size for dim, size in candidate["dims"].items() if size < getattr(teacher, dim)}
        target = [f"+prune.target.{dim}={size}" for dim, size in smaller.items()]
        cut: Artifact = self.stage("prune", *target, output=f"plain_{candidate['id']}")
        return statistics.mean(self.held_out(cut))


def numbers_of(full: Search, wanted: float, plain: dict[str, float]) -> dict[str, list[float]]:
    """What each rule ranks candidates by, lowest first, in the order of the candidates."""
    candidates = full["candidates"]
    found = {
        "(a) nearness to the wanted parameters": [abs(each["parameters"] - wanted) for each in candidates],
        "(b) loss after the papers' cut": [plain[each["id"]] for each in candidates],
        "(c) loss after the calibrated cut": [each["loss_cut"] for each in candidates],
        "price from single cuts": [each["price"] for each in candidates],
    }
    for place, part in enumerate(PARTS[:-1]):
        name = f"loss after 1/{part} of the distillation"
        found[f"(d) {name}" if part == 4 else name] = [each["curve"][place][1] for each in candidates]
    return found


def correlation(first: list[float], second: list[float]) -> float:
    return float(spearman(torch.tensor([first, second], dtype=torch.float64))[0, 1])


def in_full(search: Search) -> dict[str, float]:
    """Candidate -> loss after the full distillation."""
    return {each["id"]: each["curve"][-1][1] for each in search["candidates"]}


def verdict(size: float, halved: Search, full: Search, plain: dict[str, float]) -> dict[str, Any]:
    losses, wanted = in_full(full), size * full["teacher"]["parameters"]
    nearest = min(full["candidates"], key=lambda each: abs(each["parameters"] - wanted))
    best = min(losses, key=lambda name: losses[name])
    return {
        "rank_correlation_with_full": {
            rule: correlation(values, list(losses.values())) for rule, values in numbers_of(full, wanted, plain).items()
        },
        "winner": {
            "of_halving": halved["winner"],
            "of_all_in_full": best,
            "nearest_to_the_wanted_parameters": nearest["id"],
            "loss_of_halving": losses[halved["winner"]],
            "loss_of_all_in_full": losses[best],
            "loss_of_nearest": losses[nearest["id"]],
            "median_loss": statistics.median(losses.values()),
        },
        "nearest_over_the_band": nearest_over_the_band(wanted, full, losses),
        "tokens": {
            "halving": halved["tokens_spent"],
            "all_in_full": full["tokens_spent"],
            "share": halved["tokens_spent"] / full["tokens_spent"],
        },
    }


def nearest_over_the_band(wanted: float, full: Search, losses: dict[str, float], sizes: int = 601) -> dict[str, float]:
    """What the peer's rule finds at every size of the band, as a person could have asked for any of them."""
    picked = []
    for number in range(sizes):
        asked = wanted * (1 - TOLERANCE + 2 * TOLERANCE * number / (sizes - 1))
        picked.append(min(full["candidates"], key=lambda each: abs(each["parameters"] - asked))["id"])
    best = min(losses, key=lambda name: losses[name])
    return {
        "mean_loss": statistics.mean(losses[name] for name in picked),
        "share_of_sizes_at_which_it_is_the_best": picked.count(best) / sizes,
    }


def problems_of(found: dict[str, Any]) -> list[str]:
    winner, share = found["winner"], found["tokens"]["share"]
    problems = []
    if winner["of_halving"] != winner["of_all_in_full"]:
        problems.append(f"halving finds {winner['of_halving']}, all in full {winner['of_all_in_full']}")
    if share > 0.25:
        problems.append(f"halving takes {share:.2f} of the tokens of all in full")
    if winner["loss_of_halving"] > winner["loss_of_nearest"]:
        problems.append("the shape nearest to the wanted parameters is better than the searched student")
    if winner["loss_of_halving"] >= found["nearest_over_the_band"]["mean_loss"]:
        problems.append("the searched student is not better than what the nearest shape is on average")
    return problems


def of_size(bench: Bench, size: float, seeds: tuple[int, ...]) -> dict[str, Any]:
    searches = {seed: (bench.searched(size, seed, 0.34), bench.searched(size, seed, 1.0)) for seed in seeds}
    candidates = searches[seeds[0]][1]["candidates"]
    plain = {each["id"]: bench.plain_cut(each) for each in candidates}
    result: dict[str, Any] = {
        "candidates": [
            {"id": each["id"], "parameters": each["parameters"], "after_the_papers_cut": plain[each["id"]]}
            | {"after_the_calibrated_cut": each["loss_cut"], "price": each["price"]}
            | {"curve_of_seed": {str(seed): curve_of(full, each["id"]) for seed, (_, full) in searches.items()}}
            for each in candidates
        ],
        "by_seed": {str(seed): verdict(size, *both, plain) for seed, both in searches.items()},
    }
    if len(seeds) > 1:
        first, second = (in_full(searches[seed][1]) for seed in seeds)
        between = correlation([first[name] for name in first], [second[name] for name in first])
        result["rank_correlation_of_full_between_seeds"] = between
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=160, help="of 8 x 256 tokens, of a full distillation")
    parser.add_argument("--sizes", type=float, nargs="+", default=SIZES, help="shares of the teacher's parameters")
    parser.add_argument("--seeds", type=int, default=1, choices=range(1, len(SEEDS) + 1))
    parser.add_argument("--jobs", type=int, default=2, help="processes that share the sizes")
    parser.add_argument("--part", help=argparse.SUPPRESS)  # i/n: of such a process
    parser.add_argument("--run-dir", type=Path)
    parser.add_argument("--save", action="store_true")
    given = parser.parse_args()
    began, seeds = begin(), SEEDS[: given.seeds]
    sizes = " ".join(map(str, given.sizes))
    command = f"benchmarks/search.py --steps {given.steps} --seeds {given.seeds} --sizes {sizes}"
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench((given.run_dir or Path(folder)).resolve(), given.steps)
        if given.part is not None:
            part, parts = map(int, given.part.split("/"))
            for size in given.sizes[part::parts]:
                of_size(bench, size, seeds)
            return 0
        bench.prepare()
        asked = [*command.split()[1:], "--run-dir", str(bench.run_dir)]
        if not in_parts([__file__, *asked], min(given.jobs, len(given.sizes))):
            return 1
        by_size = {size: of_size(bench, size, seeds) for size in given.sizes}  # of what the processes left
    result = {
        "command": command,
        "date": date.today().isoformat(),
        "machine": f"{machine.machine()}, one thread, fp32",
        "torch": torch.__version__,
        "minutes": round((time.monotonic() - began) / 60, 1),
        "by_share_of_parameters": {str(size): found for size, found in by_size.items()},
    }
    for size, found in by_size.items():
        for each in found["candidates"]:
            cuts = [each["after_the_papers_cut"], each["after_the_calibrated_cut"]]
            print(size, each["id"], *cuts, each["curve_of_seed"])
        print(json.dumps({key: value for key, value in found.items() if key != "candidates"}, indent=2))
    if given.save:
        own = "" if tuple(given.sizes) == SIZES else "".join(f"_{size}" for size in given.sizes)
        path = Path(__file__).parent / "results" / f"search{own}.json"
        path.write_text(json.dumps(result, indent=2) + "\n")
    problems = [
        f"{size} of the parameters, seed {seed}: {words}"
        for size, found in by_size.items()
        for seed, each in found["by_seed"].items()
        for words in problems_of(each)
    ]
    print("\n".join(problems) or "the halving found the best shape, cheaper; no nearest shape is better")
    return 1 if problems else 0


def curve_of(search: Search, name: str) -> list[list[float]]:
    curve: list[list[float]] = next(each["curve"] for each in search["candidates"] if each["id"] == name)
    return curve


if __name__ == "__main__":
    sys.exit(main())

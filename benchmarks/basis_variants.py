"""Which axes of the residual stream should stay?

Calibrated surgery keeps the principal axes of one second moment, in which every norm and every token weighs the same.
On the teacher that the package brings along only the hidden size is cut, nothing retrained; the held-out loss of other
ways to look at the same activations:

    normalised       as surgery does it: each token divided by its root mean square, all norms alike
    raw              tokens as they are: those of large norm count for more, and late norms as the stream grows
    raw, norms alike each norm's raw moment divided by its trace
    early, late      normalised; of n norms the i-th, from 1, weighs n + 1 - i, or i
    by consumers     normalised, each norm weighted by the mean square of the matrices that read it
    whitened         normalised, each channel divided by its root mean square: the span of the correlations' first axes
    least read error no second moment: the axes outside which the reading matrices lose least, each matrix' squared
                     error relative to what it reads in all; by gradient descent, from `normalised`
    channels         no turning: the channels of highest score

all with norm_scale=energy; `normalised` and `channels` also with size and none.

`make bench-basis-variants`, some minutes; `--save` keeps the table in benchmarks/results/. It exits 1 where a closed
form beats `normalised` by more than 0.05 nats on average.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import tempfile
from collections.abc import Iterator
from datetime import date
from pathlib import Path

import torch
from ranking import SAMPLES, Bench, of_sets
from torch import Tensor, nn

from minitron_nemo.axes import norm_number, norm_of
from minitron_nemo.axis_expressions import norm_gamma
from minitron_nemo.cli import set_up_environment
from minitron_nemo.config.pruning import SurgeryConfig
from minitron_nemo.places import EMBEDDING, FINAL_NORM, OUTPUT, norms_in
from minitron_nemo.plan import PruningPlan
from minitron_nemo.pruning import plan_from_importance
from minitron_nemo.pruning.basis import norm_scales, principal_basis
from minitron_nemo.quiet import hush
from minitron_nemo.runtime.forward import run_forward
from minitron_nemo.text.corpus import TRAIN

SIZES = (168, 144, 112)
"""Hidden sizes kept of 224: three quarters, nearly two thirds, half."""
BASELINE, DESCENT, CHANNELS = "normalised", "least read error", "channels"
TOLERANCE = 0.05
RESULT = Path(__file__).parent / "results" / "basis_variants.json"


@torch.no_grad()
def moments_of_norms(bench: Bench) -> tuple[Tensor, Tensor]:
    """Of what enters each norm, tokens normalised and raw: two of [2l+1, h, h] float64, means over tokens."""
    norms = [norm.module for norm in norms_in(bench.core).values()]
    h = bench.shape.hidden_size
    sums = torch.zeros(2, len(norms), h, h, dtype=torch.float64)
    samples = bench.batches(TRAIN, SAMPLES, seed=0)

    def see(row: int) -> object:
        def hook(_norm: nn.Module, args: tuple[Tensor, ...]) -> None:
            raw = args[0].flatten(0, 1).float()
            normalised = raw / raw.square().mean(1, keepdim=True).sqrt()
            for kind, values in enumerate((normalised, raw)):
                sums[kind, row] += values.t() @ values

        return hook

    handles = [norm.register_forward_pre_hook(see(row)) for row, norm in enumerate(norms)]
    run_forward(bench.core, samples, label="moments", total=len(samples))
    for handle in handles:
        handle.remove()
    normalised, raw = sums / sum(batch["tokens"].numel() for batch in samples)
    return normalised, raw


@torch.no_grad()
def consumers_of_norms(bench: Bench) -> Tensor:
    """W^T W of the matrices W [out, h] that read each norm, its gamma folded in: [2l+1, h, h] float64."""
    parameters = dict(bench.core.named_parameters())
    h = bench.shape.hidden_size
    grams = torch.zeros(2 * bench.shape.num_layers + 1, h, h, dtype=torch.float64)
    for name, weight in parameters.items():
        norm = norm_of(name)
        number = norm and norm_number(norm, bench.shape)
        if norm is not None and number is not None and weight.dim() == 2:
            folded = (weight * norm_gamma(parameters[norm], bench.shape)).double()
            grams[number] += folded.t() @ folded / len(folded)
    if OUTPUT not in parameters:  # tied
        embedding = parameters[EMBEDDING]
        gamma = norm_gamma(parameters[f"{FINAL_NORM}.weight"], bench.shape)
        folded = (embedding * gamma).double()
        grams[-1] = folded.t() @ folded / len(folded)
    return grams


def closed_forms(normalised: Tensor, raw: Tensor, grams: Tensor) -> dict[str, Tensor]:
    """Way -> second moment [h, h] whose first axes stay."""
    order = torch.arange(1, len(normalised) + 1, dtype=torch.float64).view(-1, 1, 1)
    traces = raw.diagonal(dim1=1, dim2=2).sum(1).view(-1, 1, 1)
    strength = grams.diagonal(dim1=1, dim2=2).sum(1).view(-1, 1, 1)
    return {
        BASELINE: normalised.sum(0),
        "raw": raw.sum(0),
        "raw, norms alike": (raw / traces).sum(0),
        "early": (normalised * order.flip(0)).sum(0),
        "late": (normalised * order).sum(0),
        "by consumers": (normalised * strength).sum(0),
    }


def whitened_basis(second_moment: Tensor, keep: int) -> Tensor:
    deviation = second_moment.diagonal().sqrt()
    axes = principal_basis(second_moment / deviation.outer(deviation), keep)
    return torch.linalg.qr(deviation[:, None] * axes).Q


def least_read_error(normalised: Tensor, grams: Tensor, begin: Tensor, steps: int = 300) -> Tensor:
    """Axes Q of least sum over norms of |W (1 - Q Q^T) x|^2 / |W x|^2, from `begin` [h, k]."""
    free = begin.clone().requires_grad_()
    optimizer = torch.optim.Adam([free], lr=3e-3)
    whole = torch.einsum("nij,nji->n", grams, normalised)
    for _ in range(steps):
        basis = torch.linalg.qr(free).Q
        lost = torch.eye(len(begin), dtype=begin.dtype) - basis @ basis.t()
        error = (torch.einsum("nij,njk,nki->n", grams, lost @ normalised, lost.expand_as(grams)) / whole).sum()
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
    return torch.linalg.qr(free.detach()).Q


def plans(bench: Bench) -> Iterator[tuple[int, str, PruningPlan]]:
    """(hidden size, way, plan)."""
    importance = bench.importance("contributions")
    normalised, raw = moments_of_norms(bench)
    grams = consumers_of_norms(bench)
    for size in SIZES:
        wanted = bench.shape.pruned_to(hidden_size=size)

        def plan(surgery: SurgeryConfig, wanted: object = wanted) -> PruningPlan:
            aggregations = {"batch_aggregation": "l2", "sequence_aggregation": "l2"}
            return plan_from_importance(importance, bench.shape, wanted, **aggregations, surgery=surgery)

        bases = {name: principal_basis(moment, size) for name, moment in closed_forms(normalised, raw, grams).items()}
        bases["whitened"] = whitened_basis(normalised.sum(0), size)
        bases[DESCENT] = least_read_error(normalised, grams, bases[BASELINE])
        turned = plan(SurgeryConfig(basis="rotation", norm_scale="energy"))
        for name, basis in bases.items():
            scales = norm_scales("energy", basis, importance, bench.shape)
            yield size, name, dataclasses.replace(turned, hidden=basis, norm_scale=scales)
        yield size, CHANNELS, plan(SurgeryConfig(norm_scale="energy"))
        for scale in ("size", "none"):
            yield size, f"{BASELINE}, {scale}", plan(SurgeryConfig(basis="rotation", norm_scale=scale))
            yield size, f"{CHANNELS}, {scale}", plan(SurgeryConfig(norm_scale=scale))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", action="store_true")
    save = parser.parse_args().save
    set_up_environment()
    hush()
    table: dict[str, dict[int, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        teacher = statistics.mean(of_sets(bench.losses()))
        print(f"teacher {teacher:.3f} nats/token, hidden size {bench.shape.hidden_size}; only that is cut")
        for size, name, plan in plans(bench):
            table.setdefault(name, {})[size] = statistics.mean(of_sets(bench.measured(bench.student(plan))))
    print(f"{'':20}" + "".join(f"{size:>8}" for size in SIZES))
    for name, row in sorted(table.items(), key=lambda item: sum(item[1].values())):
        print(f"{name:20}" + "".join(f"{row[size]:8.3f}" for size in SIZES))
    if save:
        result = {
            "command": "make bench-basis-variants, with --save",
            "date": date.today().isoformat(),
            "versions": {"torch": torch.__version__, "python": sys.version.split()[0]},
            "calibration_samples": SAMPLES,
            "teacher": round(teacher, 4),
            "losses": {name: {str(size): round(loss, 4) for size, loss in row.items()} for name, row in table.items()},
        }
        RESULT.write_text(json.dumps(result, indent=2) + "\n")
    means = {name: statistics.mean(row.values()) for name, row in table.items() if name != DESCENT}
    return 1 if means[BASELINE] - min(means.values()) > TOLERANCE else 0


if __name__ == "__main__":
    sys.exit(main())

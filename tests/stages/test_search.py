"""search: a size in, the best shape of it out, and what a kill in between costs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from minitron_nemo.artifact import Artifact, open_artifact
from minitron_nemo.config.pruning import SurgeryConfig
from minitron_nemo.config.search import TIMED, SearchConfig
from minitron_nemo.config.trainer import TrainerConfig
from minitron_nemo.report.table import count
from support.door import Done, Door, kill_once_there, started_until_there
from support.ranks import Ranks, current_layout
from support.report_runs import Page
from support.tiny import SEARCH_RUNGS as RUNGS
from support.tiny import TinyChain, search_command
from support.tiny_run import TinyRun, trainer_values


def found_in(output: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((output / "search.json").read_text())
    return found


def without_times(found: dict[str, Any]) -> dict[str, Any]:
    """All of it that another search on another day finds again."""
    rows = [{name: value for name, value in each.items() if name not in TIMED} for each in found["candidates"]]
    return found | {"candidates": rows}


def files(of: Artifact) -> dict[str, Any]:
    """Sizes and sums of its files, but for what says of a run when and where it was."""
    of_the_run = (".metadata", "history.jsonl")
    return {name: file for name, file in of.manifest["files"].items() if not name.endswith(of_the_run)}


def validations(of: Artifact) -> list[tuple[int, float]]:
    records = [json.loads(line) for line in (of.path / "history.jsonl").read_text().splitlines()]
    return [(each["step"], each["validation_loss"]) for each in records if "validation_loss" in each]


@pytest.fixture(scope="module")
def searched(door: Door, tiny_chain: TinyChain, tmp_path_factory: pytest.TempPathFactory) -> tuple[Done, Path]:
    """One search that nothing disturbed."""
    output = tmp_path_factory.mktemp("search") / "it"
    done = door(*search_command(tiny_chain, output))
    assert done.code == 0, done.err
    return done, output


def test_the_best_of_a_size_is_found_and_its_recipe_runs(
    door: Door, tiny_chain: TinyChain, searched: tuple[Done, Path], tmp_path: Path
) -> None:
    done, output = searched
    found = found_in(output)
    candidates, counts = found["candidates"], found["counts"]
    teacher = open_artifact(tiny_chain.run_dir / "corrected_teacher").metrics["parameters"]

    assert (
        "18 shapes" in done.err and f"{counts['distilled']} distilled on {found['tokens_spent']:,} tokens" in done.err
    )
    assert counts["space"] == 18 and counts["measured"] == len(candidates) and counts["distilled"] == 3
    assert all(0.65 <= each["parameters"] / teacher <= 0.85 for each in candidates)
    assert [each["rank"] for each in candidates] == [*range(1, len(candidates) + 1)]
    assert [each["rung"] for each in candidates[:3]] == [2, 2, 1], "a third of three goes on, rounded up"
    first, second, third = (each["curve"] for each in candidates[:3])
    assert first[-1][1] <= second[-1][1] and max(first[0][1], second[0][1]) <= third[0][1]
    assert found["winner"] == candidates[0]["id"] and f"Winner: {found['winner']}" in done.err
    assert all(each["loss_cut"] > 0 and each["kl_cut"] > 0 for each in candidates)
    assert "constraints.time_to_first_token=100s" in found["constraints"]
    assert all(each["time_per_output_token"] > 0 and each["throughput"] > 0 for each in candidates[:3])

    cut = open_artifact(f"{output}.search/candidates/{found['winner']}/pruned", made_by=["prune"])
    assert cut.metrics["parameters"] == candidates[0]["parameters"]
    run_dir = tmp_path / "winner"
    # where a recipe of one's own is, every key it reads is in it
    full = door(
        "compress", "--config-dir", str(output), "recipe=winner", f"run_dir={run_dir}", "evaluate.num_samples=8"
    )
    assert full.code == 0, full.err
    again = open_artifact(run_dir / "student_pruned")
    assert again.metrics["parameters"] == cut.metrics["parameters"] and files(again) == files(cut)
    paused = open_artifact(f"{output}.search/candidates/{found['winner']}/distilled")
    assert files(open_artifact(run_dir / "distilled")) == files(paused), "a rung's pause changes nothing"
    undisturbed, resumed = (validations(model) for model in (open_artifact(run_dir / "distilled"), paused))
    assert undisturbed == resumed and [step for step, _ in resumed] == list(RUNGS), "and is no second measurement"


def test_a_report_shows_the_search(door: Door, searched: tuple[Done, Path], tmp_path: Path) -> None:
    found, report = found_in(searched[1]), tmp_path / "report"
    done = door("report", "recipe=search", f"run_dir={searched[1].parent}", "report.rows=[]", f"report.output={report}")
    assert done.code == 0, done.err
    page, drawn = Page((report / "report.html").read_text()), (report / "report.html").read_text()

    shown = {row[1]: row for row in page.rows if len(row) == 10}
    for each in found["candidates"]:
        row = shown[", ".join(f"{dim}={size}" for dim, size in each["dims"].items())]
        assert row[0] == ("★ 1" if each["id"] == found["winner"] else str(each["rank"]))
        assert (row[5] == "–") == (each["time_per_output_token"] is None)
        assert row[6:8] == [f"{each['loss_cut']:.3f}", f"{each['curve'][-1][1]:.3f}" if each["curve"] else "–"]
    ranks = re.search(r'aria-label="Ranks: after the cut ([^"]*)"', drawn)
    distilled = [each["id"] for each in found["candidates"] if each["curve"]]
    assert ranks is not None and ranks[1].endswith(" " + ", ".join(distilled[:2]) + ".")
    assert all(drawn.count(f">{name}</text>") >= 1 for name in distilled)
    [bill] = (row for row in page.rows if row[:2] == ["it", "search"])
    assert bill[-2] == count(found["tokens_spent"]), "what the candidates learned from is on the bill"


@pytest.mark.parametrize("file", ["measured.json", "candidates/*/distilled.training/checkpoints/step-1"])
def test_a_search_that_was_killed_goes_on_to_the_same_table(
    door: Door, tiny_chain: TinyChain, searched: tuple[Done, Path], tmp_path: Path, file: str
) -> None:
    output = tmp_path / "it"
    kill_once_there(tmp_path / "it.search" / file, search_command(tiny_chain, output))
    assert not output.exists()

    done = door(*search_command(tiny_chain, output))

    assert done.code == 0, done.err
    expected, found = found_in(searched[1]), found_in(output)
    for one, other in zip(expected["candidates"], found["candidates"], strict=True):
        assert other["id"] == one["id"]
        assert other["loss_cut"] == pytest.approx(one["loss_cut"], rel=1e-5)
        assert other["curve"] == [[tokens, pytest.approx(loss, rel=1e-5)] for tokens, loss in one["curve"]]
    assert found["tokens_spent"] == expected["tokens_spent"]


def test_processes_share_a_search_and_find_the_same(
    door: Door, tiny_chain: TinyChain, searched: tuple[Done, Path], tmp_path: Path
) -> None:
    output = tmp_path / "it"
    command = search_command(tiny_chain, output)
    first = started_until_there(tmp_path / "it.search" / "candidates" / "*" / "distilled.training", command)
    second = door(*command)
    _, said = first.communicate()

    assert (first.returncode, second.code) == (0, 0), said.decode() + second.err
    one, other, alone = (re.findall(r"to step \d+: \S+", each) for each in (said.decode(), second.err, searched[0].err))
    assert one and other and sorted(one + other) == sorted(alone), "both took part, and nothing was trained twice"
    assert without_times(found_in(output)) == without_times(found_in(searched[1]))


def test_losses_of_another_training_are_refused(door: Door, tiny_chain: TinyChain, searched: tuple[Done, Path]) -> None:
    command = [*search_command(tiny_chain, searched[1]), "overwrite=true"]
    said = door(*command, "search.training.optim.lr=0.05").mistake
    assert re.search(r"candidates that were made with distill.training.optim.lr=\S+, not 0.05.*or remove \S+", said), (
        said
    )
    assert found_in(searched[1])["candidates"]


def test_what_was_measured_under_other_values_is_measured_again(
    door: Door, tiny_chain: TinyChain, tmp_path: Path
) -> None:
    output, changed = tmp_path / "it", "search.pricing.num_samples=6"
    kill_once_there(tmp_path / "it.search" / "candidates" / "*" / "pruned", search_command(tiny_chain, output))
    done = door(*search_command(tiny_chain, output), changed)
    assert done.code == 0, done.err
    assert "measured.json was measured with num_samples=4, not 6: everything is measured again" in done.err


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (["search.parameters=0.05"], r"constraints.parameters=.*is met by none of the 18 .*nearest have [\d,]+ \("),
        (["search.parameters=null"], "search has no target.*search.parameters=0.6"),
        (["search.constraints.parameters=4.5B"], "Leave one of them out"),
        (["search.halving.max_tokens=100"], r"3 candidates on [\d,]+ tokens.*search.halving.max_tokens=100"),
        (["search.halving.rungs=[3,2]"], "must rise to training.steps=4"),
        (["+search.space.num_layers=[3,4]"], "search.depth.metric"),
        (
            ["trainer.pipeline_model_parallel_size=2"],
            "time_to_first_token: a search times one layer, which has no",
        ),
        (["search.importance=nowhere"], "search.importance=nowhere does not exist"),
        (["search.space.hidden_size=[16,40]"], "search.space.hidden_size reaches 40"),
    ],
)
def test_what_cannot_be_searched_is_said_before_a_model_is_loaded(
    door: Door, tiny_chain: TinyChain, tmp_path: Path, changed: list[str], said: str
) -> None:
    command = search_command(tiny_chain, tmp_path / "it")
    if "search.parameters=null" in changed:
        command = [each for each in command if "search.space" not in each and "search.constraints" not in each]
    found = door(*command, *changed).mistake
    assert re.search(said, found, flags=re.DOTALL), found
    assert not [*tmp_path.iterdir()]


def measured(run: TinyRun, directory: Path, **changed: Any) -> list[tuple[str, float, float]]:
    """(candidate, loss, KL) of every candidate after its cut."""
    from minitron_nemo.stages.search import _Search

    values: dict[str, Any] = {"model": run.teacher, "importance": run.importance, "parameters": 0.8, "tolerance": 0.2}
    values["space"] = {"hidden_size": [24, 32], "ffn_hidden_size": [48, 64], "num_attention_heads": [4, 8]}
    layout = current_layout()
    config = SearchConfig(
        **values | changed,
        trainer=TrainerConfig(
            **trainer_values(
                tensor_model_parallel_size=layout.tp,
                pipeline_model_parallel_size=layout.pp,
                sequence_parallel=layout.sequence_parallel,
            )
        ),
        output=str(directory / "it"),
    )
    config.data.prepared = run.data
    config.pricing.num_samples = 4
    search = _Search(config)
    candidates = search.measure(search.price())
    return [(each.name, each.loss_cut or 0.0, each.kl_cut or 0.0) for each in candidates]


@pytest.mark.parametrize("layout", ["tp2-sp", "pp2", "dp2"])
def test_every_layout_measures_the_same(ranks: Ranks, tiny_run: TinyRun, tmp_path: Path, layout: str) -> None:
    [expected] = ranks("single").run(measured, tiny_run, tmp_path / "single")
    found, other = ranks(layout).run(measured, tiny_run, tmp_path / layout)
    assert found == other and len(expected) >= 3
    assert sorted(found) == [
        (name, pytest.approx(loss, rel=1e-4), pytest.approx(kl, rel=1e-3, abs=1e-6))
        for name, loss, kl in sorted(expected)
    ]


def test_a_candidate_refitted_beside_the_teacher_leaves_it_to_the_others(
    ranks: Ranks, tiny_run: TinyRun, tmp_path: Path
) -> None:
    surgery = SurgeryConfig(refit="sequential")
    [together] = ranks("single").run(measured, tiny_run, tmp_path / "together", surgery=surgery)
    assert len(together) >= 3
    name, loss, _ = together[-1]
    sizes = dict(re.findall(r"([a-z]+)(\d+)", name))
    dims = {"h": "hidden_size", "f": "ffn_hidden_size", "n": "num_attention_heads"}
    space = {dims[letter]: [int(size)] for letter, size in sizes.items() if letter in dims}
    [[alone]] = ranks("single").run(measured, tiny_run, tmp_path / "alone", surgery=surgery, space=space)
    assert alone[:2] == (name, pytest.approx(loss, rel=1e-6))

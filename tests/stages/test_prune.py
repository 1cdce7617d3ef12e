"""The prune stages at their doors: budgets, depth by scores, plans, and cutting files instead of models."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from minitron_nemo.artifact import open_artifact
from minitron_nemo.plan import PruningPlan
from minitron_nemo.pruning.composition import compose
from minitron_nemo.runtimes import suits
from minitron_nemo.scores import Importance
from support.artifacts import change_manifest, contents
from support.door import Door
from support.tiny import TinyChain
from support.tiny_run import read_weights
from support.transformers5 import transformers5


@pytest.fixture(scope="module")
def scored(door: Door, tiny_chain: TinyChain, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What to type for a run of its own that has scores of depth too."""
    run = tmp_path_factory.mktemp("prune")
    of_the_chain = [key for key in tiny_chain.overrides if not key.startswith(("run_dir=", "prune.target."))]
    teacher = tiny_chain.run_dir / "corrected_teacher"
    common = [
        *of_the_chain,
        f"run_dir={run}",
        f"prune.model={teacher}",
        f"estimate_importance.model={teacher}",
        f"data.prepared={tiny_chain.run_dir / 'data'}",
        *(f"~prune.target.{dim}" for dim in ("hidden_size", "ffn_hidden_size", "num_attention_heads")),
    ]
    done = door(
        "estimate-importance",
        *common,
        "estimate_importance.depth.metrics=[block_influence,loss]",
        "estimate_importance.depth.block_sizes=[1,2]",
        "estimate_importance.depth.greedy.metric=loss",
        "estimate_importance.depth.greedy.drop=2",
        "estimate_importance.depth.num_samples=4",
    )
    assert done.code == 0, done.err
    return common


def run_dir(common: list[str]) -> Path:
    return Path(next(key for key in common if key.startswith("run_dir=")).split("=")[1])


def test_a_budget_becomes_a_student_that_costs_no_more(door: Door, scored: list[str]) -> None:
    output = run_dir(scored) / "of_budget"
    done = door("prune", *scored, "prune.budget.parameters=40k", "prune.budget.tolerance=0")
    assert "budget.parameters=40k is not a number above 0" in done.mistake
    done = door("prune", *scored, "prune.budget.parameters=40K", "prune.budget.tolerance=0", f"prune.output={output}")
    assert done.code == 0, done.err
    plan = PruningPlan.load(output)
    assert 36_000 < plan.target.num_parameters <= 40_000
    assert plan.target.hidden_size < plan.source.hidden_size
    said = open_artifact(output).facts["suits"]
    assert said == suits(plan.target)
    assert f"student's dims and tensor cores: {said['tensor cores']}" in done.err


def test_the_best_contiguous_block_of_layers_goes(door: Door, scored: list[str]) -> None:
    common = [*scored, "+prune.target.num_layers=2", "prune.depth.metric=loss"]
    done = door("prune", *common, "prune.depth.contiguous=true", "prune.output=" + str(run_dir(scored) / "shallow"))
    assert done.code == 0, done.err
    scores = Importance.load(run_dir(scored) / "importance").block_scores("loss", 2)
    start = int(scores.argmin())
    expected = [layer for layer in range(4) if layer not in (start, start + 1)]
    assert PruningPlan.load(run_dir(scored) / "shallow").layer.tolist() == expected
    done = door("prune", *scored, "+prune.target.num_layers=2", "prune.depth.metric=kl")
    assert "layer metric kl was not estimated; known: block_influence, greedy, loss." in done.mistake


def test_layers_that_were_dropped_one_after_another_go(door: Door, scored: list[str]) -> None:
    output = run_dir(scored) / "greedy"
    common = [*scored, "prune.depth.metric=greedy", f"prune.output={output}"]
    done = door("prune", *common, "+prune.target.num_layers=2")
    assert done.code == 0, done.err
    places = Importance.load(run_dir(scored) / "importance").layer_scores("greedy")
    assert PruningPlan.load(output).layer.tolist() == [layer for layer in range(4) if places[layer] == 2]
    assert PruningPlan.load(output).origin["depth"] == "greedy"
    done = door("prune", *common, "+prune.target.num_layers=1", "prune.output=" + str(run_dir(scored) / "refused"))
    assert "the greedy order holds only 2. Keep at least 2 layers" in done.mistake


def test_two_rounds_are_two_prunings_with_scores_between(door: Door, scored: list[str]) -> None:
    """By hand: a student half-way, its own importance, and the student of that."""
    place = run_dir(scored) / "rounds"
    place.mkdir()
    target = ["+prune.target.ffn_hidden_size=40", "+prune.target.num_attention_heads=4", "+prune.target.hidden_size=16"]
    last = [*target, "+prune.target.num_layers=3"]
    done = door("prune", *scored, *last, "prune.depth.metric=loss", "prune.rounds=2", f"prune.output={place / 'both'}")
    assert done.code == 0, done.err
    both = PruningPlan.load(place / "both")
    assert both.origin["rounds"] == 2 and both.origin["depth"] == "loss"

    half_way = [
        "+prune.target.ffn_hidden_size=60",
        "+prune.target.num_attention_heads=6",
        "+prune.target.hidden_size=24",
    ]
    steps = [
        ["prune", *half_way, f"prune.output={place / 'half'}"],
        [
            "estimate-importance",
            f"estimate_importance.model={place / 'half'}",
            f"estimate_importance.output={place / 'i'}",
        ],
        [
            "prune",
            *last,
            f"prune.model={place / 'half'}",
            f"prune.importance={place / 'i'}",
            f"prune.output={place / 'two'}",
        ],
    ]
    steps[-1].append(f"prune.layers={both.layer.tolist()}".replace(" ", ""))
    for stage, *values in steps:
        done = door(stage, *scored, *values)
        assert done.code == 0, done.err
    by_hand = compose(PruningPlan.load(place / "half"), PruningPlan.load(place / "two"))
    for axis in ("hidden", "ffn", "head", "group", "layer"):
        assert torch.equal(getattr(both, axis), getattr(by_hand, axis)), axis
    weights = [read_weights(str(place / name)) for name in ("both", "two")]
    assert weights[0].keys() == weights[1].keys()
    for name, tensor in weights[0].items():
        assert torch.equal(tensor, weights[1][name]), name

    done = door("prune", *scored, *target, f"prune.output={place / 'one'}")
    assert done.code == 0, done.err
    assert not torch.equal(PruningPlan.load(place / "one").ffn, both.ffn)  # scores between made a difference


def test_rounds_that_cannot_work_are_refused_before_anything_is_made(
    door: Door, scored: list[str], tmp_path: Path
) -> None:
    width, output = "+prune.keep.hidden_size=0.5", run_dir(scored) / "refused"
    for values, said in (
        (["prune.rounds=0", width], "prune.rounds=0 must be at least 1"),
        (["prune.rounds=2", width, "prune.offline=true"], "prune.rounds=2, but prune.offline=true never holds a model"),
        (
            ["prune.rounds=2", width, "prune.merge_heads=true"],
            "prune.rounds=2, but prune.merge_heads=true changes heads",
        ),
        (["prune.rounds=2", "prune.plan=somewhere"], "prune.rounds=2, but prune.plan is set"),
        (["prune.rounds=2", "prune.layers=[0,3]"], "prune.rounds=2 cuts the width in steps, but the target only drops"),
    ):
        assert said in door("prune", *scored, *values, f"prune.output={output}").mistake
    scores = tmp_path / "importance"
    shutil.copytree(run_dir(scored) / "importance", scores)

    def of_other_data(manifest: dict[str, Any]) -> None:
        manifest["inputs"] = [made | {"digest": "0" * 64} for made in manifest["inputs"]]

    change_manifest(scores, of_other_data)
    done = door("prune", *scored, width, "prune.rounds=2", f"prune.importance={scores}", f"prune.output={output}")
    assert f"was made again since {scores} was estimated on it" in done.mistake
    assert not output.exists()


def test_files_are_cut_to_the_same_student_as_the_model(door: Door, scored: list[str], tiny_chain: TinyChain) -> None:
    common = [*scored, "+prune.keep.hidden_size=0.5", "+prune.target.num_attention_heads=4", "prune.merge_heads=true"]
    before = contents(tiny_chain.run_dir / "corrected_teacher")
    exported = {}
    for way in ("live", "offline"):
        student = run_dir(scored) / way
        done = door("prune", *common, f"prune.offline={way == 'offline'}", f"prune.output={student}")
        assert done.code == 0, done.err
        out = run_dir(scored) / f"export_{way}"
        done = door(
            "export-hf", *common, f"export_hf.model={student}", f"export_hf.output={out}", "export_hf.prompt=null"
        )
        assert done.code == 0, done.err
        exported[way] = load_file(out / "model.safetensors")
    assert contents(tiny_chain.run_dir / "corrected_teacher") == before
    assert exported["live"].keys() == exported["offline"].keys()
    for name, tensor in exported["live"].items():
        assert torch.equal(tensor, exported["offline"][name]), name


def test_a_plan_prunes_a_hugging_face_folder_to_another(door: Door, scored: list[str], tiny_chain: TinyChain) -> None:
    from transformers import AutoModelForCausalLM

    plan = tiny_chain.run_dir / "student_pruned"
    output = run_dir(scored) / "pruned_hf"
    done = door("prune-hf", *scored, f"prune_hf.plan={plan}")
    assert done.code == 0, done.err
    target = PruningPlan.load(plan).target
    model = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
    assert sum(parameter.numel() for parameter in model.parameters()) == target.num_parameters
    assert json.loads((output / "config.json").read_text())["hidden_size"] == target.hidden_size
    assert open_artifact(output).stage == "prune-hf"


def test_scores_come_from_a_file_of_samples_and_go_with_their_tokenizer(
    door: Door, scored: list[str], tmp_path: Path
) -> None:
    file = tmp_path / "samples.jsonl"
    file.write_text("\n".join(json.dumps({"text": f"import json  # {number}"}) for number in range(6)))
    common = [*scored, f"estimate_importance.importance.calibration={file}", f"estimate_importance.output={tmp_path}/i"]
    assert "num_samples=8 must be between 1 and the 6 records" in door("estimate-importance", *common).mistake
    done = door("estimate-importance", *common, "estimate_importance.importance.num_samples=5")
    assert done.code == 0, done.err
    description = json.loads((tmp_path / "i" / "importance.json").read_text())
    assert description["num_samples"] == 5
    description["tokenizer_digest"] = "0" * 64
    (tmp_path / "i" / "importance.json").write_text(json.dumps(description))
    change_manifest(tmp_path / "i", lambda manifest: manifest["files"].pop("importance.json"))
    done = door("prune", *scored, f"prune.importance={tmp_path}/i", "+prune.keep.hidden_size=0.5")
    assert "prune.importance was estimated with another tokenizer (digest 000000000000)" in done.mistake


def test_an_edited_plan_is_followed(door: Door, scored: list[str], tmp_path: Path) -> None:
    done = door("prune", *scored, "prune.layers=[0,3]", f"prune.output={tmp_path / 'first'}")
    assert done.code == 0, done.err
    description = json.loads((tmp_path / "first" / "plan.json").read_text())
    (tmp_path / "plan").mkdir()
    (tmp_path / "plan" / "plan.json").write_text(json.dumps(description | {"layer": [1, 2]}))
    (tmp_path / "plan" / "plan.safetensors").write_bytes((tmp_path / "first" / "plan.safetensors").read_bytes())
    done = door("prune", *scored, f"prune.plan={tmp_path / 'plan'}", f"prune.output={tmp_path / 'second'}")
    assert done.code == 0, done.err
    assert PruningPlan.load(tmp_path / "second").layer.tolist() == [1, 2]


def test_a_target_of_nothing_says_what_can_be_set(door: Door, scored: list[str]) -> None:
    assert "prune.target is empty: nothing would be pruned" in door("prune", *scored).mistake


OPEN = """
import json, sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
with torch.no_grad():
    print(json.dumps([type(model).__name__, model(torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])).logits[0, -1].tolist()]))
"""


def test_a_student_that_its_family_does_not_open_is_refused_or_renamed(
    door: Door, scored: list[str], tmp_path: Path
) -> None:
    """A llama of 18 channels and 4 heads; as a mistral transformers opens it, and it computes the same."""
    common = [*scored, "+prune.target.hidden_size=18", "+prune.target.num_attention_heads=4"]
    done = door("prune", *common, f"prune.output={tmp_path / 'refused'}")
    assert "A llama of hidden_size=18 and num_attention_heads=4 is not opened by transformers 5" in done.mistake
    assert "target.hidden_size=16 or 20" in done.mistake and "prune.family=mistral" in done.mistake
    done = door("prune", *common, "prune.family=qwen2", f"prune.output={tmp_path / 'refused'}")
    assert "family=qwen2 is another model than this llama" in done.mistake
    assert not list(tmp_path.iterdir())

    folders = {}
    for way, values in (("loaded", []), ("offline", ["prune.offline=true"])):
        student, folders[way] = tmp_path / way, tmp_path / f"export_{way}"
        done = door("prune", *common, *values, "prune.family=mistral", f"prune.output={student}")
        assert done.code == 0, done.err
        export = [f"export_hf.model={student}", f"export_hf.output={folders[way]}", "export_hf.prompt=null"]
        done = door("export-hf", *common, *export)
        assert done.code == 0, done.err
    followed = [f"prune.plan={tmp_path / 'loaded'}", f"prune.output={tmp_path / 'followed'}"]
    done = door("prune", *scored, *followed)
    assert done.code == 0, done.err
    folders["files"] = tmp_path / "files"
    done = door("prune-hf", *common, f"prune_hf.plan={tmp_path / 'followed'}", f"prune_hf.output={folders['files']}")
    assert done.code == 0, done.err
    opened = {way: transformers5(OPEN, str(folder)) for way, folder in folders.items()}
    assert {name for name, _ in opened.values()} == {"MistralForCausalLM"}
    assert opened["loaded"] == opened["offline"]
    for folder in folders.values():
        config = json.loads((folder / "config.json").read_text())
        assert config["sliding_window"] is None and "mlp_bias" not in config


# ---- calibrated surgery ----------------------------------------------------------------------------------------------


CALIBRATED = ["prune.surgery.method=calibrated", "+prune.target.hidden_size=24", "+prune.target.ffn_hidden_size=48"]


COMPENSATED = [*CALIBRATED, "prune.surgery.refit=none"]


@pytest.mark.parametrize("calibrated", [CALIBRATED, COMPENSATED], ids=["sequential", "compensated"])
def test_a_calibrated_cut_measures_what_its_importance_lacks(
    door: Door, scored: list[str], tmp_path: Path, calibrated: list[str]
) -> None:
    """The stream's second moments come with the importance, or else from a pass while pruning: the same cut."""
    shallow = [*calibrated, "+prune.target.num_layers=3", "prune.depth.metric=block_influence"]
    lacking = ["estimate_importance.depth.metrics=[block_influence]", "estimate_importance.importance.stream=none"]
    done = door("estimate-importance", *scored, *lacking, f"estimate_importance.output={tmp_path / 'lacking'}")
    assert done.code == 0, done.err
    ways = {"with": [], "without": [f"prune.importance={tmp_path / 'lacking'}"]}
    for name, values in ways.items():
        done = door("prune", *scored, *shallow, *values, f"prune.output={tmp_path / name}")
        assert done.code == 0, done.err
    plans = {name: PruningPlan.load(tmp_path / name) for name in ways}
    assert plans["with"].has_basis and "rotation" in plans["with"].origin["surgery"]
    torch.testing.assert_close(plans["without"].hidden, plans["with"].hidden, rtol=0, atol=1e-4)
    assert plans["without"].ffn.equal(plans["with"].ffn)
    facts = open_artifact(tmp_path / "with").facts
    if calibrated is CALIBRATED:
        assert len(facts["sequential_refit"]) == 4 * 3 + 1
        assert all(each["error"] < each["plain_error"] for each in facts["sequential_refit"])
    else:
        assert {each["axis"] for each in facts["compensation"]} == {"ffn"} and len(facts["compensation"]) == 3
        assert all(each["error"] < each["plain_error"] for each in facts["compensation"])
        assert [each["error"] < 1 for each in facts["depth_correction"]] == [True]
    weights = {name: read_weights(str(tmp_path / name)) for name in ways}
    for name, tensor in weights["with"].items():
        torch.testing.assert_close(weights["without"][name], tensor, rtol=1e-2, atol=1e-3, msg=name)


SEQUENTIAL = ["prune.surgery.refit=sequential", *CALIBRATED[1:]]


@pytest.mark.parametrize("refit", [SEQUENTIAL, [*CALIBRATED, "prune.surgery.basis=channels"]], ids=["asked", "usual"])
def test_channels_chosen_in_rounds_are_refitted_at_the_end(
    door: Door, scored: list[str], tmp_path: Path, refit: list[str]
) -> None:
    done = door("prune", *scored, *refit, "prune.rounds=2", f"prune.output={tmp_path / 'refitted'}")
    assert done.code == 0, done.err
    places = open_artifact(tmp_path / "refitted").facts["sequential_refit"]
    assert all(each["error"] < each["plain_error"] for each in places)
    plan = PruningPlan.load(tmp_path / "refitted")
    assert plan.norm_scale is not None and plan.norm_scale.square().sub(4 / 3).abs().max() < 1e-6  # 32 to 24 channels


@pytest.mark.parametrize("basis", ["channels", "rotation"])
def test_a_sequential_refit_says_what_each_place_misses(
    door: Door, scored: list[str], tmp_path: Path, basis: str
) -> None:
    done = door("prune", *scored, *SEQUENTIAL, f"prune.surgery.basis={basis}", f"prune.output={tmp_path / 'refitted'}")
    assert done.code == 0, done.err
    student = open_artifact(tmp_path / "refitted")
    plan = PruningPlan.load(student.path)
    assert plan.has_basis == (basis == "rotation") and "refit=sequential" in plan.origin["surgery"]
    places = student.facts["sequential_refit"]
    assert len(places) == 4 * plan.target.num_layers + 1
    assert all(each["error"] < each["plain_error"] for each in places)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["prune.surgery.compensate=true"], "prune.surgery.compensate beside prune.surgery.refit=sequential"),
        (["prune.surgery.norm_scale=energy"], "prune.surgery.norm_scale beside prune.surgery.refit=sequential"),
        (["prune.offline=true"], "prune.surgery.correct_depth=false and prune.surgery.refit=none"),
        (["prune.merge_heads=true"], "prune.surgery.compensate=false and prune.surgery.refit=none"),
        (["prune.surgery.sequential.reader_ridge=-1"], "prune.surgery.sequential.reader_ridge=-1.0 must be at least 0"),
        (["prune.surgery.refit=sequence"], "prune.surgery.refit=sequence is not known; did you mean sequential?"),
    ],
)
def test_refits_that_cannot_work_are_refused(door: Door, scored: list[str], values: list[str], message: str) -> None:
    done = door("prune", *scored, *SEQUENTIAL, *values, f"prune.output={run_dir(scored) / 'refused'}")
    assert message in done.mistake
    assert not (run_dir(scored) / "refused").exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["prune.offline=true"], "prune.surgery fits weights to calibration samples"),
        (["prune.merge_heads=true"], "compensates for dropped heads"),
        (["prune.rounds=2"], "prune.surgery.basis=rotation leaves no channels to score"),
        (["prune.surgery.compensation.ridge=-1"], "prune.surgery.compensation.ridge=-1.0 must be at least 0"),
        (["prune.surgery.basis=turned"], "prune.surgery.basis=turned is not known; "),
    ],
)
def test_surgeries_that_cannot_work_are_refused(door: Door, scored: list[str], values: list[str], message: str) -> None:
    unscored = [*values, "prune.output=" + str(run_dir(scored) / "refused")]
    done = door("prune", *scored, "prune.surgery.method=calibrated", *CALIBRATED[1:], *unscored)
    assert message in done.mistake
    assert not (run_dir(scored) / "refused").exists()


def test_a_plan_is_followed_by_calibrated_surgery_which_refits_what_it_keeps(
    door: Door, scored: list[str], tmp_path: Path
) -> None:
    plain = ["+prune.target.ffn_hidden_size=48", "+prune.target.num_attention_heads=4"]
    done = door("prune", *scored, *plain, f"prune.output={tmp_path / 'plain'}")
    assert done.code == 0, done.err
    first = PruningPlan.load(tmp_path / "plain")
    unlikely = replace(first, ffn=first.ffn.max() + 0 * first.ffn - torch.arange(48).flip(0))  # the last neurons
    (tmp_path / "plan").mkdir()
    unlikely.save(tmp_path / "plan")
    followed = [f"prune.plan={tmp_path / 'plan'}", "prune.surgery.method=calibrated"]
    done = door("prune", *scored, *followed, f"prune.output={tmp_path / 'sequential'}")
    assert done.code == 0, done.err
    kept = PruningPlan.load(tmp_path / "sequential")
    assert kept.ffn.equal(unlikely.ffn) and kept.head.equal(unlikely.head)
    assert open_artifact(tmp_path / "sequential").facts["sequential_refit"]
    followed.append("prune.surgery.refit=none")
    done = door("prune", *scored, *followed, f"prune.output={tmp_path / 'followed'}")
    assert done.code == 0, done.err
    kept = PruningPlan.load(tmp_path / "followed")
    assert kept.ffn.equal(unlikely.ffn) and kept.head.equal(unlikely.head)
    refitted = open_artifact(tmp_path / "followed").facts["compensation"]
    assert {each["axis"] for each in refitted} == {"ffn", "head"}
    assert all(each["error"] < each["plain_error"] for each in refitted)
    anew = "prune.surgery.compensation.selection=compensated_error"
    done = door("prune", *scored, *followed, anew, f"prune.output={tmp_path / 'refused'}")
    assert "says which neurons and heads stay, and prune.surgery.compensation.selection=compensated_error" in (
        done.mistake
    )
    assert not (tmp_path / "refused").exists()

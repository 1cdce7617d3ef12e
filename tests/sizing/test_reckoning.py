"""`minitron plan`: every recipe reckoned at its real number of ranks, and what one meets who asked for too much."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from minitron_nemo.checks import Mistake
from minitron_nemo.conf_tree import recipes
from minitron_nemo.config.plan import PlanConfig
from minitron_nemo.config.ranges import range_of
from minitron_nemo.config.slurm import SlurmConfig
from minitron_nemo.recipe import chain_of, compose, config_of
from minitron_nemo.sizing.machine import Machine
from minitron_nemo.sizing.run import reckon
from minitron_nemo.sizing.tables import Reckoned, distinct
from support.door import Door
from test_ranges import numbers_of

IN_CHAINS = [recipe for recipe in recipes() if recipe != "embedded_teacher"]  # which trains one model, without a chain
TO_SAY = {
    "prune": ["+prune.keep.hidden_size=0.75"],
    "real": ["import_hf.model=embedded", "prune.target.ffn_hidden_size=320"],
}
"""What a person has to say of a recipe; the GGUF file of `real` is not in the checkout."""
PAPERS = {
    "llama31_8b_to_4b_width": [(8_030_261_248, 6_979_588_096), (4_512_746_496, 3_724_741_632)],
    "llama31_8b_to_4b_depth": [(8_030_261_248, 6_979_588_096), (4_540_469_248, 3_489_796_096)],
    "mistral_nemo_12b_to_8b": [(12_247_782_400, 10_905_605_120), (8_414_105_600, 7_340_363_776)],
    "nemotron4_15b_to_8b": [(15_628_775_424, 12_483_047_424), (8_271_699_968, 6_174_547_968)],
    "nemotron4_15b_to_8b_to_4b": [
        (15_628_775_424, 12_483_047_424),
        (8_271_699_968, 6_174_547_968),
        (4_190_509_056, 2_617_645_056),
    ],
}
"""Parameters, and those outside embeddings, of teacher and student."""
TOKENS = {
    "llama31_8b_to_4b_width": 94e9,
    "llama31_8b_to_4b_depth": 94e9,
    "mistral_nemo_12b_to_8b": 380e9,
    "nemotron4_15b_to_8b": 94e9,
    "nemotron4_15b_to_8b_to_4b": 94e9,
}
"""That the papers distil on."""


def reckoned(recipe: str, *overrides: str) -> dict[str, Reckoned]:
    config, steps = compose([f"recipe={recipe}", *overrides])
    chosen = [steps[name] for name in chain_of(config)]
    plan = PlanConfig(**config.plan)
    return {each.name: each for each in reckon(config, chosen, plan, Machine.of(plan, SlurmConfig(**config.slurm)))}


@pytest.mark.parametrize("recipe", IN_CHAINS)
def test_every_recipe_is_reckoned_in_seconds_and_fits(recipe: str) -> None:
    overrides = TO_SAY.get(recipe, [])
    started = time.process_time()
    found = reckoned(recipe, *overrides)
    assert time.process_time() - started < 20
    assert all(each.fits for each in found.values()), {name: each.memory for name, each in found.items()}
    config, _ = compose([f"recipe={recipe}", *overrides])
    left_out = set(chain_of(config)) - set(found)
    assert left_out <= {"prepare_data", "report"}


@pytest.mark.parametrize("recipe", PAPERS)
def test_parameters_and_tokens_are_the_papers(recipe: str) -> None:
    found = reckoned(recipe)
    shapes = [shape for _, shape in distinct(list(found.values()))]
    assert [(shape.num_parameters, shape.num_non_embedding_parameters) for shape in shapes] == PAPERS[recipe]
    distilled = [each.job.tokens for name, each in found.items() if name.startswith("distill")]
    assert distilled == pytest.approx([TOKENS[recipe]] * (len(shapes) - 1), rel=0.005)


def test_hours_are_flops_over_what_all_ranks_do_in_one() -> None:
    step = reckoned("llama31_8b_to_4b_width", "plan.utilisation=0.5", "plan.peak_tflops=1000")["distill"]
    student, teacher = (model.shape for model in step.job.models)
    flops = 9960 * 1152 * 8192 * (3 * student.flops_per_token(8192) + teacher.flops_per_token(8192))
    assert step.cost is not None and step.job.flops == flops
    assert step.cost.hours == pytest.approx(flops / (256 * 1000e12 * 0.5) / 3600)
    assert step.cost.gpu_hours == pytest.approx(256 * step.cost.hours)


def test_a_pipeline_waits_and_recomputation_takes_time() -> None:
    plain = reckoned("llama31_8b_to_4b_width")["distill"]
    piped = reckoned("llama31_8b_to_4b_width", "trainer.pipeline_model_parallel_size=4")["distill"]
    again = reckoned("llama31_8b_to_4b_width", "trainer.recompute_granularity=full")["distill"]
    assert plain.cost is not None and piped.cost is not None and again.cost is not None
    assert piped.job.micro_batches(256) == 1152 // 32
    assert piped.cost.hours == pytest.approx(plain.cost.hours * (1 + 3 / 36))
    assert 1.1 < again.cost.hours / plain.cost.hours < 4 / 3
    assert again.memory.total < plain.memory.total == pytest.approx(plain.memory.total)
    assert plain.recomputed is not None and plain.recomputed.total == again.memory.total


def test_what_does_not_fit_is_told_what_helps_and_by_how_much() -> None:
    layout = ("trainer.tensor_model_parallel_size=1", "trainer.sequence_parallel=false", "slurm.nodes=16")
    step = reckoned("llama31_8b_to_4b_width", *layout)["correct_teacher"]
    assert not step.fits and step.mends
    fitting = [mend for mend in step.mends if mend.fits]
    assert fitting and step.mends[: len(fitting)] == fitting
    assert [mend.hours for mend in fitting] == sorted(mend.hours or 0 for mend in fitting)
    for mend in step.mends:  # the figures are those of a plan with the change
        changed = reckoned("llama31_8b_to_4b_width", *layout, *mend.words.split())["correct_teacher"]
        assert changed.memory.total == mend.memory_bytes < step.memory.total
        assert changed.fits == mend.fits and changed.cost is not None and changed.cost.hours == mend.hours


def refusal(recipe: str, *overrides: str) -> str:
    with pytest.raises(Mistake) as refused:
        reckoned(recipe, *overrides)
    return str(refused.value)


def test_everything_that_stages_would_refuse_is_said_at_once() -> None:
    said = refusal(
        "llama31_8b_to_4b_width",
        "trainer.tensor_model_parallel_size=3",
        "trainer.pipeline_model_parallel_size=5",
        "trainer.seq_length=200000",
        "slurm.nodes=4",
    )
    assert said.startswith("slurm.nodes=4 x slurm.processes_per_node=8 = 32 ranks; to mend:")
    for part in (
        "32 processes cannot hold tensor_model_parallel_size=3 x pipeline_model_parallel_size=5 x "
        "context_parallel_size=1 = 15.",
        "num_attention_heads=32 cannot be split over trainer.tensor_model_parallel_size=3.",
        "trainer.seq_length=200000 is longer than the model's context of 131072 tokens.",
    ):
        assert part in said
    assert "import_hf, correct_teacher" in said  # which steps it is about


def test_a_batch_that_ranks_cannot_share_is_refused_as_the_trainer_would() -> None:
    said = refusal("llama31_8b_to_4b_width", "slurm.nodes=31")
    assert (
        "trainer.global_batch_size=1152 cannot be split over trainer.micro_batch_size x data-parallel ranks=124."
        in said
    )
    assert "distill" in said and "evaluate" not in said


def test_a_teacher_nobody_knows_is_refused_with_the_known_ones() -> None:
    assert "plan.teacher=llama-4 is not known by that name; did you mean llama-3.1-8b?" in refusal(
        "llama31_8b_to_4b_width", "plan.teacher=llama-4"
    )
    said = refusal("llama31_8b_to_4b_width", "plan.teacher=null")
    assert "import_hf.model=/models/Llama-3.1-8B is not here" in said and "mistral-nemo-12b" in said


def test_a_config_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    said = refusal("llama31_8b_to_4b_width", f"import_hf.model={tmp_path}")
    assert f"{tmp_path / 'config.json'} is not valid JSON" in said


def test_a_folder_on_this_machine_says_more_than_a_name(tmp_path: Path) -> None:
    from minitron_nemo.hf.config import hf_config
    from minitron_nemo.published import PUBLISHED

    shape = PUBLISHED["Qwen3-8B"]
    (tmp_path / "config.json").write_text(json.dumps(hf_config(shape)))
    found = reckoned("llama31_8b_to_4b_width", f"import_hf.model={tmp_path}")
    assert found["import_hf"].job.models[0].shape.num_parameters == shape.num_parameters == 8_190_735_360


def test_a_model_that_no_step_makes_is_refused() -> None:
    said = refusal("quickstart", "distill.student=runs/nowhere")
    assert "distill.student=runs/nowhere is made by no step before it in compress.steps" in said


def test_numbers_of_the_plan_have_ranges_and_accelerators_names() -> None:
    assert [key for key, _, field, _ in numbers_of(PlanConfig) if range_of(field) is None] == []
    with pytest.raises(Mistake, match=r"plan.utilisation=1.5 must be above 0 and at most 1; the default is 0.4."):
        PlanConfig(utilisation=1.5)
    with pytest.raises(Mistake, match=r"plan.accelerator=h1000 is not known; did you mean h100\?"):
        PlanConfig(accelerator="h1000")


def test_the_door_shows_tables_writes_json_and_ends_with_2_where_it_does_not_fit(door: Door, tmp_path: Path) -> None:
    output = tmp_path / "plan.json"
    fits = door("plan", "recipe=llama31_8b_to_4b_width", f"plan.output={output}")
    assert fits.code == 0, fits.err
    assert "4,512,746,496" in fits.out and max(map(len, fits.out.splitlines())) <= 120
    steps: dict[str, Any] = {each["step"]: each for each in json.loads(output.read_text())["steps"]}
    assert steps["distill"]["tokens"] == 9960 * 1152 * 8192
    assert sum(steps["distill"]["memory_bytes"].values()) == steps["distill"]["memory_bytes_in_all"]
    tight = door("plan", "recipe=llama31_8b_to_4b_width", "plan.memory_gib=30")
    assert "correct_teacher" in tight.mistake and "trainer.recompute_granularity=full" in tight.out


def test_every_step_has_its_config_before_anything_is_reckoned() -> None:
    config, steps = compose(["recipe=llama31_8b_to_4b_width"])
    for name in chain_of(config):
        assert config_of(steps[name], config) is not None

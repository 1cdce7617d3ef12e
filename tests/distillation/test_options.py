"""Every option of a distillation beside every other, as docs/distillation.md says: one step, or a reason why not."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor
from torch.testing import assert_close

from minitron_nemo.config.data import DataConfig
from minitron_nemo.config.distillation import DistillationConfig, DivergenceConfig, HiddenStateConfig
from minitron_nemo.config.stages import DistillConfig
from minitron_nemo.config.trainer import TrainerConfig
from minitron_nemo.distillation.output_head import output_weight, without_logits
from minitron_nemo.distillation.stored_teacher import TeacherInStore, top_k_of_head
from minitron_nemo.distillation.teacher import TeacherAtHand, require_can_learn
from minitron_nemo.distillation.teacher_student import TeacherStudent, adjust_tensor_shapes_fn
from minitron_nemo.divergence.fused_linear import OutputHead
from minitron_nemo.divergence.top_k import STORED
from minitron_nemo.shape import ModelShape
from minitron_nemo.text.documents import documents_of
from support.megatron import TINY, TINY_EXPERTS, build_gpt, smaller
from support.ranks import Ranks, current_layout

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "distillation.md"
OFFLOAD, STORE, HIDDEN, TOP_K, LEARNS = "offload_teacher", "teacher_logits", "hidden_states", "top_k", "teacher_lr"
DOCUMENTS, RECOMPUTE, TIED, EXPERTS = "reset_at_documents", "recompute_granularity", "tied embeddings", "experts"
OPTIONS = (OFFLOAD, STORE, HIDDEN, TOP_K, LEARNS, DOCUMENTS, RECOMPUTE, TIED, EXPERTS)
REASONS = {  # of the table's numbers, what the user reads
    "1": "distill.offload_teacher=true .* is not in memory",
    "2": "distillation.hidden_states.enabled=true needs the teacher's hidden states",
    "3": "distillation.teacher_lr=0.001 needs the teacher's weights",
    "4": "whose documents see each other",
    "5": "distillation.teacher_lr cannot be set for a teacher with tied embeddings on 2 pipeline stages",
}
REAL_VOCABULARY, MICRO_BATCHES, S, K = 61, 2, 8, 5
CUT = {"hidden_size": 16, "num_attention_heads": 4}
TEACHERS = {False: TINY, True: TINY_EXPERTS}
STUDENTS = {
    False: smaller(TINY, num_layers=2, ffn_hidden_size=28, **CUT),
    True: smaller(TINY_EXPERTS, moe_ffn_hidden_size=12, **CUT),
}
Options = frozenset[str]


def pairs() -> list[Options]:
    """None, one and two of them."""
    return [frozenset(some) for number in range(3) for some in itertools.combinations(OPTIONS, number)]


def shape_of(shapes: Mapping[bool, ModelShape], options: Options) -> ModelShape:
    return smaller(shapes[EXPERTS in options], share_embeddings_and_output_weights=TIED in options)


def config_of(options: Options) -> DistillConfig:
    """As a user asks for it."""
    top_k = TOP_K in options or STORE in options
    hidden = HiddenStateConfig(enabled=HIDDEN in options, mapping="uniform", balance="fixed", weight=0.5)
    return DistillConfig(
        teacher="runs/teacher",
        student="runs/student",
        teacher_logits="runs/store" if STORE in options else None,
        offload_teacher=OFFLOAD in options,
        distillation=DistillationConfig(
            DivergenceConfig(kind="top_k", k=K) if top_k else DivergenceConfig(),
            hidden_states=hidden,
            cross_entropy_weight=0.25,
            teacher_lr=1e-3 if LEARNS in options else 0.0,
        ),
        data=DataConfig(reset_at_documents=DOCUMENTS in options),
        trainer=TrainerConfig(recompute_granularity="full" if RECOMPUTE in options else None),
    )


def samples() -> list[dict[str, Tensor]]:
    """Micro-batches of one sample; documents begin at 0 and 3."""
    text = torch.randint(REAL_VOCABULARY, (MICRO_BATCHES, 1, S + 1), generator=torch.Generator().manual_seed(11))
    mask = (text[..., 1:] % 4).float() / 2
    positions = torch.arange(S)[None]
    return [
        {"tokens": each[:, :-1], "labels": each[:, 1:], "loss_mask": weights, "position_ids": positions}
        for each, weights in zip(text, mask, strict=True)
    ]


def batches_of(options: Options, stored: list[dict[str, Tensor]]) -> list[dict[str, Any]]:
    batches: list[dict[str, Any]] = [dict(batch) for batch in samples()]
    for batch, answers in zip(batches, stored, strict=True):
        if DOCUMENTS in options:
            starts = torch.zeros(1, S, dtype=torch.bool)
            starts[0, [0, 3]] = True
            batch["packed_seq_params"] = documents_of(starts)
        if STORE in options:
            batch |= answers
    return batches


def answers_of_teachers() -> dict[Options, list[dict[str, Tensor]]]:
    """On one rank: what a store would hold of each teacher's answers."""
    found: dict[Options, list[dict[str, Tensor]]] = {}
    for options in map(frozenset, ((), (TIED,), (EXPERTS,), (TIED, EXPERTS))):
        teacher = build_gpt(shape_of(TEACHERS, options), seed=2)
        found[options] = []
        for batch in samples():
            with torch.no_grad(), without_logits(teacher):
                hidden = teacher(batch["tokens"], batch["position_ids"], None)
            head = OutputHead(hidden, output_weight(teacher))
            config = DivergenceConfig(kind="top_k", k=K)
            answer = top_k_of_head(head, config, tp_group=None, vocab_size=REAL_VOCABULARY)
            assert answer.log_tail_mass is not None
            values = (answer.log_probs, answer.log_tail_mass.exp().unsqueeze(-1), answer.indices)
            by_sample = [value.transpose(0, 1) for value in values]
            by_sample[1] = by_sample[1].squeeze(-1)
            found[options].append(dict(zip(STORED, by_sample, strict=True)))
    return found


# ---- on ranks --------------------------------------------------------------------------------------------------------


def steps(stored: dict[Options, list[dict[str, Tensor]]]) -> dict[Options, dict[str, Any]]:
    return {options: one_step(options, stored[options & {TIED, EXPERTS}]) for options in pairs()}


def one_step(options: Options, stored: list[dict[str, Tensor]]) -> dict[str, Any]:
    """The step's loss and its gradient's squared norm on this rank; or why there is none, and how much was built."""
    built: list[GPTModel] = []

    def build(shape: ModelShape, seed: int, **overrides: Any) -> GPTModel:
        built.append(build_gpt(shape, seed=seed, calculate_per_token_loss=True, **overrides))
        return built[-1]

    try:
        config = config_of(options)
        teacher_shape = shape_of(TEACHERS, options)
        if LEARNS in options:
            tied = teacher_shape.share_embeddings_and_output_weights
            require_can_learn(tied=tied, pipeline_stages=current_layout().pp)
        overrides = config.trainer.recomputation | {"finalize_model_grads_func": finalize_model_grads}
        student = build(shape_of(STUDENTS, options), 1, **overrides).train()

        def load(shape: ModelShape, weights: Path, *, on_host: bool) -> GPTModel:
            return build(shape, 2)

        at_hand = TeacherAtHand(teacher_shape, Path(), config.offload_teacher)
        teacher = TeacherInStore().open(load) if STORE in options else at_hand.open(load)
        model = TeacherStudent(student, teacher, config.distillation, vocab_size=REAL_VOCABULARY)
    except ValueError as error:
        return {"refused": str(error), "built": len(built)}
    wrapped = DistributedDataParallel(model.config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), model)
    wrapped.zero_grad_buffer()
    wrapped.train()

    def forward_step(batches: Any, model: torch.nn.Module) -> tuple[Any, Any]:
        batch = next(batches)
        tokens = (batch.pop("tokens"), batch.pop("position_ids"), None)
        return model(*tokens, **batch), lambda loss: (loss.sum, loss.count.int(), {})

    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(batches_of(options, stored)),
        model=wrapped,
        num_microbatches=MICRO_BATCHES,
        seq_length=S,
        micro_batch_size=1,
        forward_only=False,
        adjust_tensor_shapes_fn=adjust_tensor_shapes_fn(wrapped),
    )
    model.end_step()
    # of the student alone: a teacher that learns has its own
    squares = [p.main_grad.double().square().sum() for p in model.student.parameters()]
    return {"loss": model.step_losses()["loss"], "gradient": torch.stack(squares).sum()}


# ---- the claims ------------------------------------------------------------------------------------------------------


def table() -> dict[Options, str]:
    """The table of docs/distillation.md: of each pair what its cell says."""
    text = DOCUMENT.read_text().split("## Which options go together")[1].split("\n## ")[0]
    lines = re.findall(r"^\|.*", text, re.M)
    header, _, *rows = [[cell.strip(" `") for cell in line.split("|")[1:-1]] for line in lines]
    cells = {frozenset((row[0], option)): row[place] for row in rows for place, option in enumerate(header) if place}
    return {options: cell for options, cell in cells.items() if cell}


def test_the_table_has_a_cell_for_each_pair_and_a_text_for_each_reason() -> None:
    assert set(table()) == {options for options in pairs() if len(options) == 2}
    section = DOCUMENT.read_text().split("## Which options go together")[1].split("\n## ")[0]
    assert set(re.findall(r"^(\d)\. ", section, re.M)) == set(REASONS)


@pytest.mark.parametrize("layout", ["single", "tp2-sp", "pp2"])
def test_each_pair_of_options_takes_its_step_or_is_refused_before_anything_is_built(ranks: Ranks, layout: str) -> None:
    """What saves memory changes neither loss nor gradient; an answer that was stored is as good as the teacher's."""
    said = table()
    (stored,) = ranks("single").run(answers_of_teachers)
    for found in ranks(layout).run(steps, stored):
        for options, result in found.items():
            cell = said.get(options, "yes") if len(options) == 2 else "yes"
            expected = re.fullmatch(r"yes(?:, not with stages \((\d)\))?|no \((\d)\)", cell)
            assert expected, f"{set(options)}: {cell}"
            reason = expected[2] or (expected[1] if layout == "pp2" else None)
            if reason is not None:
                assert re.search(REASONS[reason], result.get("refused", "")), (set(options), result)
                assert result["built"] == 0, (set(options), result)
                continue
            assert "refused" not in result, (set(options), result["refused"])
            assert result["loss"].isfinite() and result["gradient"].isfinite(), set(options)
        for options, result in found.items():
            for saving, instead in ((OFFLOAD, None), (RECOMPUTE, None), (STORE, TOP_K)):
                other = found.get((options - {saving}) | ({instead} if instead else set()), {})
                if saving in options and "loss" in result and "loss" in other:
                    # stored answers are logarithms of probabilities; a step formed twice is the same sum
                    tolerance = {"rtol": 1e-5, "atol": 1e-7} if saving == STORE else {"rtol": 1e-12, "atol": 0}
                    for key in ("loss", "gradient"):
                        assert_close(result[key], other[key], **tolerance, msg=lambda m, o=options: f"{set(o)}: {m}")

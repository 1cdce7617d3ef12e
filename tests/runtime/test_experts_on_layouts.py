"""A mixture of experts through the stages: imported, trained and exported with its experts spread over ranks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from minitron_nemo.config.data import DataConfig
from minitron_nemo.config.trainer import TrainerConfig
from minitron_nemo.config.training import OptimConfig, TrainingConfig
from minitron_nemo.runtime.layout import prepare_layout
from minitron_nemo.stages import distill, export_hf, import_hf, pretrain
from support.hf import load_with_transformers
from support.megatron import TINY_EXPERTS
from support.ranks import Ranks, current_layout
from support.tiny import VOCAB_SIZE
from support.tiny_run import TinyRun, read_weights, trainer_values


def write_mixture(tokenizer: Path, directory: Path) -> Path:
    """A random Qwen3-MoE with a dense layer among its three, with the tiny run's tokenizer."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    shutil.copytree(tokenizer, directory, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=6,
        max_position_embeddings=64,
        initializer_range=0.1,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        norm_topk_prob=True,
        mlp_only_layers=[1],
    )
    Qwen3MoeForCausalLM(config).save_pretrained(directory)
    return directory


def import_train_export(hf: Path, data: str, output: Path) -> None:
    layout = current_layout()
    trainer = TrainerConfig(
        **trainer_values(
            pipeline_model_parallel_size=layout.pp,
            expert_model_parallel_size=layout.ep,
        )
    )
    import_hf.run(import_hf.ImportHfConfig(model=str(hf), trainer=trainer, output=str(output / "teacher")))
    pretrain.run(
        pretrain.PretrainConfig(
            initial=str(output / "teacher"),
            trainer=trainer,
            training=TrainingConfig(
                steps=2, checkpoint_every=0, optim=OptimConfig(lr=1e-2, min_lr=1e-3, warmup_steps=1)
            ),
            data=DataConfig(prepared=data),
            output=str(output / "trained"),
        )
    )
    export_hf.run(
        export_hf.ExportHfConfig(
            model=str(output / "trained"), dtype="fp32", trainer=trainer, output=str(output / "exported")
        )
    )


def test_a_mixture_trains_with_its_experts_spread_over_ranks(ranks: Ranks, tiny_run: TinyRun, tmp_path: Path) -> None:
    """Exporting compares Megatron's logits with those of transformers. The balancing loss is each micro-batch's own."""
    hf = write_mixture(tiny_run.hf, tmp_path / "hf")
    losses, balances = {}, {}
    for layout in ("dp2-ep2", "pp2"):  # experts on two ranks; all experts of two layers on one, of the third on another
        ranks(layout).run(import_train_export, hf, tiny_run.data, tmp_path / layout)
        lines = (tmp_path / layout / "trained" / "history.jsonl").read_text().splitlines()
        losses[layout] = [json.loads(line)["loss"] for line in lines]
        balances[layout] = [json.loads(line)["parts"]["load_balancing_loss"] for line in lines]
        [before], [after] = (
            ranks("single").run(read_weights, str(tmp_path / layout / stage)) for stage in ("teacher", "trained")
        )
        for name, tensor in after.items():
            assert not torch.equal(tensor, before[name]), f"{layout} left {name} as it was"
        assert load_with_transformers(tmp_path / layout / "exported").config.mlp_only_layers == [1]
    torch.testing.assert_close(losses["dp2-ep2"], losses["pp2"], rtol=0, atol=1e-3)
    torch.testing.assert_close(balances["dp2-ep2"], balances["pp2"], rtol=0, atol=1e-3)
    assert all(0.9 < value < 4 for value in balances["pp2"])  # 1 where each expert gets as much, 4 where one gets all
    ranks("single").run(distil_both_ways, tiny_run.data, tmp_path / "pp2")


def distil_both_ways(data: str, made: Path) -> None:
    """Without a word, what a student minimises is its teacher's distance alone."""
    for coefficient, balanced in ((None, False), (0.5, True)):
        output = made / f"distilled-{coefficient}"
        distill.run(
            distill.DistillConfig(
                teacher=str(made / "teacher"),
                student=str(made / "trained"),
                trainer=TrainerConfig(**trainer_values()),
                training=TrainingConfig(
                    steps=1,
                    checkpoint_every=0,
                    moe_aux_loss_coeff=coefficient,
                    optim=OptimConfig(lr=1e-2, min_lr=1e-3, warmup_steps=1),
                ),
                data=DataConfig(prepared=data),
                output=str(output),
            )
        )
        [line] = (output / "history.jsonl").read_text().splitlines()
        parts = json.loads(line)["parts"]
        assert ("load_balancing_loss" in parts) == balanced and "divergence" in parts
    plain, pulled = (read_weights(str(made / f"distilled-{each}")) for each in (None, 0.5))
    routers = [name for name in plain if name.endswith("router.weight")]
    assert routers and all(not torch.equal(plain[name], pulled[name]) for name in routers)


def test_experts_on_tensor_parallel_ranks_need_the_tokens_split_too() -> None:
    trainer = TrainerConfig(**trainer_values(tensor_model_parallel_size=2, expert_model_parallel_size=2))
    with pytest.raises(ValueError, match=r"size=2 of a model with experts needs .*Set trainer\.sequence_parallel=true"):
        prepare_layout(trainer, TINY_EXPERTS, seq_length=trainer.seq_length, seed=0)

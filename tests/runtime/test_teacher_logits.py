"""Claims about the stored teacher: that a kill costs little, and that a distillation reads it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from minitron_nemo import engine, platform
from minitron_nemo.artifact import open_artifact
from minitron_nemo.config.data import DataConfig
from minitron_nemo.config.distillation import DistillationConfig, DivergenceConfig, HiddenStateConfig
from minitron_nemo.config.trainer import TrainerConfig
from minitron_nemo.config.training import OptimConfig, TrainingConfig
from minitron_nemo.distillation.stored_teacher import StoredTeacher
from minitron_nemo.distillation.teacher import LiveTeacher
from minitron_nemo.distillation.teacher_student import TeacherStudent
from minitron_nemo.divergence.sampled import DRAWS, STORED_DRAWS
from minitron_nemo.divergence.top_k import INDICES, LOG_PROBS
from minitron_nemo.runtime.layout import prepare_layout
from minitron_nemo.runtime.teacher_pass import write_missing
from minitron_nemo.shape import ModelShape
from minitron_nemo.stages import distill, teacher_logits
from minitron_nemo.text.blend import open_blend
from minitron_nemo.text.stored_samples import StoredSamples, samples_of, stored_sources
from minitron_nemo.text.teacher_records import SampledFormat, TopKFormat
from minitron_nemo.text.teacher_store import Shards, TeacherStore
from support.artifacts import change_manifest, full_disk
from support.gathering_attention import build_context_parallel_gpt
from support.megatron import TINY, TINY_EXPERTS, build_gpt, smaller
from support.ranks import Ranks, current_layout
from support.tiny import SEQ_LENGTH, VOCAB_SIZE
from support.tiny_run import TinyRun, trainer_values

K, SAMPLES, PER_SHARD = 7, 18, 4  # five shards, the last of two samples
STEPS = 3
DENSE = smaller(TINY, padded_vocab_size=VOCAB_SIZE)
EXPERTS = smaller(TINY_EXPERTS, padded_vocab_size=VOCAB_SIZE)
TINY_FORMAT = {"seq_length": SEQ_LENGTH, "vocab_size": VOCAB_SIZE, "samples_per_shard": 2}
SMALL = Shards(Path(), TopKFormat(k=K, precision="float32", **TINY_FORMAT), num_samples=6)
DRAWN = Shards(Path(), SampledFormat(draws=24, **TINY_FORMAT), num_samples=6)
TOP_K = DivergenceConfig(kind="top_k", k=K)


# ---- the teacher's pass ----------------------------------------------------------------------------------------------


def trainer(**values: Any) -> TrainerConfig:
    """The trainer of the layout this rank was started for."""
    layout = current_layout()
    sizes = {
        "tensor_model_parallel_size": layout.tp,
        "pipeline_model_parallel_size": layout.pp,
        "sequence_parallel": layout.sequence_parallel,
    }
    return TrainerConfig(**trainer_values(**sizes | values))


def write_store(run: TinyRun, output: str, rows: int = 1, **values: Any) -> None:
    config = {
        "model": run.teacher,
        "method": "top_k",
        "k": K,
        "precision": "float32",
        "num_samples": SAMPLES,
        "samples_per_shard": PER_SHARD,
        "trainer": trainer(micro_batch_size=rows),
        "data": DataConfig(prepared=run.data),
        "output": output,
    }
    teacher_logits.run(teacher_logits.TeacherLogitsConfig(**config | values))


def write_until_the_first_shard_is_there(run: TinyRun, output: str, method: str = "top_k") -> None:
    """Every rank stops in the middle of its second shard."""
    write = Shards.write

    def stops(self: Shards, shard: int, records: list[bytes]) -> None:
        if shard >= 2:
            self.path(shard).with_suffix(".partial").write_bytes(records[0][:100])
            raise KeyboardInterrupt
        write(self, shard, records)

    with pytest.MonkeyPatch.context() as changed, contextlib.suppress(KeyboardInterrupt):
        changed.setattr(Shards, "write", stops)
        write_store(run, output, method=method)


def answers_in(output: str) -> dict[str, Tensor]:
    store = TeacherStore.open(output, key="store")
    samples = [store.shards.read(number) for number in range(SAMPLES)]
    return {key: torch.stack([sample[key] for sample in samples]) for key in samples[0]}


@pytest.fixture(scope="module")
def store(ranks: Ranks, tiny_run: TinyRun) -> str:
    output = str(tiny_run.directory / "teacher_logits")
    ranks("single").run(write_store, tiny_run, output)
    return output


def assert_same_answers(found: dict[str, Tensor], reference: dict[str, Tensor]) -> None:
    assert found.keys() == reference.keys()
    for key, value in found.items():
        if key in (INDICES, DRAWS):
            assert (value == reference[key]).double().mean() > 0.999  # a sum in another order may swap two equals
        else:
            # float32 sums in another order; half precision, which rounds them
            assert_close(value, reference[key], rtol=1e-4 if value.dtype == torch.float32 else 1e-3, atol=1e-5)


def assert_same_store(output: str, expected: str) -> None:
    assert_same_answers(answers_in(output), answers_in(expected))
    assert open_artifact(output).facts == open_artifact(expected).facts


@pytest.fixture(scope="module")
def drawn(ranks: Ranks, tiny_run: TinyRun) -> str:
    output = str(tiny_run.directory / "teacher_draws")
    ranks("single").run(write_store, tiny_run, output, 1, method="sampled")
    return output


def test_a_store_of_draws_is_written_again_to_the_byte_after_a_kill(
    ranks: Ranks, tiny_run: TinyRun, drawn: str, tmp_path: Path
) -> None:
    output = tmp_path / "store"
    ranks("single").run(write_until_the_first_shard_is_there, tiny_run, str(output), "sampled")
    assert len(list((tmp_path / "store.shards").glob("*.bin"))) == 2
    ranks("single").run(write_store, tiny_run, str(output), 1, method="sampled")
    assert open_artifact(str(output)).facts == open_artifact(drawn).facts
    for path in sorted(Path(drawn).glob("*.bin")):
        assert (output / path.name).read_bytes() == path.read_bytes()
    metrics = open_artifact(drawn).metrics
    assert metrics["bytes_per_token"] <= 64 and metrics["tokens"] == SAMPLES * SEQ_LENGTH


@pytest.mark.parametrize(("layout", "rows"), [("tp2-sp", 1), ("pp2", 3), ("dp2", 2)])
def test_every_layout_and_batch_size_draws_the_same(
    ranks: Ranks, tiny_run: TinyRun, drawn: str, tmp_path: Path, layout: str, rows: int
) -> None:
    output = str(tmp_path / "store")
    ranks(layout).run(write_store, tiny_run, output, rows, method="sampled")
    assert_same_store(output, drawn)


@pytest.mark.parametrize(("layout", "rows"), [("tp2-sp", 1), ("pp2", 3), ("dp2", 2)])
def test_every_layout_and_batch_size_writes_the_same(
    ranks: Ranks, tiny_run: TinyRun, store: str, tmp_path: Path, layout: str, rows: int
) -> None:
    output = str(tmp_path / "store")
    ranks(layout).run(write_store, tiny_run, output, rows)
    assert_same_store(output, store)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["store"]


def ask(run: TinyRun, shape: ModelShape, directory: Path, small: Shards) -> None:
    """A bare Megatron-core teacher; the dense one with an attention that runs under context parallelism."""
    directory.mkdir(exist_ok=True)
    _, windows = stored_sources(open_blend(DataConfig(prepared=run.data)), SEQ_LENGTH, SMALL.num_samples)
    core = (build_context_parallel_gpt if shape.num_moe_experts is None else build_gpt)(shape)
    shards = dataclasses.replace(small, directory=directory)
    write_missing(core, windows, shards, micro_batch_size=2)


@pytest.mark.parametrize(
    ("layout", "shape", "small"),
    [("cp2", DENSE, SMALL), ("cp2", DENSE, DRAWN), ("dp2-ep2", EXPERTS, SMALL)],
    ids=["cp2", "cp2-sampled", "dp2-ep2"],
)
def test_context_and_expert_parallel_teachers_write_the_same(
    ranks: Ranks, tiny_run: TinyRun, tmp_path: Path, layout: str, shape: ModelShape, small: Shards
) -> None:
    for each in ("single", layout):  # of three shards, one rank of two runs the last along with the other
        ranks(each).run(ask, tiny_run, shape, tmp_path / each, small)
    for sample in range(small.num_samples):
        expected, found = (
            dataclasses.replace(small, directory=tmp_path / each).read(sample) for each in ("single", layout)
        )
        assert_same_answers(found, expected)


def test_a_run_that_was_cut_off_continues_on_another_layout(
    ranks: Ranks, tiny_run: TinyRun, store: str, tmp_path: Path
) -> None:
    output = tmp_path / "store"
    ranks("dp2").run(write_until_the_first_shard_is_there, tiny_run, str(output))
    shards = tmp_path / "store.shards"
    written = {path.name: path.stat().st_mtime_ns for path in shards.glob("*.bin")}
    assert sorted(written) == ["shard-000000.bin", "shard-000001.bin"] and not output.exists()
    assert len(list(shards.glob("*.partial"))) == 2

    with pytest.raises(ValueError, match=r"shards of a run that was cut off and had format.temperature=1.0, not 2.0"):
        ranks("single").run(write_store, tiny_run, str(output), temperature=2.0)
    ranks("tp2").run(write_store, tiny_run, str(output))
    assert_same_store(str(output), store)
    assert {name: (output / name).stat().st_mtime_ns for name in written} == written  # these were not made again
    assert not shards.exists() and not list(output.glob("*.partial"))


def test_the_manifest_says_what_was_asked_of_whom_about_what(tiny_run: TinyRun, store: str) -> None:
    artifact, data = open_artifact(store), open_artifact(tiny_run.data)
    assert artifact.facts["tokenizer_digest"] == data.facts["tokenizer_digest"]
    assert artifact.facts["teacher"]["digest"] == open_artifact(tiny_run.teacher).digest
    windows = data.facts["sources"][0]["train_tokens"] - 1
    assert artifact.facts["sources"] == [
        {"data": data.digest, "file": "train", "first": 0, "samples": SAMPLES, "spread_over": windows // SEQ_LENGTH}
    ]
    assert artifact.metrics["tokens"] == SAMPLES * SEQ_LENGTH


def test_documents_that_do_not_see_each_other_are_not_stored() -> None:
    data = DataConfig(prepared="data", reset_at_documents=True)
    with pytest.raises(ValueError, match=r"data.reset_at_documents=true cannot be stored: a sample is a window"):
        teacher_logits.TeacherLogitsConfig(data=data)


def test_a_store_that_does_not_fit_on_the_disk_is_not_begun(ranks: Ranks, tiny_run: TinyRun, tmp_path: Path) -> None:
    with full_disk(tmp_path, kibibytes=16) as disk:
        message = (
            rf"teacher_logits.output={disk}/store: 576 tokens at 46 bytes each take 25.9 KiB, and 16.0 KiB are free in "
            rf"{disk}. Lower teacher_logits.k \(7\), set teacher_logits.num_samples, or"
        )
        with pytest.raises(ValueError, match=message):
            ranks("single").run(write_store, tiny_run, str(disk / "store"))
        assert list(disk.iterdir()) == []


# ---- a distillation from it ------------------------------------------------------------------------------------------


def distill_config(run: TinyRun, store: str, output: str, **values: Any) -> distill.DistillConfig:
    config = {
        "teacher": "runs/gone",  # nobody looks for it
        "teacher_logits": store,
        "student": run.student,
        "distillation": DistillationConfig(TOP_K, cross_entropy_weight=0.1),
        "trainer": trainer(),
        "training": TrainingConfig(
            steps=STEPS,
            checkpoint_every=2,
            validation_every=STEPS,
            validation_batches=1,
            optim=OptimConfig(lr=1e-2, min_lr=1e-3, warmup_steps=1),
        ),
        "data": DataConfig(prepared=run.data),
        "output": output,
    }
    return distill.DistillConfig(**config | values)


def run_distill(run: TinyRun, store: str, output: str, *, rows: int = 1, seed: int = 1) -> None:
    data = DataConfig(prepared=run.data, seed=seed)
    distill.run(distill_config(run, store, output, trainer=trainer(micro_batch_size=rows), data=data))


def history(output: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(output) / "history.jsonl").read_text().splitlines()]


def losses(output: str) -> list[float]:
    return [record["loss"] for record in history(output) if "loss" in record]


@pytest.fixture(scope="module")
def distilled(ranks: Ranks, tiny_run: TinyRun, store: str) -> str:
    output = str(tiny_run.directory / "distilled_from_store")
    ranks("single").run(run_distill, tiny_run, store, output)
    return output


def loss_beside_the_teacher(run: TinyRun, store: str, seed: int, samples: list[int]) -> float:
    """Mean over these samples of a run, the teacher in memory."""
    teacher, student = (engine.open_model(path, key="path") for path in (run.teacher, run.student))
    prepare_layout(trainer(), student.shape, seq_length=SEQ_LENGTH, seed=0)
    config = DistillationConfig(TOP_K, cross_entropy_weight=0.1)
    teaching, pupil = (
        engine.open_core(model, trainer(), platform.dtype_of(trainer().precision)) for model in (teacher, student)
    )
    both = TeacherStudent(pupil, LiveTeacher(teaching), config, vocab_size=student.vocab_size).train()
    stored = TeacherStore.open(store, key="store")
    dataset = samples_of(stored, open_blend(DataConfig(prepared=run.data)), seed=seed, with_teacher=False)(
        max(samples) + 1
    )
    total = 0.0
    for index in samples:
        sample = {key: value[None] for key, value in dataset[index].items()}
        loss = both(sample["tokens"], sample["position_ids"], None, sample["labels"])
        total += float(loss.sum / loss.count)
    return total / len(samples)


def test_its_first_loss_is_that_of_the_same_samples_beside_the_teacher(
    ranks: Ranks, tiny_run: TinyRun, store: str, distilled: str
) -> None:
    (expected,) = ranks("single").run(loss_beside_the_teacher, tiny_run, store, 1, [0, 1, 2, 3])
    assert losses(distilled)[0] == pytest.approx(expected, rel=1e-5)
    record = history(distilled)[0]
    assert record["parts"]["divergence"] + 0.1 * record["parts"]["cross_entropy"] == pytest.approx(record["loss"])
    assert "validation_loss" in history(distilled)[-1]
    inputs = {given["stage"] for given in open_artifact(distilled).manifest["inputs"]}
    assert inputs == {"teacher-logits", "prune", "prepare-data"}


@pytest.mark.parametrize(("layout", "rows"), [("dp2", 2), ("pp2", 1)])
def test_its_losses_are_the_same_on_every_layout(
    ranks: Ranks, tiny_run: TinyRun, store: str, distilled: str, tmp_path: Path, layout: str, rows: int
) -> None:
    output = str(tmp_path / "distilled")
    ranks(layout).run(run_distill, tiny_run, store, output, rows=rows)
    assert losses(output) == pytest.approx(losses(distilled), abs=1e-4)


def draws_beside_the_teacher(run: TinyRun, drawn: str) -> dict[str, float]:
    """Mean over all stored samples of the student's divergence from the draws, and from the teacher in memory."""
    teacher, student = (engine.open_model(path, key="path") for path in (run.teacher, run.student))
    prepare_layout(trainer(), student.shape, seq_length=SEQ_LENGTH, seed=0)
    teaching, pupil = (
        engine.open_core(model, trainer(), platform.dtype_of(trainer().precision)) for model in (teacher, student)
    )
    teachers = {"stored": StoredTeacher(), "live": LiveTeacher(teaching)}
    store, blend = TeacherStore.open(drawn, key="store"), open_blend(DataConfig(prepared=run.data))
    dataset = samples_of(store, blend, seed=1, with_teacher=True)(SAMPLES)
    found = {}
    for name, each in teachers.items():
        both = TeacherStudent(pupil, each, DistillationConfig(), vocab_size=student.vocab_size).train()
        losses = []
        for index in range(SAMPLES):
            sample = {key: value[None] for key, value in dataset[index].items()}
            said = {key: sample[key] for key in (STORED_DRAWS if name == "stored" else ())}
            loss = both(sample["tokens"], sample["position_ids"], None, sample["labels"], **said)
            losses.append(float(loss.sum / loss.count))
        found[name] = float(np.mean(losses))
    return found


def test_a_distillation_from_draws_has_the_loss_of_the_live_teacher_on_average(
    ranks: Ranks, tiny_run: TinyRun, drawn: str, tmp_path: Path
) -> None:
    (found,) = ranks("single").run(draws_beside_the_teacher, tiny_run, drawn)
    assert found["stored"] == pytest.approx(found["live"], abs=0.02) and found["stored"] != found["live"]
    output = str(tmp_path / "distilled")
    ranks("dp2").run(run_distill_from_draws, tiny_run, drawn, output)
    assert len(losses(output)) == STEPS and open_artifact(output).facts["vocab_size"] == VOCAB_SIZE


def run_distill_from_draws(run: TinyRun, store: str, output: str) -> None:
    distill.run(distill_config(run, store, output, distillation=DistillationConfig()))


def test_another_seed_goes_through_the_same_samples_in_another_order(tiny_run: TinyRun, store: str) -> None:
    opened, blend = TeacherStore.open(store, key="store"), open_blend(DataConfig(prepared=tiny_run.data))
    orders = []
    for seed in (1, 2):
        dataset = samples_of(opened, blend, seed=seed, with_teacher=True)(2 * SAMPLES)
        texts = [tuple(dataset[index]["tokens"].tolist()) for index in range(2 * SAMPLES)]
        orders += [texts[:SAMPLES], texts[SAMPLES:]]
        answers = {text: dataset[index][LOG_PROBS] for index, text in enumerate(texts)}
        for number in range(SAMPLES):  # each with the teacher's answer on it
            window = tuple(opened_text(opened, tiny_run, number))
            assert torch.equal(answers[window], opened.shards.read(number)[LOG_PROBS])
    assert len({tuple(order) for order in orders}) == 4  # both epochs of both seeds
    assert len({tuple(sorted(order)) for order in orders}) == 1


def test_sources_take_turns_by_weight_and_each_gives_all_its_windows_before_one_again(
    tiny_run: TinyRun, tmp_path: Path
) -> None:
    other = shutil.copytree(tiny_run.data, tmp_path / "data")
    change_manifest(other, lambda manifest: manifest.update(digest="0" * 64))  # as if of another corpus
    parts = [{"path": tiny_run.data, "weight": 3}, {"path": str(other), "weight": 1}]
    sources, windows = stored_sources(open_blend(DataConfig(prepared=parts)), SEQ_LENGTH, 39)
    assert [(source.first, source.samples) for source in sources] == [(0, 30), (30, 10)]  # 29.25 and 9.75, rounded up

    shards = dataclasses.replace(SMALL, num_samples=40)
    short, long = (
        StoredSamples(shards, sources, windows, [3, 1], samples, seed=1, with_teacher=False) for samples in (50, 400)
    )
    assert np.array_equal(short.source_of, long.source_of[:50])  # a longer run begins as a shorter one
    for number, count in ((0, 300), (1, 100)):
        turns = np.flatnonzero(long.source_of == number)
        assert len(turns) == count
        size, windows_there = sources[number].samples, sources[number].spread_over
        assert windows_there is not None and windows_there > size
        for epoch in range(count // size):
            texts = {tuple(long[int(index)]["tokens"].tolist()) for index in turns[epoch * size : (epoch + 1) * size]}
            assert texts == {
                tuple(windows.streams[number].read(place * windows_there // size * SEQ_LENGTH, SEQ_LENGTH))
                for place in range(size)
            }


def test_an_older_store_is_of_the_first_windows(ranks: Ranks, tiny_run: TinyRun, store: str, tmp_path: Path) -> None:
    def forget(manifest: dict[str, Any]) -> None:
        for source in manifest["facts"]["sources"]:
            del source["spread_over"]

    older = shutil.copytree(store, tmp_path / "older")
    change_manifest(older, forget)
    blend = open_blend(DataConfig(prepared=tiny_run.data))
    firsts = []
    for path in (store, older):
        read = samples_of(TeacherStore.open(path, key="store"), blend, seed=1, with_teacher=False)(SAMPLES)
        firsts.append(sorted(read.windows.read(number)["tokens"].tolist() for number in range(SAMPLES)))
    spread, first = firsts
    text = np.fromfile(Path(tiny_run.data) / "train.bin", np.uint16)
    assert first == sorted(text[: SAMPLES * SEQ_LENGTH].reshape(SAMPLES, SEQ_LENGTH).tolist()) != spread


def opened_text(store: TeacherStore, run: TinyRun, number: int) -> list[int]:
    """Of sample `number`, of which there are SAMPLES over the training file, read as one array."""
    tokens = np.fromfile(Path(run.data) / "train.bin", np.uint16)
    first = number * ((len(tokens) - 1) // SEQ_LENGTH) // SAMPLES * SEQ_LENGTH
    return tokens[first : first + SEQ_LENGTH].tolist()


def refused(run: TinyRun, store: str, output: str, **values: Any) -> str:
    with pytest.raises(ValueError) as error:
        distill.run(distill_config(run, store, output, **values))
    return str(error.value)


def refusals(run: TinyRun, store: str, other: dict[str, str], output: str) -> dict[str, str]:
    def of(divergence: DivergenceConfig, **values: Any) -> dict[str, Any]:
        return {"distillation": DistillationConfig(divergence, **values)}

    cases: dict[str, dict[str, Any]] = {
        "k": of(DivergenceConfig(kind="top_k", k=5)),
        "kind": of(DivergenceConfig()),
        "reverse": of(DivergenceConfig(kind="reverse_kl")),
        "temperature": of(dataclasses.replace(TOP_K, temperature=2.0)),
        "softcap": of(dataclasses.replace(TOP_K, teacher_softcap=30.0)),
        "hidden states": of(TOP_K, hidden_states=HiddenStateConfig(enabled=True)),
        "seq_length": {"trainer": trainer(seq_length=16)},
        "teacher": {"teacher": run.student},
        "data": {"data": DataConfig(prepared=other["data"])},
    }
    found = {name: refused(run, store, output, **values) for name, values in cases.items()}
    return found | {name: refused(run, other[name], output) for name in ("tokenizer", "vocabulary")}


def test_what_does_not_fit_the_store_is_named(ranks: Ranks, tiny_run: TinyRun, store: str, tmp_path: Path) -> None:
    def altered(name: str, source: str, *, digest: str | None = None, **changes: Any) -> str:
        def change(manifest: dict[str, Any]) -> None:
            manifest["digest"] = digest or manifest["digest"]
            for key, value in changes.items():
                place, _, last = key.rpartition("__")
                (manifest["facts"][place] if place else manifest["facts"])[last] = value

        change_manifest(shutil.copytree(source, tmp_path / name), change)
        return str(tmp_path / name)

    other = {
        "data": altered("data", tiny_run.data, digest="0" * 64),
        "tokenizer": altered("tokenizer", store, tokenizer_digest="0" * 64),
        "vocabulary": altered("vocabulary", store, format__vocab_size=VOCAB_SIZE + 8),
    }
    (found,) = ranks("single").run(refusals, tiny_run, store, other, str(tmp_path / "distilled"))
    key = "distill.distillation.divergence."
    expected = {
        "k": f"{key}k=5, but distill.teacher_logits={store} was made with 7. Set {key}k=7, or run teacher-logits again",
        "kind": f"{key}kind=forward_kl, but distill.teacher_logits={store} was made with teacher_logits.method=top_k, "
        f"which kind=top_k reads. Set {key}kind=top_k, or run teacher-logits again with the other method.",
        "reverse": "divergence.kind=reverse_kl needs all; use divergence.kind=forward_kl (teacher_logits.method=",
        "temperature": f"{key}temperature=2.0, but distill.teacher_logits={store} was made with 1.0.",
        "softcap": f"{key}teacher_softcap=30.0, but distill.teacher_logits={store} was made with None.",
        "hidden states": "needs the teacher's hidden states, and only a few of its tokens are stored. Set it to false",
        "seq_length": f"trainer.seq_length=16, but distill.teacher_logits={store} was made with 32.",
        "teacher": f"is not the teacher of distill.teacher_logits={store}, which is {tiny_run.teacher} as it was then.",
        "data": f"data.prepared={other['data']} is not the data that distill.teacher_logits={store} was made from.",
        "tokenizer": f"distill.teacher_logits={other['tokenizer']} is of a teacher with another tokenizer",
        "vocabulary": f"another tokenizer: a vocabulary of {VOCAB_SIZE + 8} tokens, the student's has {VOCAB_SIZE}.",
    }
    for name, message in expected.items():
        assert message in found[name], name

"""One rank's step of a distillation in a world of any size: what it sends, holds and waits for, counted.

The step is the product's own: `nemo.trainer.fit` with NeMo's strategy, Megatron's schedule, DDP and distributed
optimizer. Groups are torch's fake ones, which send nothing, and tensors are fake too: they have sizes and no memory, so
that one process takes itself for one rank of a thousand at a model's full size.

    python -m support.fake_ranks '[{"teacher": {...}, "student": {...}, "trainer": {...}, "world": 64, "rank": 0}, ...]'

prints as JSON what `count` says of each, one process a case. What differs from a run:

    values        there are none; where the host reads one it is told 1, and 0 where the ranks ask whether to stop
    rank 0        of what it says to all only the call is counted, as with objects that all gather; its work is done
    weights       are not read; samples are zeros
    CPU           no transformer-engine, so no context parallelism; attention keeps what torch's fused one does
"""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import sys
import tempfile
import time
import traceback
import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from minitron_nemo.cli import set_up_environment

set_up_environment()

import lightning.pytorch as pl  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from megatron.core.optimizer import clip_grads  # noqa: E402
from nemo.lightning.data import WrappedDataLoader  # noqa: E402
from nemo.lightning.pytorch.plugins import MegatronDataSampler  # noqa: E402
from torch import Tensor  # noqa: E402
from torch._C._distributed_c10d import FakeWork  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode  # noqa: E402
from torch.testing._internal.distributed import fake_pg  # noqa: E402, F401  (registers the backend)
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

from minitron_nemo import platform  # noqa: E402
from minitron_nemo.config.data import DataConfig  # noqa: E402
from minitron_nemo.config.distillation import DistillationConfig, HiddenStateConfig  # noqa: E402
from minitron_nemo.config.trainer import TrainerConfig  # noqa: E402
from minitron_nemo.config.training import OptimConfig, TrainingConfig  # noqa: E402
from minitron_nemo.distillation.teacher import TeacherAtHand  # noqa: E402
from minitron_nemo.divergence import token_rows  # noqa: E402
from minitron_nemo.nemo import distillation, implementation, survival, trainer  # noqa: E402
from minitron_nemo.quiet import hush  # noqa: E402
from minitron_nemo.runtime.layout import prepare_layout  # noqa: E402
from minitron_nemo.runtime.training_run import Trainee, TrainingRun  # noqa: E402
from minitron_nemo.shape import ModelShape  # noqa: E402

RANKS_PER_NODE = 8
STEPS = 2  # the first one makes the moments, the second is counted

KINDS = {
    "allreduce": "all-reduce",
    "allgather": "all-gather",
    "reduce_scatter": "reduce-scatter",
    "broadcast": "broadcast",
    "send": "send",
    "recv": "receive",
    "barrier": "barrier",
}
"""How names of torch's own operators begin -> what is counted under one name."""

GROUPS = {
    "TENSOR_MODEL_PARALLEL_GROUP": "tp",
    "PIPELINE_MODEL_PARALLEL_GROUP": "pp",
    "DATA_PARALLEL_GROUP": "dp",
    "DATA_PARALLEL_GROUP_WITH_CP": "dp",
    "INTRA_DISTRIBUTED_OPTIMIZER_INSTANCE_GROUP": "world",
    "default_pg": "world",
}
"""Names that Megatron-core gives its groups; with one instance of the distributed optimizer that is all ranks."""

ON_THE_HOST = ("optimizer.py", "random.py")
"""What Megatron-core reads of tensors that are on the host everywhere: Adam's steps, states of random generators."""


class Counted(TorchDispatchMode):
    """Collectives, live bytes and values read by the host, of what runs inside."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[tuple[str, str]] = Counter()
        """(group, kind) -> how often."""
        self.bytes: Counter[tuple[str, str]] = Counter()
        """(group, kind) -> bytes of the whole message on this rank: the larger one of what goes in and comes out."""
        self.reads: Counter[str] = Counter()
        """Line of code -> values that the host waited for there."""
        self.live = self.peak = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def begin(self) -> None:
        """Forget what was counted; the peak becomes what is live."""
        self.calls.clear(), self.bytes.clear(), self.reads.clear()
        self.peak = self.live

    def add(self, group: str, kind: str, size: int) -> None:
        self.calls[group, kind] += 1
        self.bytes[group, kind] += size

    def sent(self) -> dict[str, dict[str, list[int]]]:
        """Group -> kind -> [calls, bytes]."""
        found: dict[str, dict[str, list[int]]] = {}
        for (group, kind), calls in sorted(self.calls.items()):
            found.setdefault(group, {})[kind] = [calls, self.bytes[group, kind]]
        return found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return self._read(args[0])
        if func.namespace == "c10d":
            return self._send(func, args)
        found = func(*args, **kwargs or {})
        for tensor in tree_leaves(found):
            if isinstance(tensor, Tensor):
                self._hold(tensor.untyped_storage())
        return found

    def _hold(self, storage: Any) -> None:
        if storage in self._known:
            return
        self._known.add(storage)
        size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._release, size)

    def _release(self, size: int) -> None:
        self.live -= size

    def _send(self, func: Any, args: Any) -> Any:
        group = dist.ProcessGroup.unbox(next(each for each in args if isinstance(each, torch.ScriptObject)))
        kind = func.__name__.removeprefix("_")
        kind = next((name for begins, name in KINDS.items() if kind.startswith(begins)), kind)
        sides = [[each for each in tree_leaves(arg) if isinstance(each, Tensor)] for arg in args[:2]]
        self.add(name_of(group), kind, max(sum(each.nbytes for each in side) for side in sides))
        work = FakeWork().boxed()
        return (args[0], work) if len(func._schema.returns) == 2 else work

    def _read(self, value: Tensor) -> float | int:
        lines = [each for each in traceback.extract_stack() if _is_library(each.filename)]
        file, line = Path(lines[-1].filename).name, lines[-1].lineno
        if file not in ON_THE_HOST:
            self.reads[f"{file}:{line}"] += 1
        return 0 if file == Path(survival.__file__).name else 1


def _is_library(file: str) -> bool:
    return any(f"/{name}/" in file for name in ("megatron", "minitron_nemo", "nemo")) and "/platform/" not in file


def name_of(group: Any) -> str:
    return GROUPS.get(group.group_desc, group.group_desc.lower())


class Store(dist.Store):
    """Where ranks meet: this one finds that whatever it waits for has come."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: Counter[str] = Counter()
        self._counts: Counter[str] = Counter()

    def set(self, key: str, value: Any) -> None:
        self.asked[f"set {key}"] += 1

    def add(self, key: str, number: int) -> int:
        self.asked[f"add {key}"] += 1
        self._counts[key] += number
        return self._counts[key]

    def check(self, keys: Sequence[str]) -> bool:
        self.asked[f"check {keys[0]}"] += 1
        return True


class Zeros(torch.utils.data.Dataset):
    """Samples of one length."""

    def __init__(self, samples: int, seq_length: int) -> None:
        self._samples, self._seq_length = samples, seq_length

    def __len__(self) -> int:
        return self._samples

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        kinds = dict.fromkeys(("tokens", "labels", "position_ids"), torch.int64) | {"loss_mask": torch.float32}
        return {name: torch.zeros(self._seq_length, dtype=dtype) for name, dtype in kinds.items()}


class Data(pl.LightningDataModule):
    """Stands for `PackedDataModule`: NeMo's own sampler over samples that are no text."""

    sources = ()

    def __init__(self, config: TrainerConfig) -> None:
        super().__init__()
        self.config = config
        sizes = {"micro_batch_size": config.micro_batch_size, "global_batch_size": config.global_batch_size}
        self.data_sampler = MegatronDataSampler(seq_len=config.seq_length, output_log=False, **sizes)

    def train_dataloader(self) -> WrappedDataLoader:
        samples = Zeros(STEPS * self.config.global_batch_size, self.config.seq_length)
        return WrappedDataLoader(mode="train", dataset=samples, num_workers=0)


def count(case: dict[str, Any]) -> dict[str, Any]:
    """What rank `rank` of `world` does in a step, and before the first one.

    Args:
        case: teacher and student (fields of ModelShape), trainer (fields of TrainerConfig), world, rank.
    Returns:
        sent        group -> kind -> [calls, bytes of the whole messages], of one step
        start       the same, of everything before the first step
        reads       line -> values that the host waited for, of one step
        held        bytes before the step: weights, gradients, moments
        activations bytes at the step's peak, beyond those
        seconds     of this process's CPU time, of one step
        groups_seconds   the same, of building the groups
        backends    of the groups that were built
        store       questions to the store that the ranks met at
    """
    os.environ["LOCAL_WORLD_SIZE"] = str(RANKS_PER_NODE)
    platform.activate()
    hush()
    teacher, student = ModelShape.from_dict(case["teacher"]), ModelShape.from_dict(case["student"])
    config = TrainerConfig(**case["trainer"], precision="bf16", tensorboard=False)
    counted, store, found = Counted(), Store(), {}
    dist.init_process_group("fake", store=store, rank=case["rank"], world_size=case["world"])
    began = time.process_time()
    prepare_layout(config, student, seq_length=config.seq_length)
    found["groups_seconds"] = time.process_time() - began
    found["backends"] = sorted({name for name, _ in dist.distributed_c10d._world.pg_map.values()})
    with (
        tempfile.TemporaryDirectory() as directory,
        _stand_ins(counted),
        FakeTensorMode(allow_non_fake_inputs=True),
        counted,
    ):
        hidden = DistillationConfig(hidden_states=HiddenStateConfig(enabled=True))
        here = Path(directory)
        trainee = Trainee(
            student,
            here,
            student.padded_vocab_size,
            weights=here,
            teacher=TeacherAtHand(teacher, here),
            distillation=hidden,
        )
        training = TrainingConfig(steps=STEPS, checkpoint_every=0, optim=OptimConfig(warmup_steps=0))
        run = TrainingRun(trainee, DataConfig(), config, training, here / "run", "distillation")
        with patch.object(trainer, "StopWhenAsked", _steps_into(found, counted)):
            trainer.fit(implementation._model(run), Data(config), run)  # type: ignore[arg-type]
    return found | {"store": dict(store.asked)}


def _steps_into(found: dict[str, Any], counted: Counted) -> type[survival.StopWhenAsked]:
    """The last callback of a training that begins and ends a step; it leaves the last step's numbers in `found`."""

    class Steps(survival.StopWhenAsked):
        def on_train_batch_start(self, *_: Any) -> None:
            found.setdefault("start", counted.sent())
            counted.begin()
            found["held"], self.began = counted.live, time.process_time()

        def on_train_batch_end(self, *given: Any) -> None:
            super().on_train_batch_end(*given)
            found["seconds"] = time.process_time() - self.began
            found["activations"] = counted.peak - found["held"]
            found["sent"], found["reads"] = counted.sent(), dict(counted.reads)

    return Steps


@contextmanager
def _stand_ins(counted: Counted) -> Iterator[None]:
    """What is put in the place of functions that need values, memory or other ranks."""

    def group_of(group: Any) -> str:
        return "world" if group is None else name_of(group)

    def broadcast_object_list(objects: list[Any], *_: Any, group: Any = None, **__: Any) -> None:
        counted.add(group_of(group), "broadcast of objects", len(pickle.dumps(objects)))

    def all_gather_object(objects: list[Any], mine: Any, group: Any = None) -> None:
        objects[:] = [mine] * len(objects)
        counted.add(group_of(group), "all-gather of objects", len(pickle.dumps(mine)) * len(objects))

    def l2_norm(chunk: int, flag: Tensor, tensors: list[list[Tensor]], *_: Any) -> tuple[Tensor, None]:
        return torch.stack([each.norm() for each in tensors[0]]).norm().view(1), None

    def swap_tensors(kept: Tensor, other: Tensor) -> None:
        kept.data = other.data

    places: list[tuple[Any, str, Any]] = [
        (dist, "broadcast_object_list", broadcast_object_list),
        (dist, "all_gather_object", all_gather_object),
        (distillation, "load_weights", lambda *_: None),
        (platform, "supports_distributed_optimizer", lambda: True),
        (token_rows, "CPU_CHUNK_ELEMENTS_OF_RANKS", token_rows.CHUNK_ELEMENTS),  # as on an accelerator
        (clip_grads, "l2_norm_impl", l2_norm),  # Megatron's own for a CPU reads a list of tensors in one go
        (torch.utils, "swap_tensors", swap_tensors),  # of fake tensors there are weak references
        (FakeTensor, "__deepcopy__", lambda self, memo: self.detach().clone()),
    ]
    with ExitStack() as stack:
        for owner, name, stand_in in places:
            stack.enter_context(patch.object(owner, name, stand_in, create=name == "__deepcopy__"))
        yield


def count_each(cases: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """`count` of one case after the other, each in a process of its own: Megatron and NeMo keep much in modules."""
    with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:
        yield from pool.imap(count, cases)


if __name__ == "__main__":
    print("\n" + json.dumps(list(count_each(json.loads(sys.argv[1])))))

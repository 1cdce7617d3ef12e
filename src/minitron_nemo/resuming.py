"""What a stage that was told to stop has done so far, kept beside its output until that is whole.

    <output>.unfinished/
        made_by.json              config, inputs and number of ranks: another run does not go on there, but begins anew
        rank-00003.safetensors    the sums of each pass on this rank, and of how many micro-batches they are
        records.json              what parts of the stage that are over have found, kept at once, against a kill too

    unfinished = Unfinished(output, config, inputs)
    one_pass = unfinished.one_pass("importance")
    for done, batch in left_of(one_pass, batches, total, estimator):   # the estimator has the sums of those before
        ...                                              # after it: Interrupted where the run was told to stop

Sums are kept as they are, in float64 where they are added so, so that a pass that goes on ends to the bit where an
undisturbed one does. A pass that is over is kept with the others, for a later pass of the same stage may be stopped.

Communication: all ranks, to look, to ask now and then (`stopping.py`), and to leave.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, Protocol, TypeVar

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from minitron_nemo.artifact import Artifact, saying_when_full
from minitron_nemo.checks import Interrupted, NothingKept
from minitron_nemo.config.identity import as_dict, differences
from minitron_nemo.parallel import barrier, rank, rank_zero_works, world_size
from minitron_nemo.stopping import Stop

T = TypeVar("T")

_MADE_BY, _RECORDS = "made_by.json", "records.json"


class Sums(Protocol):
    """What grows from micro-batch to micro-batch on this rank."""

    def sums(self) -> dict[str, Tensor]:
        """All of it, as it is after a micro-batch. May communicate; every rank is asked."""
        ...

    def restore(self, sums: Mapping[str, Tensor]) -> None:
        """Go on from there."""
        ...


class Unfinished:
    """The passes of one stage's run, see the module's text; every rank makes one and gets the same answers."""

    def __init__(self, output: Path, config: Any, inputs: Sequence[Artifact]) -> None:
        """
        Args:
            config: the stage's dataclass. All of it counts, how the run is spread over ranks too.
        """
        self.output, self.directory = output, output.with_name(output.name + ".unfinished")
        self._made_by = {
            "config": as_dict(config),
            "inputs": [artifact.digest for artifact in inputs],
            "ranks": world_size(),
        }
        self.passes: dict[str, tuple[int, dict[str, Tensor]]] = {}
        """By name of a pass, micro-batches done and their sums, on the host."""
        self.records: dict[str, Any] = {}
        """By name, plain data that a finished part of the stage has found; see `keep`."""
        if rank_zero_works(self._goes_on):
            self._read()

    def one_pass(self, name: str) -> OnePass:
        return OnePass(name, self)

    def leave(self, message: str) -> NoReturn:
        """Keep what `passes` holds and stop. Communicates: all ranks. Raises: Interrupted."""
        partial = self.directory.with_name(self.directory.name + ".partial")

        def make() -> None:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)

        def put_in_place() -> None:
            (partial / _MADE_BY).write_text(json.dumps(self._made_by))
            self._write_records(partial)
            shutil.rmtree(self.directory, ignore_errors=True)
            partial.rename(self.directory)

        with saying_when_full(self.output):
            rank_zero_works(make)
            tensors = {
                f"{name}/{key}": tensor.detach().clone(memory_format=torch.contiguous_format)
                for name, (_, sums) in self.passes.items()
                for key, tensor in sums.items()
            }
            done = json.dumps({name: done for name, (done, _) in self.passes.items()})
            save_file(tensors, partial / _file_of_rank(), metadata={"done": done})
            barrier()
            rank_zero_works(put_in_place)
        raise Interrupted(f"{message}; it is kept in {self.directory}. The same command goes on there.")

    def keep(self, name: str, record: Any) -> None:
        """Keep plain data of a part of the stage that is over; a kill does not lose it. Rank 0 alone calls."""
        self.records[name] = record
        with saying_when_full(self.output):
            self.directory.mkdir(parents=True, exist_ok=True)
            self._write_records(self.directory)
            (self.directory / _MADE_BY).write_text(json.dumps(self._made_by))

    def _write_records(self, directory: Path) -> None:
        partial = directory / f"{_RECORDS}.partial"
        partial.write_text(json.dumps(self.records))
        partial.rename(directory / _RECORDS)

    def clear(self) -> None:
        """The output is whole. Communicates: all ranks."""
        rank_zero_works(lambda: shutil.rmtree(self.directory, ignore_errors=True))

    def _goes_on(self) -> bool:
        file = self.directory / _MADE_BY
        if not file.is_file():
            return False
        for key, then, now in differences(json.loads(file.read_text()), self._made_by):
            said = f"was begun with {key.removeprefix('config.')}={then}, not {now}: it begins anew"
            print(f"{self.output} {said}.", file=sys.stderr, flush=True)
            shutil.rmtree(self.directory)
            return False
        print(f"{self.output} goes on where it was stopped.", file=sys.stderr, flush=True)
        return True

    def _read(self) -> None:
        if (self.directory / _RECORDS).is_file():
            self.records = json.loads((self.directory / _RECORDS).read_text())
        if not (self.directory / _file_of_rank()).is_file():
            return  # it was killed, and kept records alone
        with safe_open(self.directory / _file_of_rank(), framework="pt") as file:
            done = json.loads(file.metadata()["done"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (it is no dict)
        for name, micro_batches in done.items():
            mine = {key.removeprefix(f"{name}/"): each for key, each in tensors.items() if key.startswith(f"{name}/")}
            self.passes[name] = micro_batches, mine


class OnePass:
    """One pass over micro-batches that can be stopped after any of them."""

    def __init__(self, name: str, unfinished: Unfinished | None = None) -> None:
        """
        Args:
            name: no other pass of the stage has it; for messages too.
            unfinished: where it is kept; None: it begins anew.
        """
        self.name, self._unfinished = name, unfinished
        self._sums: Sequence[Sums] = ()
        self._stop = Stop()

    def begin(self, sums: Sequence[Sums]) -> int:
        """Micro-batches that are done already; `sums` are as they were then."""
        self._sums = sums
        if self._unfinished is None or self.name not in self._unfinished.passes:
            return 0
        done, kept = self._unfinished.passes[self.name]
        for place, each in enumerate(sums):
            start = f"{place}."
            each.restore({key.removeprefix(start): kept[key] for key in kept if key.startswith(start)})
        return done

    def after(self, done: int, total: int) -> None:
        """To be called when `done` of `total` micro-batches are done.

        Communicates: now and then all ranks, see `Stop`; what `sums` does where the pass ends or is stopped.
        Raises: Interrupted, on every rank: the run was told to stop.
        """
        if done >= total:
            self._keep(done)
        elif self._stop.asked():
            self._keep(done)
            message = f"stopped after {done} of {total} micro-batches ({self.name}), as it was asked to"
            if self._unfinished is not None:
                self._unfinished.leave(message)
            raise NothingKept(f"{message}. What it had done is not kept: the same command begins anew.")

    def _keep(self, done: int) -> None:
        if self._unfinished is not None:
            kept = {
                f"{place}.{key}": t.cpu() for place, each in enumerate(self._sums) for key, t in each.sums().items()
            }
            self._unfinished.passes[self.name] = done, kept


def left_of(one_pass: OnePass | None, batches: Iterable[T], total: int, *sums: Sums) -> Iterator[tuple[int, T]]:
    """The micro-batches that are not done already, each with its number from 1; `sums` are as they were before them.

    Args:
        one_pass: lets the run be stopped after any of them; None: it goes to its end.
        total: number of all.
    Communicates: as `OnePass.after`. Raises: Interrupted, on every rank: the run was told to stop.
    """
    begun = 0 if one_pass is None else one_pass.begin(sums)
    for done, batch in enumerate(batches, start=1):
        if done > begun:
            yield done, batch
            if one_pass is not None:
                one_pass.after(done, total)


def _file_of_rank() -> str:
    return f"rank-{rank():05d}.safetensors"

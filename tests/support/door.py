"""The doors as a user meets them: one process that has imported everything once and runs command after command.

    done = door("prune", "recipe=quickstart", "prune.target.hidden_size=999")
    done.code, done.out, done.err

A command is what follows `minitron` on the command line. It runs through `minitron_nemo.cli.main` in the process that
ran the commands before it, as the steps of a chain do, with its standard output and error kept apart by descriptor, so
what libraries print counts too.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from support.patience import LOOK_SECONDS, Patience, end, run_patiently

TESTS = Path(__file__).resolve().parents[1]
ROOT = TESTS.parent
_OF_A_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Done:
    """What a command left on the screen."""

    code: int
    out: str
    err: str

    @property
    def mistake(self) -> str:
        """The one message of a command that was refused."""
        assert self.code == 2, f"exit code {self.code}, not 2\n{self.out}\n{self.err}"
        assert "Traceback" not in self.err + self.out, self.err + self.out
        said = re.findall(r"^minitron[a-z -]*: .*(?:\n.*)*", self.err, flags=re.MULTILINE)
        assert len(said) == 1, self.err
        return said[0]


def environment() -> dict[str, str]:
    """A user's environment: this checkout's sources, nothing of a launcher, one thread a process."""
    variables = {name: value for name, value in os.environ.items() if name not in _OF_A_LAUNCHER}
    return variables | {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(TESTS)]), "OMP_NUM_THREADS": "1"}


def minitron(*command: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """A command in a process of its own, as a shell runs it; what it submits inherits its environment."""
    arguments = [sys.executable, "-m", "minitron_nemo.cli", *command]
    return run_patiently(arguments, env=environment(), **{"stderr": subprocess.PIPE} | options)


_TOLD_BY = "told to stop by "


class Door:
    """The warm process; started by the first command."""

    def __init__(self) -> None:
        self._home = tempfile.TemporaryDirectory()
        self._process: subprocess.Popen[bytes] | None = None
        self._requests: IO[str] | None = None
        self._answers: IO[str] | None = None

    def __call__(self, *command: str) -> Done:
        if self._process is None or self._process.poll() is not None:
            self._start()
        assert self._requests is not None and self._answers is not None
        self._requests.write(json.dumps(command) + "\n")
        self._requests.flush()
        patience = Patience([self._process.pid])
        while not select.select([self._answers], [], [], LOOK_SECONDS)[0]:
            if patience.over():
                end(self._process)
                raise TimeoutError(f"minitron {' '.join(command)} has done nothing for {patience.quiet_seconds:g} s")
        answer = self._answers.readline()
        assert answer, f"the process ended while it ran: minitron {' '.join(command)}"
        return Done(**json.loads(answer))

    def told_to_stop(self, *command: str, by: signal.Signals = signal.SIGUSR1) -> Done:
        """The command, whose process is sent the signal as soon as it listens for it."""
        return self(f"{_TOLD_BY}{by.value}", *command)

    def _start(self) -> None:
        request_read, request_write = os.pipe()
        answer_read, answer_write = os.pipe()
        self._process = subprocess.Popen(
            # by module name: a script's own directory on the path would hide megatron behind support/megatron.py
            [sys.executable, "-m", "support.door", str(request_read), str(answer_write)],
            stdin=subprocess.DEVNULL,
            env=environment(),
            cwd=self._home.name,
            start_new_session=True,
            pass_fds=(request_read, answer_write),
        )
        os.close(request_read)
        os.close(answer_write)
        self._requests, self._answers = os.fdopen(request_write, "w"), os.fdopen(answer_read)

    @property
    def working_directory(self) -> Path:
        return Path(self._home.name)

    def close(self) -> None:
        if self._process is None:
            return
        for pipe in (self._requests, self._answers):
            if pipe is not None:
                pipe.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=10)
        end(self._process)
        self._process = None
        self._home.cleanup()


# ---- the warm process's side -----------------------------------------------------------------------------------------


def _send_when_heard(by: signal.Signals) -> None:
    """This process sends itself the signal once it has put a handler in its place."""
    put = signal.signal

    def put_and_send(number: int, handler: Any) -> Any:
        before = put(number, handler)
        if number == by:
            signal.signal = put
            os.kill(os.getpid(), by)
        return before

    signal.signal = put_and_send


def _serve(requests: IO[str], answers: IO[str]) -> None:
    for line in requests:
        answers.write(json.dumps(_run(json.loads(line))) + "\n")
        answers.flush()


def _run(command: list[str]) -> dict[str, int | str]:
    from minitron_nemo.cli import main

    if command[0].startswith(_TOLD_BY):
        _send_when_heard(signal.Signals(int(command.pop(0).removeprefix(_TOLD_BY))))
    saved = [os.dup(1), os.dup(2)]
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        try:
            code = main(command)
        except SystemExit as leaving:
            code = leaving.code if isinstance(leaving.code, int) else 1
        except BaseException:
            traceback.print_exc()
            code = 1
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for descriptor, original in zip((1, 2), saved, strict=True):
                os.dup2(original, descriptor)
                os.close(original)
        out.seek(0)
        err.seek(0)
        return {"code": code, "out": out.read().decode(), "err": err.read().decode()}


if __name__ == "__main__":  # Megatron-core's checkpoint writer starts processes that read this file again
    try:
        _serve(os.fdopen(int(sys.argv[1])), os.fdopen(int(sys.argv[2]), "w"))
    finally:  # nobody asks any more, or nobody hears
        os.killpg(0, signal.SIGKILL)  # what it started too; without the libraries' farewells, which take ten seconds


def started_until_there(file: Path, command: list[str]) -> subprocess.Popen[bytes]:
    """A command in a process of its own, which runs on when `file`, a pattern, stands or when it has ended."""
    process = subprocess.Popen(
        [sys.executable, "-m", "minitron_nemo.cli", *command],
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    patience = Patience([process.pid])
    while not _any_there(file) and process.poll() is None and not patience.over():
        time.sleep(0.005)
    return process


def kill_once_there(file: Path, command: list[str]) -> None:
    """Run a command in a process of its own and kill it, without a word, as soon as `file`, a pattern, stands."""
    process = started_until_there(file, command)
    end(process)
    _, said = process.communicate()
    assert process.returncode == -signal.SIGKILL and _any_there(file), said.decode()


def _any_there(file: Path) -> bool:
    return any(Path(file.anchor).glob(str(file.relative_to(file.anchor))))

"""How a run of several ranks ends when one of them cannot go on: all at once, with one message.

    who cannot go on    says why (`say_once`) and tells the others (`tell`) through the store where the ranks met
    the others          hear of it within a second (`listen`), also where no error reaches them, and end with its exit
                        code: in a collective whose other end is gone, which NCCL waits for until its time-out, or in
                        long work of their own

`torchrun` ends the ranks of the node where one has left; those of other nodes learn it here. A process alone has no
store, and nothing of this touches it. torchrun's own exit code says only that some rank's was not 0, so for whoever
started it what became of the run stands in a file (`leave_word`).
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

_SAID, _SPEAKERS, _LEFT = (f"minitron_nemo/{name}" for name in ("said", "speakers", "left"))
_RANK_ZERO_SPEAKS_FIRST = 3.0  # seconds: what all ranks met, they met together, and its message names no rank
_NOBODY_TO_ASK = 30.0  # seconds, where the ranks have not met: a mistake in the command, which rank 0 reads too
_LOOKS_EVERY = 1.0
_TO_LEAVE = 10.0  # seconds that a rank has to end by itself, before it is ended where it stands

STATE_FILE = "MINITRON_STATE_FILE"
"""Environment variable that names the file of the run's last word; slurm/stage.sbatch queues a job again by it."""
RUNNING, STOPPED, FAILED = "running", "stopped", "failed"

_listening: threading.Event | None = None


def leave_word(state: str) -> None:
    """Write what became of the run, where somebody asked for it.

    Args:
        state: RUNNING: it began, and was killed if nothing else follows. STOPPED: it was told to stop, and the same
            command goes on. Of these rank 0 speaks. FAILED: the same command would fail again; whoever met it says so.
    """
    file = os.environ.get(STATE_FILE)
    if file is None or (state != FAILED and int(os.environ.get("RANK", 0)) > 0):
        return
    place = Path(file)
    with contextlib.suppress(OSError):  # a disk that is full has its own message
        if state != RUNNING or not place.exists():  # another rank may have failed meanwhile
            place.write_text(state)


def is_of_lost_rank(error: BaseException) -> bool:
    """As `parallel.is_of_lost_rank`; False where nothing has met yet, and torch may not even be imported."""
    if "torch.distributed" not in sys.modules:
        return False
    from minitron_nemo import parallel

    return parallel.is_of_lost_rank(error)


def say_once(message: str) -> None:
    """Print a message that several ranks may have for the run: on the one that is first, rank 0 where it has it too."""
    rank, store = int(os.environ.get("RANK", 0)), _store()
    if rank > 0:
        waits_until = time.monotonic() + (_NOBODY_TO_ASK if store is None else _RANK_ZERO_SPEAKS_FIRST)
        while time.monotonic() < waits_until and not (store is not None and store.check([_SAID])):
            time.sleep(0.05)
        message = f"rank {rank}: {message}"
    if store is not None and store.add(_SPEAKERS, 1) > 1:
        return
    print(message, file=sys.stderr, flush=True)
    if store is not None:
        store.set(_SAID, "")


def tell(code: int) -> None:
    """The other ranks end with this exit code; the first to say so counts."""
    stop_listening()
    if (store := _store()) is not None:
        with contextlib.suppress(RuntimeError):  # the store has gone with its node: nobody is left to hear
            store.compare_set(_LEFT, "", str(code))


def told() -> int | None:
    """The exit code that another rank has told; None where none has."""
    store = _store()
    with contextlib.suppress(RuntimeError):
        if store is not None and store.check([_LEFT]):
            return int(store.get(_LEFT))
    return None


def listen() -> None:
    """End this process when another rank has told that it left; in a thread, until `stop_listening`."""
    global _listening
    if _listening is None and (store := _store()) is not None:
        _listening = threading.Event()
        threading.Thread(target=_hear, args=(store.clone(), _listening), daemon=True).start()


def stop_listening() -> None:
    global _listening
    if _listening is not None:
        _listening.set()
        _listening = None


def _hear(store: Any, stopped: threading.Event) -> None:
    """`store`: a connection of this thread's own, as the main thread may be waiting on the other."""
    try:
        while not stopped.wait(_LOOKS_EVERY):
            if store.check([_LEFT]):
                code = int(store.get(_LEFT))
                if not stopped.wait(_TO_LEAVE):
                    os._exit(code)
    except RuntimeError:
        return  # the store has gone with its node; what the main thread does next fails


def _store() -> Any:
    """Through which the ranks met; None where they have not, and torch may not even be imported."""
    if "torch.distributed" not in sys.modules:
        return None
    from minitron_nemo.parallel import default_store, world_size

    return default_store() if world_size() > 1 else None

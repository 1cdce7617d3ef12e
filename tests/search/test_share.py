"""Several processes make one thing together: each part once, whoever comes, leaves or dies."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from threading import Timer

import pytest

from minitron_nemo.checks import Interrupted, Mistake
from minitron_nemo.run_record import JOB
from minitron_nemo.search.ledger import Ledger
from minitron_nemo.search.share import Share, locked
from support.door import environment

NAMES = [f"part {number}" for number in range(5)]
MADE_BY = {"seed": 1}
HOLDS = """
import sys, time
from pathlib import Path
from minitron_nemo.search.share import Share
def make(name):
    print(name, flush=True)
    time.sleep(1000)
Share(Path(sys.argv[1])).out(sys.argv[2:], made=list, make=make)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process, which works on the first part and does not come to an end."""
    command = [sys.executable, "-c", HOLDS, str(tmp_path), *NAMES]
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == f"{NAMES[0]}\n"
    yield process
    process.kill()
    process.communicate()


def make_all(directory: Path) -> list[str]:
    """What this process makes of the parts, as it makes them."""
    ledger, made = Ledger(directory / "made.json", MADE_BY), []

    def make(name: str) -> None:
        made.append(name)
        ledger.put(name, {"loss": 0.1})

    Share(directory).out(NAMES, made=ledger.look, make=make)
    return made


def test_each_part_is_made_once_and_what_a_killed_process_held_by_another(
    holder: subprocess.Popen[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "stop").touch()
    with monkeypatch.context() as job:
        job.setenv("MINITRON_STOP_FILE", str(tmp_path / "stop"))
        with pytest.raises(Interrupted, match=f"others work on {NAMES[0]}. The same command goes on."):
            make_all(tmp_path)
    said = capsys.readouterr().err
    assert f"waiting for {NAMES[0]} (" in said and f", process {holder.pid})" in said
    assert sorted(json.loads((tmp_path / "made.json").read_text())["entries"]) == NAMES[1:]

    Timer(0.5, holder.kill).start()
    assert make_all(tmp_path) == [NAMES[0]]
    assert make_all(tmp_path) == [], "who comes late finds all made"


def test_a_process_that_shares_but_makes_something_else_is_told(tmp_path: Path) -> None:
    ours = Ledger(tmp_path / "made.json", MADE_BY)
    ours.put(NAMES[0], {"loss": 0.1})
    Ledger(tmp_path / "made.json", {"seed": 2}).put(NAMES[0], {"loss": 0.2})
    with pytest.raises(Mistake, match=r"made.json was begun anew with seed=2, not 1, .* need the same command"):
        ours.look()


def test_a_disk_without_locks_keeps_nobody_out_and_is_refused_to_an_array(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("minitron_nemo.search.share.fcntl.lockf", no_locks)
    monkeypatch.setenv(JOB, "17")
    alone = locked(tmp_path / "search" / "one", wait=False)
    assert alone is not None
    alone.close()
    assert (tmp_path / "search" / "one").read_text().endswith(", job 17")
    monkeypatch.setenv(JOB, "17_1")
    with pytest.raises(Mistake, match=r"without locks \(No locks available\), so the jobs of an array cannot share"):
        locked(tmp_path / "search" / "one", wait=False)

"""What tests wait for: processes at work, not a time by the clock."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from support.patience import Patience, end, run_patiently

WORK_BY_A_CHILD = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'while True: pass'])"


def wait(code: str, at_most: float) -> bool:
    """Whether patience with this program, of 2 s, is over within `at_most` seconds."""
    with subprocess.Popen([sys.executable, "-c", code], start_new_session=True) as process:
        try:
            patience, until = Patience([process.pid], quiet_seconds=2.0), time.monotonic() + at_most
            while time.monotonic() < until:
                if patience.over():
                    return True
                time.sleep(0.1)
            return False
        finally:
            end(process)


@pytest.mark.parametrize("code", ["while True: pass", WORK_BY_A_CHILD], ids=["itself", "its child"])
def test_a_process_at_work_is_waited_for(code: str) -> None:
    assert not wait(code, at_most=7)


@pytest.mark.parametrize("code", ["import time; time.sleep(600)", "pass"], ids=["asleep", "ended"])
def test_a_process_that_does_nothing_is_not(code: str) -> None:
    assert wait(code, at_most=600)


def test_nothing_is_left_of_a_command_that_ended_without_its_children() -> None:
    child = "[sys.executable, '-c', 'import time; time.sleep(600)'], stdout=subprocess.DEVNULL"
    done = run_patiently([sys.executable, "-c", f"import subprocess, sys; print(subprocess.Popen({child}).pid)"])
    stat = Path("/proc", done.stdout.strip(), "stat")
    while stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z":
        time.sleep(0.1)  # a killed process takes a moment to go


def test_a_command_that_hangs_is_ended_and_what_it_said_is_shown() -> None:
    code = "import time; print('so far', flush=True); time.sleep(600)"
    with pytest.raises(TimeoutError, match=r"did nothing for 2 s:\nso far"):
        run_patiently([sys.executable, "-c", code], quiet_seconds=2.0)


def test_a_command_that_ends_is_answered_with_what_it_said() -> None:
    done = run_patiently([sys.executable, "-c", "print('said'); raise SystemExit(3)"])
    assert (done.returncode, done.stdout) == (3, "said\n")

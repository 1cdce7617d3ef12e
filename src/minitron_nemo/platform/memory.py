"""Memory of this process on its device, in bytes: held now, highest so far, and what is still to be had.

On a CPU that is the process's resident set and so everything in it; a measurement is the difference to what was held
before. On an accelerator it is what torch has allocated there.
"""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path

import torch

from minitron_nemo.platform import has_accelerator

_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


def held_bytes() -> int:
    return torch.cuda.memory_allocated() if has_accelerator() else _status("VmRSS")


def peak_bytes() -> int:
    """The most held since `reset_peak`."""
    return torch.cuda.max_memory_allocated() if has_accelerator() else _status("VmHWM")


def reset_peak() -> None:
    """Let go of what nobody uses; the peak becomes what is held now."""
    gc.collect()
    if has_accelerator():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc keeps what was freed, other libraries have none
    if trim is not None:
        trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def available_bytes() -> int:
    """What a process could still take: free memory of the device, or of the machine as far as its cgroup may."""
    if has_accelerator():
        return int(torch.cuda.mem_get_info()[0])
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(fields["MemAvailable"].split()[0]) * 1024
    limit = _CGROUP_LIMIT.read_text().strip() if _CGROUP_LIMIT.is_file() else "max"
    return available if limit == "max" else min(available, int(limit) - held_bytes())


def _status(field: str) -> int:
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields[field].split()[0]) * 1024

"""What this machine offers: the cores this process may use."""

from __future__ import annotations

import math
import os
from pathlib import Path

_SIBLINGS = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def physical_cores() -> int:
    """Physical cores that this process may run on: its affinity, hyper-threads once, within the cgroup's quota."""
    cpus = os.sched_getaffinity(0)
    cores = {_siblings(cpu) for cpu in cpus}
    return max(1, min(len(cores), _quota(len(cpus))))


def _siblings(cpu: int) -> str:
    try:
        return Path(_SIBLINGS.format(cpu)).read_text(encoding="ascii").strip()
    except OSError:
        return str(cpu)


def _quota(default: int) -> int:
    try:
        limit, period = _QUOTA.read_text(encoding="ascii").split()
        return default if limit == "max" else math.ceil(int(limit) / int(period))
    except (OSError, ValueError):
        return default

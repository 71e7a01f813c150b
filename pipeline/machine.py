"""What this machine is: every reported number carries it, and `pipeline doctor` prints it."""

from __future__ import annotations

import platform
import resource
from typing import Any

from drafter.artifact import package_versions


def machine() -> dict[str, Any]:
    """Processor, cores this process may use, memory and operating system."""
    import psutil

    from engines.machine import processor

    return {
        **processor(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "os": platform.platform(),
    }


def versions() -> dict[str, str]:
    """Versions of Python, of this project and of what its numbers depend on."""
    return package_versions()


def peak_rss_mb() -> float:
    """Largest resident memory so far, in MB, of this process or of any it started."""
    kib = max(
        resource.getrusage(who).ru_maxrss
        for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    return round(kib * 1024 / 1e6, 1)

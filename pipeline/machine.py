"""What this machine is: every reported number carries it, and `pipeline doctor` prints it."""

from __future__ import annotations

import os
import platform
import resource
from pathlib import Path
from typing import Any

from drafter.artifact import package_versions

# Instruction sets that decide how fast matrix products are.
_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_int8", "amx_bf16")


def machine() -> dict[str, Any]:
    """Processor, cores this process may use, memory and operating system."""
    import psutil

    from engines.machine import physical_cores

    model, flags = _processor()
    return {
        "cpu": model,
        "cpu_flags": flags,
        "cores": physical_cores(),
        "logical_cpus": len(os.sched_getaffinity(0)),
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


def _processor() -> tuple[str, list[str]]:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor() or platform.machine(), []
    fields: dict[str, str] = {}
    for line in text.splitlines():
        name, _, value = line.partition(":")
        fields[name.strip()] = value.strip()
    flags = set(fields.get("flags", fields.get("Features", "")).split())
    model = fields.get("model name") or platform.machine()
    return model, [flag for flag in _FLAGS if flag in flags]
